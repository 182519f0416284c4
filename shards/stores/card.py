"""The README.md of a cache on the Hugging Face hub: what it is, its terms, how to read it."""

from ..cache import PATCHES, CacheInfo
from ..files import size_text

_CARD = """\
---
license: other
license_name: {license_name}
tags: [video, world-models, features, deltatok]
viewer: false
---

# {title}

{counts}. `cache.json` says what made them, `NOTICE.txt` under which terms they are: features of
DINOv3 are to be treated as DINO Materials, under the
[DINOv3 License](https://ai.meta.com/resources/models-and-libraries/dinov3-license/), and the terms
of the videos apply as well.

Licence: {licence}

![Some windows](preview.png)

## Reading it

```python
# pip install deltatok
from deltatok.shards import {reader}

cache = {reader}("{url}")
tokens = cache.tokens([0])  # {shape}
print(tokens.shape, cache.keys[:3], cache.timestamps_s([0]))
```

Without deltatok: {without}

| | |
|---|---|
{facts}
"""


def dataset_card(info: CacheInfo, url: str, *, size_bytes: int) -> bytes:
    """README.md for the finished cache of `info` at `url`; size_bytes: of its shards."""
    shape, counts = info.shape, info.counts
    is_patches = info.format == PATCHES
    backbone = info.backbone.get("name", "unknown")
    axes = (shape.num_frames, *((shape.num_tokens,) if is_patches else ()), shape.hidden_size)
    without = (
        "each shard is a Zarr v3 group in an uncompressed zip: `zarr.open_group("
        'zarr.storage.ZipStore("000000.zarr.zip", mode="r"))`.'
        if is_patches
        else "each shard is a WebDataset tar of NumPy arrays."
    )
    facts = {
        "windows": f"{counts.get('windows', 0):,} of {shape.num_frames} frames",
        "clips": f"{counts.get('clips', 0):,}, {counts.get('quarantined', 0):,} without windows",
        "backbone": backbone,
        "fingerprint": f"`{info.fingerprint}`",
        "size": size_text(size_bytes),
    }
    name = "Patch tokens" if is_patches else "Delta tokens"
    return _CARD.format(
        license_name="dinov3-license" if "dinov3" in str(backbone).lower() else "see-notice",
        title=f"{name} of {backbone}",
        counts=f"{name} of {counts.get('windows', 0):,} video windows, one folder of shards",
        licence=info.licence or "not stated in cache.json",
        reader="PatchShards" if is_patches else "DeltaShards",
        url=url,
        shape=f"{'float32' if is_patches else 'float16'} (1, {', '.join(map(str, axes))})",
        without=without,
        facts="\n".join(f"| {key} | {value} |" for key, value in facts.items()),
    ).encode()
