"""The square that an evaluation window shows of a resized frame. Part of sampling.WindowDraw."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Square:
    """A crop is resized to `height` x `width`, then a square of the frame size is cut from it."""

    height: int
    width: int
    top: int
    left: int
    side: int

    def in_pixels_of(self, crop: tuple[int, int, int, int]) -> tuple[float, float, float, float]:
        """Where the square lies in the frame of which `crop` is resized."""
        top, left, height, width = crop
        return (
            top + self.top * height / self.height,
            left + self.left * width / self.width,
            self.side * height / self.height,
            self.side * width / self.width,
        )
