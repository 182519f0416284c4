"""Frames stored as images: `<anything>_<seconds>.jpg`, one folder a clip.

The released code stores pre-extracted Kinetics so. At least one name of a folder has a decimal
point: `img_00001.jpg` counts frames, and taking such numbers for seconds would be silently wrong.
"""

import logging
import re
from collections.abc import Iterable

logger = logging.getLogger(__name__)

FRAME_NAME = re.compile(
    rb".*_([0-9]{1,12}(\.[0-9]{0,40})?(?:e-[0-9]{1,2})?)\.(?:jpe?g|png)", re.IGNORECASE | re.DOTALL
)
"""Group 1: the seconds, as Python writes a float. Group 2: there is a decimal point."""

WANTED_FRAMES = "folders of images named *_<seconds>.jpg, like 000012_0.48.jpg"


def frame_seconds(name: str) -> str | None:
    """The decimal number of seconds in the name of a frame; None for another file."""
    match = FRAME_NAME.fullmatch(name.encode("utf-8", "surrogateescape"))
    return None if match is None or name.startswith(".") else match[1].decode()


def holds_frames(names: Iterable[str], *, folder: str) -> bool:
    """Whether these names of one folder make it a clip; says so if they nearly do."""
    numbers = [text for name in names if (text := frame_seconds(name)) is not None]
    if numbers and not any("." in text for text in numbers):
        warn_whole_numbers(folder)
        return False
    return bool(numbers)


def warn_whole_numbers(folder: str) -> None:
    """A folder is left out because its names may count frames."""
    logger.warning(
        "%s: left out: its images have whole numbers only, frames counted and not seconds; wanted "
        "%s",
        folder,
        WANTED_FRAMES,
    )
