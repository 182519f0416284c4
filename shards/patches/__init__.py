"""Patch-token shards: Zarr v3 arrays, a chunk a frame."""
