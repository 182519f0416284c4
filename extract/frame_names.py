"""Frames stored as images: `<anything>_<seconds>.jpg`, one folder a clip.

The released code stores pre-extracted Kinetics so. At least one name of a folder has a decimal
point: `img_00001.jpg` counts frames, and taking such numbers for seconds would be silently wrong.
"""

import re
from collections.abc import Iterable

FRAME_NAME = re.compile(
    rb".*_([0-9]{1,12}(\.[0-9]{0,40})?(?:e-[0-9]{1,2})?)\.(?:jpe?g|png)", re.IGNORECASE | re.DOTALL
)
"""Group 1: the seconds, as Python writes a float. Group 2: there is a decimal point."""

WANTED_FRAMES = "folders of images named *_<seconds>.jpg, like 000012_0.48.jpg"


def frame_seconds(name: str) -> str | None:
    """The decimal number of seconds in the name of a frame; None for another file."""
    match = FRAME_NAME.fullmatch(name.encode("utf-8", "surrogateescape"))
    return None if match is None or name.startswith(".") else match[1].decode()


def holds_frames(names: Iterable[str]) -> bool:
    """Whether these names of one folder make it a clip."""
    return any("." in (frame_seconds(name) or "") for name in names)
