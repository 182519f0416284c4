"""NOTICE.txt: the terms that go with a cache, for whoever gets the folder without knowing why.

A function of cache.json; written when a cache is begun. Called by `cache`.
"""

from collections.abc import Mapping
from typing import Any

NOTICE = "NOTICE.txt"


def notice_bytes(licence: str, backbone: Mapping[str, Any]) -> bytes:
    """The file for these fields of cache.json."""
    name = backbone.get("name")
    made_with = f"Backbone: {name}\n" if isinstance(name, str) else ""
    text = (
        "This folder holds features that a frozen image backbone computed from videos: numbers,\n"
        "no images. cache.json says what made them. Keep this file with every copy, whole or in\n"
        f"part.\n\n{made_with}Licence: {licence or 'not stated in cache.json'}\n\n"
        "Features made with DINOv3 are to be treated as DINO Materials: share them only under\n"
        "the DINOv3 License and with a copy of it, and acknowledge DINOv3 in publications\n"
        "(https://ai.meta.com/resources/models-and-libraries/dinov3-license/). The terms of the\n"
        "videos apply as well. This is a notice, not legal advice.\n"
    )
    return text.encode()
