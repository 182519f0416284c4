"""The README.txt of a plain npy folder, for people who have nothing but the folder."""

from typing import Any

import numpy as np

from ..cache import CacheInfo

TEXT = """Features of video windows, exported from a {format} cache.

tokens.npy      {dtype} {shape}: {axes}.
                numpy.load("tokens.npy", mmap_mode="r") maps it without reading it.
timestamps.npy  float32 (W, T), seconds {since}.
windows.jsonl   line i describes window i: clip (the video's key), label, split (null if unknown),
                frames (indices of its T frames, in presentation order), crop (top, left, height,
                width in source pixels), flipped (the crop was mirrored left to right).
{more}source.json     what made the features: identity, fingerprint, licence, and how many windows
                come from which caches.

{values}
W windows, T frames a window, D channels of a token{letters}. All arrays are
little-endian and in C order.

Licence of the contents: {licence}
"""

VALUES = {
    "uint16": """Values: the numbers are the bits of bfloat16. As float32:
    (tokens.astype("uint32") << 16).view("float32")
""",
    "int8": """Values: the numbers are codes. As float32:
    tokens.astype("float32") * token_scale.astype("float32")[..., None] * channel_scale
""",
}


def readme(
    info: CacheInfo, *, shape: tuple[int, ...], dtype: np.dtype[Any], converted: bool
) -> str:
    """The whole text. shape, dtype: of tokens.npy. converted: the values were stored in another
    type before."""
    patches = info.shape.num_tokens is not None
    more = ""
    if patches:
        more += "black.npy       float32 (N, D), the tokens of a black frame.\n"
    if dtype == np.int8:
        more += "token_scale.npy, channel_scale.npy    float16 (W, T, N) and float32 (D,).\n"
    values = VALUES.get(dtype.name, "")
    if converted:
        stored = info.identity.get("storage", {}).get("dtype")
        values = f"Values: {dtype.name}, in the cache {stored}.\n"
    grid = "" if info.shape.grid is None else " x ".join(map(str, info.shape.grid))
    axes = f"(window, frame, patch, channel), the patches row by row, {grid}"
    if not patches:
        axes = "(window, frame, channel); token t leads from frame t - 1 to t, token 0 from black"
    return TEXT.format(
        format=info.format,
        dtype=dtype.name,
        shape=shape,
        axes=axes,
        since="since the clip's first frame" if patches else "from the window's first frame",
        more=more,
        values=values,
        letters=", N patches of a frame" if patches else "",
        licence=info.licence or "not stated",
    )
