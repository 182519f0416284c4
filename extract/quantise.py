"""Patch tokens as they are stored, made on the device, so that only that is copied to the host.

Nothing is refused here: what cannot be stored is marked, then counted and refused with its clip
when the shard is written. B windows, T frames, N patches, D channels.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..shards.patches.int8 import MAX_CODE, MAX_NORMALISED, MIN_TOKEN_SCALE, UNSTORABLE

SCALE_BYTES = 2
"""A float16 token scale, behind its token's codes."""


def to_float16(tokens: Tensor) -> Tensor:
    """float32 -> float16. What is too large becomes infinite, what was infinite before NaN."""
    return torch.where(tokens.isinf(), torch.nan, tokens).to(torch.float16)


def to_bfloat16_bits(tokens: Tensor) -> Tensor:
    """float32 -> the bits of the nearest bfloat16, as int16."""
    return tokens.to(torch.bfloat16).view(torch.int16)


def to_int8(tokens: Tensor, channel_scale: Tensor) -> Tensor:
    """float32 (B, T, N, D), float32 (D,) -> int8 (B, T, N, D + 2): a token's codes, then the bytes
    of its float16 scale. The same numbers, bit for bit, as `shards.int8.quantise` makes."""
    normalised = tokens / channel_scale
    magnitude = normalised.abs()
    # Not by 127: a product with its inverse, as some devices divide by constants, rounds otherwise.
    most = torch.full((), MAX_CODE, dtype=torch.float32, device=tokens.device)
    scale = (magnitude.amax(dim=-1, keepdim=True) / most).clamp(min=MIN_TOKEN_SCALE)
    scale = scale.to(torch.float16)
    codes = (normalised / scale.float()).round().clamp(-MAX_CODE, MAX_CODE).nan_to_num(nan=0.0)
    codes = torch.where(magnitude <= MAX_NORMALISED, codes, UNSTORABLE).to(torch.int8)
    return torch.cat([codes, scale.view(torch.int8)], dim=-1)


def split_int8(rows: NDArray[np.int8]) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """What `to_int8` put together, on the host: codes int8 (..., D), a view; token scale float16
    (...)."""
    scale = np.ascontiguousarray(rows[..., -SCALE_BYTES:]).view(np.float16)
    return rows[..., :-SCALE_BYTES], scale[..., 0]
