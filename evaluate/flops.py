"""FLOPs of every part, counted from the real modules on the meta device: no weights, no data.

2 per multiply-add, products only (matrix products and convolutions), one crop, ViT-B/16 by
default. `paper_table_b` counts norms and activations as well, as the paper's Table B does.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from ..shards.errors import UsageError
from ..shards.evaluation.geometry import FrameSize, frame_shape, shown_size
from ..train.losses import log_cosh, smooth_l1
from ..train.models.configs import DeltaTokConfig, DeltaWorldConfig
from ..train.models.deltatok import DeltaTok
from ..train.models.deltaworld import DeltaWorldNetwork
from ..train.models.rope import patch_rope, with_prefix
from .tables import markdown_table

aten = torch.ops.aten
GIGA = 1e9
CONVENTION = (
    "2 FLOPs per multiply-add, matrix products and convolutions only, one crop; "
    "backward passes are counted as they run"
)
CONTEXTS = (4, 5, 6)
"""Context tokens at the three steps of a mid-term forecast (paper, Table B)."""
NORM_FLOPS_PER_ELEMENT = 5
"""What the usual profilers count for an affine LayerNorm; an activation counts 1."""


@dataclass(frozen=True, kw_only=True)
class FlopsConfig:
    """The networks and sizes to count."""

    frame_size: FrameSize = 512
    """Side of the square crop, or height x width, pixels."""
    num_frames: int = 8
    """Frames of a DeltaWorld training window."""
    tokenizer: DeltaTokConfig = field(default_factory=DeltaTokConfig)
    """The tokenizer; its width is the backbone's."""
    world: DeltaWorldConfig = field(default_factory=DeltaWorldConfig)
    """The world model; num_samples_train is K."""
    num_winners: int = 1
    """Of a position's K candidates, those that pass with gradient."""
    patch_size: int = 16
    """Side of a patch, pixels."""
    backbone_layers: int = 12
    """Blocks of the backbone, which is a DINOv3 ViT of the tokenizer's width and heads."""
    num_register_tokens: int = 4
    """The backbone's register tokens."""

    def __post_init__(self) -> None:
        if any(side < 1 or side % self.patch_size for side in frame_shape(self.frame_size)):
            raise UsageError(
                f"frame_size {shown_size(self.frame_size)}: wanted a multiple of patch_size "
                f"{self.patch_size}"
            )
        if not 1 <= self.num_winners <= self.world.num_samples_train:
            raise UsageError(
                f"num_winners {self.num_winners}: wanted 1 to world.num_samples_train, "
                f"{self.world.num_samples_train}"
            )
        if self.world.hidden_size != self.tokenizer.hidden_size:
            raise UsageError(
                f"world hidden_size {self.world.hidden_size}, tokenizer's is "
                f"{self.tokenizer.hidden_size}; make them equal"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Patch rows and columns."""
        height, width = frame_shape(self.frame_size)
        return height // self.patch_size, width // self.patch_size


@dataclass(frozen=True)
class FlopsRow:
    """One line of a table."""

    name: str
    gflops: float


def count_flops(run: Callable[[], Any], *, count_all: bool = False) -> int:
    """The FLOPs of a call on meta tensors, backward included if it runs one.

    count_all: LayerNorms and activations too, not products only.
    """
    mapping: dict[Any, Any] = {}
    if count_all:
        mapping = {aten.native_layer_norm: _norm_flops, aten.gelu: _activation_flops}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        run()
    return int(counter.get_total_flops())


def flops_rows(config: FlopsConfig) -> list[FlopsRow]:
    """Every part for one frame size, as released, and what is saved here at equal output."""
    with torch.device("meta"):
        tokenizer, world = DeltaTok(config.tokenizer), DeltaWorldNetwork(config.world)
    frame = count_flops(partial(_run_backbone, config))
    encode = count_flops(partial(_run_released_encoder, tokenizer, config))
    encode_here = count_flops(partial(_run_encoder, tokenizer, config))
    decode = count_flops(partial(_run_decoder, tokenizer, config))
    frames = (config.num_frames + 1) * frame
    encodes = config.num_frames * encode
    selection = count_flops(partial(_run_selection, world, config))
    winners = count_flops(partial(_run_winners, world, config))
    named = "winner" if config.num_winners == 1 else f"{config.num_winners} winners"
    pair = count_flops(partial(_run_tokenizer_step, tokenizer, config))
    rows = {
        "backbone, a frame": frame,
        "encoder, a pair (released)": encode,
        "encoder, a pair (here: last block computes z only)": encode_here,
        "decoder, a frame": decode,
        **{
            f"predictor, one sample, {context} context tokens": count_flops(
                partial(_run_predictor, world, context)
            )
            for context in CONTEXTS
        },
        f"window: backbone, {config.num_frames} frames + 1 black": frames,
        f"window: encode {config.num_frames} pairs (released)": encodes,
        f"window: selection, K = {config.world.num_samples_train}": selection,
        f"window: {named}, forward + backward": winners,
        "window: whole, on the fly (released)": frames + encodes + selection + winners,
        "window: whole, from cached delta tokens": selection + winners,
        "tokenizer training pair: backbone": 2 * frame,
        "tokenizer training pair: whole (released)": 2 * frame + 3 * (encode + decode),
        "tokenizer training pair: from cached patch tokens": pair,
    }
    return [FlopsRow(name, value / GIGA) for name, value in rows.items()]


def paper_table_b(config: FlopsConfig) -> list[FlopsRow]:
    """The paper's Table B for a frame size (it used 256): decoder of plain blocks and predictor,
    norms and activations counted."""
    plain = replace(config.tokenizer, use_qk_norm=False, use_gated_attn=False, use_swiglu=False)
    with torch.device("meta"):
        tokenizer, world = DeltaTok(plain), DeltaWorldNetwork(config.world)
    rows = [
        FlopsRow(
            f"predictor, {context} context tokens",
            count_flops(partial(_run_predictor, world, context), count_all=True) / GIGA,
        )
        for context in CONTEXTS
    ]
    decoder = count_flops(partial(_run_decoder, tokenizer, config), count_all=True)
    return [*rows, FlopsRow("decoder, a frame, plain blocks", decoder / GIGA)]


def flops_table(columns: Sequence[tuple[str, Sequence[FlopsRow]]]) -> str:
    """A Markdown table in GFLOPs; all columns (heading, rows) have the same row names."""
    header = ["GFLOPs", *(heading for heading, _ in columns)]
    body = [
        [rows[0].name, *(_format(row.gflops) for row in rows)]
        for rows in zip(*(rows for _, rows in columns), strict=True)
    ]
    return markdown_table(header, body) + "\n"


def _run_backbone(config: FlopsConfig) -> None:
    with torch.device("meta"), torch.no_grad():
        backbone = DINOv3ViTModel(
            DINOv3ViTConfig(
                hidden_size=config.tokenizer.hidden_size,
                num_hidden_layers=config.backbone_layers,
                num_attention_heads=config.tokenizer.num_attention_heads,
                intermediate_size=config.tokenizer.intermediate_size,
                patch_size=config.patch_size,
                num_register_tokens=config.num_register_tokens,
            )
        )
        backbone(pixel_values=torch.empty(1, 3, *frame_shape(config.frame_size)))


@torch.no_grad()
def _run_encoder(tokenizer: DeltaTok, config: FlopsConfig) -> None:
    x = _features(config)
    tokenizer.encode(x, x, grid=config.grid)


@torch.no_grad()
def _run_released_encoder(tokenizer: DeltaTok, config: FlopsConfig) -> None:
    """Every block on every token, of which `encode` leaves out what only z is read from."""
    x = _features(config)
    rope = patch_rope(
        config.grid,
        head_dim=config.tokenizer.head_dim,
        theta=config.tokenizer.rope_theta,
        device=x.device,
    )
    num_frames = 2 if config.tokenizer.use_delta else 1
    tokens = _meta(1, 1 + num_frames * x.shape[1], x.shape[2])
    for block in tokenizer.encoder_blocks:
        tokens = block(tokens, with_prefix(rope, num_frames=num_frames))


@torch.no_grad()
def _run_decoder(tokenizer: DeltaTok, config: FlopsConfig) -> None:
    tokenizer.decode(_meta(1, config.tokenizer.hidden_size), _features(config), grid=config.grid)


@torch.no_grad()
def _run_predictor(world: DeltaWorldNetwork, context: int) -> None:
    """One sample's next token."""
    queries = _meta(1, 1, world.config.predictor_hidden_size)
    z, times = _meta(1, context, world.config.hidden_size), _meta(1, context)
    world.predict(queries, _meta(1, 1), z, times)


@torch.no_grad()
def _run_selection(world: DeltaWorldNetwork, config: FlopsConfig) -> None:
    z, times = _window(config)
    samples, size = world.config.num_samples_train, world.config.predictor_hidden_size
    noise = _meta(1, config.num_frames - 1, samples, size)
    world.candidates(world.memory(z, times), times, noise)


def _run_winners(world: DeltaWorldNetwork, config: FlopsConfig) -> None:
    z, times = _window(config)
    size = world.config.predictor_hidden_size
    prediction = world(z, times, _meta(1, config.num_frames - 1, config.num_winners, size))
    loss = smooth_l1(prediction, z[:, 1:, None].expand_as(prediction)).mean()
    torch.autograd.backward(loss)


def _run_tokenizer_step(tokenizer: DeltaTok, config: FlopsConfig) -> None:
    x = _features(config)
    loss = log_cosh(tokenizer(x, x, grid=config.grid), x).mean()
    torch.autograd.backward(loss)


def _window(config: FlopsConfig) -> tuple[Tensor, Tensor]:
    return _meta(1, config.num_frames, config.world.hidden_size), _meta(1, config.num_frames)


def _features(config: FlopsConfig) -> Tensor:
    return _meta(1, config.grid[0] * config.grid[1], config.tokenizer.hidden_size)


def _meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def _norm_flops(x_shape: Sequence[int], *_: Any, **__: Any) -> int:
    return NORM_FLOPS_PER_ELEMENT * torch.Size(x_shape).numel()


def _activation_flops(x_shape: Sequence[int], *_: Any, **__: Any) -> int:
    return torch.Size(x_shape).numel()


def _format(gflops: float) -> str:
    return f"{gflops:,.3f}" if gflops < 1 else f"{gflops:,.2f}"
