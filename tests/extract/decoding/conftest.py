"""Little videos made by code, whose every frame carries its number."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

BITS = 8
SQUARE = 16
"""Pixels a side of one bit; large enough that no codec can lose it."""


class Videos:
    """Writes numbered videos into a folder of this test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(
        self,
        name: str,
        *,
        codec: str = "libx264",
        num_frames: int = 40,
        ticks: Sequence[int] | None = None,
        rate: int = 25,
        pixel_format: str = "yuv420p",
        options: dict[str, str] | None = None,
        tall: int = 3 * SQUARE,
    ) -> Path:
        """A video of `num_frames` numbered frames; frame i is shown at ticks[i] / (4 * rate) s,
        by default at i / rate s."""
        path = self.folder / name
        ticks = [4 * i for i in range(num_frames)] if ticks is None else ticks
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=rate, options=options or {})
            stream.width, stream.height, stream.pix_fmt = BITS * SQUARE, tall, pixel_format
            stream.codec_context.time_base = Fraction(1, 4 * rate)
            for number, tick in enumerate(ticks):
                frame = av.VideoFrame.from_ndarray(_picture(number, tall), format="rgb24")
                frame = frame.reformat(format=pixel_format)
                frame.pts, frame.time_base = tick, Fraction(1, 4 * rate)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return path

    @staticmethod
    def number(pixels: np.ndarray) -> int:
        """The number a decoded frame carries: uint8 (H, W, 3) -> 0..255."""
        row = pixels[SQUARE // 2 :: SQUARE][0, SQUARE // 2 :: SQUARE].mean(axis=-1) > 127
        return int(sum(1 << bit for bit, on in enumerate(row) if on))


def _picture(number: int, tall: int) -> np.ndarray:
    """uint8 (tall, 128, 3): the bits of `number` as white squares, something that moves below."""
    picture = np.full((tall, BITS * SQUARE, 3), 40, np.uint8)
    for bit in range(BITS):
        level = 235 if number >> bit & 1 else 20
        picture[:SQUARE, bit * SQUARE : (bit + 1) * SQUARE] = level
    picture[SQUARE + number % SQUARE :, 3 * number % 100 :, 1] = 150
    return picture


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Videos:
    return Videos(tmp_path_factory.mktemp("videos"))
