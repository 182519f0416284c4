"""Possible futures: delta tokens, and what is read from them when it is asked for.

S samples, H steps, N patch tokens of a frame, D channels. Made by `stream.py`.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..shards.errors import UsageError
from ..train.models.heads import feature_map
from .differing import most_different
from .parts import Parts
from .rollout import decode_rollout


@dataclass(frozen=True, kw_only=True, eq=False)
class Futures:
    """S futures of one video. `tokens` is there; the rest is computed when first asked for."""

    tokens: Tensor
    """(S, H, D) float32 delta tokens."""
    times_s: tuple[float, ...]
    """H times, seconds after the last frame seen."""
    seen_s: tuple[float, ...]
    """C times of the frames seen, the last one 0."""
    seen: NDArray[np.uint8]
    """(C, H, W, 3) the frames seen."""
    came: NDArray[np.uint8]
    """The frames that really came at the first of `times_s`, where they are known."""
    last: Tensor
    """(N, D) features of the last frame seen."""
    parts: Parts
    samples_at_once: int

    def __len__(self) -> int:
        """S."""
        return len(self.tokens)

    @property
    def grid(self) -> tuple[int, int]:
        """Patch rows and columns: N is their product."""
        return self.parts.grid

    @cached_property
    def features(self) -> Tensor:
        """(S, H, N, D) float32 patch tokens of every sample; decoded at the first use."""
        with self.parts.arithmetic():
            decoded = [
                decode_rollout(self.parts.tokenizer, tokens[None], self.last[None], grid=self.grid)[
                    0
                ].float()
                for tokens in torch.split(self.tokens, self.samples_at_once)
            ]
        return torch.cat(decoded)

    @cached_property
    def mean(self) -> Tensor:
        """(H, N, D): the samples' features averaged."""
        return self.features.mean(dim=0)

    @cached_property
    def spread(self) -> Tensor:
        """(H, h, w): standard deviation of the samples, root mean square over channels."""
        variance = self.features.var(dim=0, correction=0).mean(dim=-1)
        return variance.sqrt().reshape(-1, *self.grid)

    @cached_property
    def outputs(self) -> Tensor:
        """What the head reads from every sample: (S, H, K, h, w) class logits or metres (K = 1), or
        pictures (S, H, 3, pixels, pixels), about 0-1. UsageError without a head."""
        rows = [self.read(sample) for sample in self.features]
        return torch.stack(rows)

    @cached_property
    def mean_output(self) -> Tensor:
        """What the head reads from the mean features: (H, K, h, w)."""
        return self.read(self.mean)

    def read(self, features: Tensor) -> Tensor:
        """The head's output (B, K, h, w) for features (B, N, D), in float32."""
        head = self.parts.head
        if head is None:
            raise UsageError("no head: pass head=FOLDER to DeltaWorld.from_pretrained")
        with torch.no_grad():
            output: Tensor = head(feature_map(features.float(), grid=self.grid))
        return output

    def most_different(self, count: int) -> list[int]:
        """Numbers of the samples that differ most at the last step, the most typical first."""
        return most_different(self.features[:, -1], count)

    def save_grid(self, path: str | Path, *, num_samples: int = 4, show: str | None = None) -> Path:
        """A PNG: the frames seen, what came (where known), the samples that differ most, mean and
        spread. show: "features" (colours) or "head" (what it reads); by default the head's if
        there is one. Gives the path."""
        from .futures_pictures import save_grid

        return save_grid(self, Path(path), num_samples=num_samples, show=show)

    def save_mp4(self, path: str | Path, *, num_samples: int = 4, show: str | None = None) -> Path:
        """The same as a video, samples side by side, in real time; ends in .gif: a GIF."""
        from .futures_pictures import save_video

        return save_video(self, Path(path), num_samples=num_samples, show=show)
