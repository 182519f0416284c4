"""The frozen configurations of the tokenizer and the two world models, and their checks.

Written into every model folder as config.json.
"""

from dataclasses import dataclass

from ...shards.errors import UsageError


def check_at_least(least: int, **values: float | None) -> None:
    """UsageError for the first value that is set and below `least` (or no number)."""
    for name, value in values.items():
        if value is not None and not value >= least:
            raise UsageError(f"{name} {value}: wanted at least {least}")


@dataclass(frozen=True, kw_only=True)
class DeltaTokConfig:
    """DeltaTok, as released for a ViT-B/16 backbone (the paper's own form: the three use_qk_norm,
    use_gated_attn and use_swiglu false)."""

    hidden_size: int = 768
    """Channels D of the backbone's patch tokens and of the delta token."""
    num_hidden_layers: int = 12
    """Blocks of the encoder, and again of the decoder."""
    num_attention_heads: int = 12
    """Attention heads of a block."""
    intermediate_size: int = 3072
    """Hidden channels of a plain MLP; SwiGLU uses two thirds of it."""
    use_delta: bool = True
    """True: z is the change between two frames. False: z is one frame (the paper's step 2)."""
    use_qk_norm: bool = True
    """LayerNorm per head on rotated queries and keys (released code, not in the paper)."""
    use_gated_attn: bool = True
    """Sigmoid gate per head and token on the attention output (released code, not in the paper)."""
    use_swiglu: bool = True
    """SwiGLU instead of a GELU MLP (released code, not in the paper)."""
    use_rope_aug: bool = True
    """Draw a scale of the patch coordinates for every training step."""
    rope_theta: float = 100.0
    """Base of the inverse frequencies of the 2-D rotary positions."""
    pos_embed_rescale: float = 2.0
    """The drawn scale is log-uniform between 1 / this and this."""
    layer_norm_eps: float = 1e-5
    """Epsilon of every LayerNorm."""
    layer_scale_init: float = 1e-5
    """First value of every LayerScale. At 1e-5 a decoder can settle into ignoring z."""
    initializer_range: float = 0.02
    """Standard deviation of fresh linear and embedding weights."""

    def __post_init__(self) -> None:
        check_at_least(
            1,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=self.intermediate_size,
        )
        if self.hidden_size % (4 * self.num_attention_heads) != 0:
            raise UsageError(
                f"hidden_size {self.hidden_size} with {self.num_attention_heads} attention heads: "
                "2-D rotary positions need head channels that are a multiple of 4; change one"
            )
        if self.pos_embed_rescale < 1:
            raise UsageError(
                f"pos_embed_rescale {self.pos_embed_rescale}: wanted at least 1; "
                "use 1, or use_rope_aug: false, for no augmentation"
            )

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def mlp_size(self) -> int:
        """Hidden channels of the MLP that is really built."""
        return 2 * self.intermediate_size // 3 if self.use_swiglu else self.intermediate_size


@dataclass(frozen=True, kw_only=True)
class PredictorConfig:
    """What both world models share: the cross-attention predictor and its queries."""

    hidden_size: int = 768
    """Channels D of the tokens that are read and predicted."""
    predictor_hidden_size: int = 768
    """Channels Dp inside the predictor, and of a query."""
    predictor_num_hidden_layers: int = 12
    """Cross-attention blocks."""
    predictor_num_heads: int = 12
    """Attention heads of a block."""
    rope_axis_sizes: tuple[int, ...] = ()
    """Rotated channels of a head for each position axis."""
    rope_unrotated_size: int = 4
    """Channels of a head that carry no position."""
    mlp_ratio: int = 4
    """Hidden channels of the MLP as a multiple of predictor_hidden_size."""
    use_bom: bool = True
    """True: noise queries, trained by best-of-many. False: one learned query (discriminative)."""
    num_samples_train: int = 256
    """Candidates K of a position in best-of-many training."""
    num_samples_eval: int = 20
    """Samples of a forecast."""
    layer_scale_init: float = 1e-5
    """First value of every LayerScale."""
    initializer_range: float = 0.02
    """Standard deviation of fresh weights, and of the noise queries."""
    layer_norm_eps: float = 1e-5
    """Epsilon of every LayerNorm."""

    def __post_init__(self) -> None:
        check_at_least(
            1,
            hidden_size=self.hidden_size,
            predictor_hidden_size=self.predictor_hidden_size,
            predictor_num_hidden_layers=self.predictor_num_hidden_layers,
            predictor_num_heads=self.predictor_num_heads,
            mlp_ratio=self.mlp_ratio,
            num_samples_train=self.num_samples_train,
            num_samples_eval=self.num_samples_eval,
        )
        if self.predictor_hidden_size % self.predictor_num_heads != 0:
            raise UsageError(
                f"predictor_hidden_size {self.predictor_hidden_size} is no multiple of "
                f"predictor_num_heads {self.predictor_num_heads}; change one"
            )
        if any(size <= 0 or size % 2 for size in self.rope_axis_sizes):
            raise UsageError(
                f"rope_axis_sizes {self.rope_axis_sizes}: each axis needs a positive even number "
                "of channels"
            )
        used = sum(self.rope_axis_sizes) + self.rope_unrotated_size
        if used != self.head_dim:
            raise UsageError(
                f"rope_axis_sizes {self.rope_axis_sizes} and rope_unrotated_size "
                f"{self.rope_unrotated_size} add up to {used}, a head has {self.head_dim} "
                "channels; make them equal"
            )

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.predictor_hidden_size // self.predictor_num_heads


@dataclass(frozen=True, kw_only=True)
class DeltaWorldConfig(PredictorConfig):
    """DeltaWorld, as released: best-of-many over delta tokens, one position axis (seconds)."""

    rope_axis_sizes: tuple[int, ...] = (60,)
    """Rotated channels of a head for time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_axes(self.rope_axis_sizes, ("time",))


@dataclass(frozen=True, kw_only=True)
class DINOWorldConfig(PredictorConfig):
    """DINO-world, the baseline over all patch tokens: discriminative, three position axes."""

    rope_axis_sizes: tuple[int, ...] = (20, 20, 20)
    """Rotated channels of a head for time, x and y."""
    use_bom: bool = False
    """True: noise queries, one a frame, trained by best-of-many. False: one learned query."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_axes(self.rope_axis_sizes, ("time", "x", "y"))


def _check_axes(sizes: tuple[int, ...], axes: tuple[str, ...]) -> None:
    if len(sizes) != len(axes):
        raise UsageError(
            f"rope_axis_sizes {sizes}: wanted {len(axes)} numbers, one for each of {axes}"
        )
