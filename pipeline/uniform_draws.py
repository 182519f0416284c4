"""Training windows drawn among the stored frames of a `uniform` patch cache.

The paper's gaps and starts, by the very rule and random numbers with which videos are sampled
(shards/sampling.py), but the nearest stored frame instead of the nearest shown one, the whole
frame instead of a crop, and no flip: crops and flips are made on pixels, which are gone. The
cache's identity says so. train/encode.py takes it as an argument: it does not know extract/.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..extract.config import KINETICS_STRIDE_RANGE_S
from ..shards.sampling import SamplingPolicy, draw_windows
from ..train.config import DRAWN_FRAMES, DRAWN_WINDOWS, TokenizeConfig

POLICY = "windows from uniform"


class UniformDraws:
    """A train.encode.WindowDraws."""

    def __init__(self, *, num_windows: int, num_frames: int, seed: int) -> None:
        self.num_windows = num_windows
        self.num_frames = num_frames
        self._policy = SamplingPolicy(
            policy="windows",
            num_frames=num_frames,
            num_windows=num_windows,
            time_stride_range=KINETICS_STRIDE_RANGE_S,
            crop_scale=(1.0, 1.0),
            crop_ratio=(1.0, 1.0),
            flip_probability=0.0,
            fps=None,
            seed=seed,
            min_frames=1,
        )

    @classmethod
    def from_config(cls, config: TokenizeConfig) -> "UniformDraws":
        """What the flags ask for, or their defaults."""
        return cls(
            num_windows=DRAWN_WINDOWS if config.num_windows is None else config.num_windows,
            num_frames=DRAWN_FRAMES if config.num_frames is None else config.num_frames,
            seed=config.seed or 0,
        )

    def identity(self) -> dict[str, Any]:
        """The deviation from `windows`, in words that a reader of cache.json understands."""
        return {
            "policy": POLICY,
            "num_windows": self.num_windows,
            "num_frames": self.num_frames,
            "time_stride_range": list(self._policy.time_stride_range),
            "frames": "the nearest stored frame; no crop, no flip",
            "seed": self._policy.seed,
        }

    def rows(self, key: str, timestamps_s: NDArray[np.float64]) -> NDArray[np.int64]:
        """int64 (num_windows, T) into the stored frames, a function of (seed, key, window)."""
        draws = draw_windows(self._policy, key, timestamps_s, height=1, width=1)
        return np.array([draw.frame_index for draw in draws], dtype=np.int64)
