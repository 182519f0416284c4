"""DeltaTok, the tokenizer: the change between two frames' patch tokens <-> one delta token.

Letters: B batch, T frames, N patches of a frame (row-major, N = h * w), D channels.
x: patch tokens of the frozen backbone, float (B, N, D). z: delta tokens, float (B, D).
"A Frame is Worth One Token" (Kerssies et al., CVPR 2026) and its released code: the encoder reads
[z, x_prev + e_prev, x_cur + e_cur] and gives token 0 after a norm; the decoder reads [z, x_prev]
and gives the patch tokens without a norm, so that small layer scales start as copying x_prev.
"""

import math

import torch
from torch import Tensor, nn

from ..engine.model_folder import Pretrained
from .blocks import TokenizerBlock, init_weights
from .configs import DeltaTokConfig
from .rope import Rope, patch_rope, with_prefix


class DeltaTok(Pretrained):
    """Encoder and decoder. `rescale` everywhere: the factor on the patch coordinates that training
    draws (draw_rope_rescale), one for a whole step; None in every other use."""

    config_class = DeltaTokConfig
    config: DeltaTokConfig

    def __init__(self, config: DeltaTokConfig, *, generator: torch.Generator | None = None) -> None:
        super().__init__(config)
        size, depth = config.hidden_size, config.num_hidden_layers
        self.z_embed = nn.Embedding(1, size)
        self.xy_embed = nn.Embedding(2, size)  # row 0: previous frame, row 1: current frame
        self.encoder_blocks = nn.ModuleList(TokenizerBlock(config) for _ in range(depth))
        self.decoder_blocks = nn.ModuleList(TokenizerBlock(config) for _ in range(depth))
        self.norm = nn.LayerNorm(size, eps=config.layer_norm_eps)  # of z; the decoder has none
        init_weights(
            self,
            std=config.initializer_range,
            layer_scale_init=config.layer_scale_init,
            generator=generator,
        )

    def forward(
        self,
        x_prev: Tensor,
        x_cur: Tensor,
        *,
        grid: tuple[int, int],
        rescale: Tensor | float | None = None,
        start: Tensor | None = None,
        encoder_patches: Tensor | None = None,
        decoder_patches: Tensor | None = None,
    ) -> Tensor:
        """The reconstruction of x_cur, (B, N, D): decode(encode(x_prev, x_cur), start); start
        (B, N, D), None: x_prev. Which patches the two halves have: see there."""
        z = self.encode(x_prev, x_cur, grid=grid, rescale=rescale, patches=encoder_patches)
        start = x_prev if start is None else start
        return self.decode(z, start, grid=grid, rescale=rescale, patches=decoder_patches)

    def encode(
        self,
        x_prev: Tensor,
        x_cur: Tensor,
        *,
        grid: tuple[int, int],
        rescale: Tensor | float | None = None,
        patches: Tensor | None = None,
    ) -> Tensor:
        """The delta token z (B, D) of the ordered pair x_prev, x_cur (B, N, D).

        Without use_delta, x_prev is ignored. patches int64 (M,): those of both frames that are
        read; None: all.
        """
        rope = self._rope(grid, x_cur, rescale=rescale, patches=patches)
        if patches is not None:
            x_prev, x_cur = x_prev[:, patches], x_cur[:, patches]
        z = self.z_embed.weight.expand(x_cur.shape[0], -1, -1)
        frames = [x_cur + self.xy_embed.weight[1]]
        if self.config.use_delta:
            frames.insert(0, x_prev + self.xy_embed.weight[0])
        tokens = torch.cat([z.to(frames[0].dtype), *frames], dim=1)
        rope = with_prefix(rope, num_frames=len(frames))
        for block in self.encoder_blocks[:-1]:
            tokens = block(tokens, rope)
        out: Tensor = self.norm(self.encoder_blocks[-1](tokens, rope, num_queries=1))
        return out[:, 0]

    def decode(
        self,
        z: Tensor,
        x_prev: Tensor,
        *,
        grid: tuple[int, int],
        rescale: Tensor | float | None = None,
        patches: Tensor | None = None,
    ) -> Tensor:
        """The current frame's patch tokens (B, N, D) from z (B, D) and x_prev (B, N, D).

        Without use_delta, only the shape of x_prev matters. patches int64 (M,): those that are
        read and given, (B, M, D); None: all.
        """
        rope = with_prefix(self._rope(grid, x_prev, rescale=rescale, patches=patches))
        if patches is not None:
            x_prev = x_prev[:, patches]
        start = x_prev
        if not self.config.use_delta:
            start = self.xy_embed.weight[0].expand_as(x_prev)
        tokens = torch.cat([z[:, None].to(start.dtype), start], dim=1)
        for block in self.decoder_blocks:
            tokens = block(tokens, rope)
        return tokens[:, 1:]

    def encode_sequence(self, x: Tensor, black: Tensor, *, grid: tuple[int, int]) -> Tensor:
        """Delta tokens (B, T, D) of x (B, T, N, D), open loop: each from its two true frames.

        black (N, D): patch tokens of a black frame, which precede frame 0.
        """
        first = black.to(x.dtype).expand(x.shape[0], 1, -1, -1)
        previous = torch.cat([first, x[:, :-1]], dim=1)
        z = self.encode(previous.flatten(0, 1), x.flatten(0, 1), grid=grid)
        return z.reshape(*x.shape[:2], -1)

    def reconstruct(self, x: Tensor, x_start: Tensor, *, grid: tuple[int, int]) -> Tensor:
        """x (B, T, N, D) through the tokenizer, closed loop: (B, T, N, D).

        Every step encodes and decodes against its own last reconstruction; x_start (B, N, D) is
        what precedes x: the true frame before it, or black frames.
        """
        out, last = [], x_start
        for frame in x.unbind(1):
            last = self(last, frame, grid=grid)
            out.append(last)
        return torch.stack(out, dim=1)

    def _rope(
        self,
        grid: tuple[int, int],
        x: Tensor,
        *,
        rescale: Tensor | float | None,
        patches: Tensor | None,
    ) -> Rope:
        rope = patch_rope(
            grid,
            head_dim=self.config.head_dim,
            theta=self.config.rope_theta,
            rescale=rescale,
            device=x.device,
        )
        return rope if patches is None else Rope(rope.cos[patches], rope.sin[patches])


def draw_rope_rescale(config: DeltaTokConfig, generator: torch.Generator) -> Tensor | None:
    """One training step's factor on the patch coordinates: log-uniform float32 (1,), on the
    generator's device; None if the config wants no augmentation."""
    if not config.use_rope_aug:
        return None
    limit = math.log(config.pos_embed_rescale)
    drawn = torch.empty(1, device=generator.device)
    return drawn.uniform_(-limit, limit, generator=generator).exp()
