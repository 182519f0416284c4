"""How windows of an evaluation data set are made: the frames up to a target, in two squares, or
whole where the backbone sees rectangles.

The frames are known by number, nothing is drawn at random. NumPy only: it runs in the decoding
processes. PAPER "Evaluation"; the geometry is that of shards/evaluation/geometry.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ...shards.errors import ClipError, DeltatokError
from ...shards.evaluation.geometry import (
    MAX_ASPECT_RATIO,
    FrameSize,
    compute_resize_sizes,
    frame_shape,
    kb_region,
    square_corners,
)
from ...shards.sampling import SamplingPolicy, Square, WindowDraw
from ..decoding.container import Float64

CROPS = (
    "frame resized so that the short side is frame_size and the long one at most "
    "max_aspect_ratio times that, then squares at both ends, left or top first"
)
WHOLE = "whole frame, resized to frame_size"
KITTI_CROPS = "KITTI benchmark crop (352 x 1216), then"


@dataclass(frozen=True, kw_only=True)
class EvaluationPolicy:
    """The windows of one data set."""

    policy: Literal["evaluation"] = "evaluation"
    dataset: str
    num_frames: int
    num_context: int
    """How many of them a forecast sees."""
    stride_s: float
    """Seconds between two of them, a whole number of frames."""
    fps: float
    """Frames in a second of the data set."""
    frame_size: FrameSize
    region: Literal["whole", "kb"] = "whole"
    """What is seen of a frame: all of it, or KITTI's benchmark crop."""
    seed: int = 0
    """Of the order of windows in a shard."""

    def identity(self) -> dict[str, Any]:
        """`sampling` of the cache identity."""
        is_square = self._side is not None
        crops = CROPS if is_square else WHOLE
        return {
            "policy": self.policy,
            "dataset": self.dataset,
            "num_frames": self.num_frames,
            "num_context": self.num_context,
            "stride_s": self.stride_s,
            "fps": self.fps,
            "crops": crops if self.region == "whole" else f"{KITTI_CROPS} {crops}",
            **({"max_aspect_ratio": MAX_ASPECT_RATIO} if is_square else {}),
            "seed": self.seed,
        }

    @property
    def _side(self) -> int | None:
        """Of the squares; None where the backbone sees rectangles."""
        height, width = frame_shape(self.frame_size)
        return height if height == width else None

    def draw(
        self, numbers: Sequence[int], times_s: Float64, height: int, width: int
    ) -> list[WindowDraw]:
        """The windows of a target: one for each square, or one of the whole frame.

        Args:
            numbers: of the frames in their sequence.
            times_s: float64 seconds of all frames of the sequence up to the last of them.
            height, width: of the shown frame, in pixels.

        Raises:
            ClipError: the sequence ends before the last frame, or frames are too small.
        """
        if numbers[-1] >= len(times_s):
            raise ClipError(
                f"shows {len(times_s)} frames, the target is frame {numbers[-1]}", stage="sample"
            )
        region = (0, 0, height, width)
        if self.region == "kb":
            try:
                region = kb_region(height, width)
            except DeltatokError as error:
                raise ClipError(str(error), stage="sample") from error
        whole = WindowDraw(
            frame_index=tuple(numbers),
            timestamps_s=tuple(times_s[list(numbers)].tolist()),
            crop=region,
            flipped=False,
        )
        side = self._side
        if side is None:
            return [whole]
        resized = compute_resize_sizes(*region[2:], side)
        corners = square_corners(*resized)
        return [replace(whole, square=Square(*resized, *at, side=side)) for at in corners]


Policy = SamplingPolicy | EvaluationPolicy


def one_window_a_clip(policy: Policy) -> Policy:
    """The policy with as few windows as it can give."""
    if isinstance(policy, EvaluationPolicy):
        return policy
    return replace(policy, num_windows=1)
