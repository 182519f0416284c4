"""What an extraction writes into cache.json: identity, shape, and notices for people.

The identity holds everything that changes a stored number, and only that.
"""

import platform
from importlib.metadata import version
from typing import Any

from ..shards.cache import PATCHES, CacheInfo, CacheShape
from .backbone import Backbone
from .config import ExtractConfig
from .datasets.windows import Policy
from .pixels import RESIZE_RULE

_SOFTWARE = ("deltatok", "numcodecs", "numpy", "torch", "transformers", "zarr")
_DINOV3_LICENCE = (
    "Features computed with DINOv3, under the DINOv3 License "
    "(https://ai.meta.com/resources/models-and-libraries/dinov3-license/), which goes with them to "
    "whoever gets them; the terms of the videos apply as well."
)
_OTHER_LICENCE = (
    "The licences of the backbone and of the videos apply to features computed from them."
)


def cache_identity(config: ExtractConfig, policy: Policy, backbone: Backbone) -> CacheInfo:
    """The cache.json of a patch-token cache, all but `storage`, which its writer adds.

    Raises UsageError for a frame size that is no multiple of the backbone's patch size.
    """
    grid = backbone.grid(config.frame_size)
    height, width = config.frame_shape
    identity: dict[str, Any] = {
        "backbone": backbone.identity(),
        "preprocessing": {
            "frame_size": height if height == width else [height, width],
            "patch_size": backbone.patch_size,
            "image_mean": list(backbone.image_mean),
            "image_std": list(backbone.image_std),
            "resize": RESIZE_RULE,
        },
        "sampling": policy.identity(),
        "autocast_dtype": backbone.autocast,
    }
    model_type = str(identity["backbone"]["config"].get("model_type"))
    is_dinov3 = model_type.startswith("dinov3_")
    licence = _DINOV3_LICENCE if is_dinov3 else _OTHER_LICENCE
    return CacheInfo(
        format=PATCHES,
        identity=identity,
        shape=CacheShape(
            num_frames=config.num_frames,
            num_tokens=grid[0] * grid[1],
            grid=grid,
            hidden_size=backbone.hidden_size,
        ),
        backbone={"name": backbone.name, "notice": licence},
        licence=licence,
        software={"python": platform.python_version()}
        | {package: version(package) for package in _SOFTWARE},
    )
