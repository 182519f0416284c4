"""pca.npy: how wide features became the stored tokens: standardised, onto principal components.

    float32 (2 + D, F)     row 0 the mean, row 1 the standard deviation, then D unit components
    token = ((feature - mean) / deviation) @ components.T               in float32
    feature ~ token @ components * deviation + mean

A reader of tokens needs none of it: it is for who makes tokens of new frames, or wants features
back. F channels of the backbone's features, D of the stored tokens. Fitted once, before cache.json,
which names its hash; its rule is that of DINO-Foresight (standardised, not whitened).
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cache import PCA, CacheInfo, pca_of, read_cache_info
from ..errors import CacheMismatch, DamagedShard, DeltatokError, UsageError
from ..files import create_bytes, write_bytes
from ..npy import npy_bytes, read_npy
from ..schema import read_file, shown
from ..stores.upload import top_changed

MAX_BYTES = 2**30
"""Of pca.npy: 8,000 components of 32,000 channels, beyond any (a guess)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Projection:
    """Features (..., F) -> tokens (..., D), and back as far as they can be."""

    mean: NDArray[np.float32]
    """(F,)"""
    deviation: NDArray[np.float32]
    """(F,), above 0."""
    components: NDArray[np.float32]
    """(D, F), orthonormal rows, the one of most variance first."""

    @property
    def width(self) -> int:
        """F."""
        return len(self.mean)

    def project(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """float32 (..., F) -> (..., D)."""
        standardised = np.divide(features - self.mean, self.deviation, dtype=np.float32)
        tokens: NDArray[np.float32] = standardised @ self.components.T
        return tokens

    def restore(self, tokens: NDArray[np.float32]) -> NDArray[np.float32]:
        """float32 (..., D) -> the features (..., F) nearest to those projected."""
        features: NDArray[np.float32] = tokens @ self.components * self.deviation + self.mean
        return features

    def identity(self) -> dict[str, Any]:
        """`backbone.pca` of the cache identity."""
        return {"components": len(self.components), "sha256": self._sha256()}

    def _sha256(self) -> str:
        return hashlib.sha256(self._rows().tobytes()).hexdigest()

    def _rows(self) -> NDArray[np.float32]:
        rows = np.concatenate([self.mean[None], self.deviation[None], self.components])
        return np.ascontiguousarray(rows, dtype="<f4")


def fit_projection(
    mean: NDArray[np.float64], covariance: NDArray[np.float64], *, num_components: int
) -> Projection:
    """The first principal components of features of this mean (F,) and covariance (F, F), each
    channel divided by its standard deviation first; a channel that never moved is left at 0.

    The largest entry of a component is positive. Raises DeltatokError unless all are finite.
    """
    variance = np.diag(covariance)
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise DeltatokError(
            "the features that --pca is fitted on are not finite: run the backbone in float32"
        )
    deviation = np.sqrt(np.where(variance > 0, variance, 1.0))
    _, vectors = np.linalg.eigh(covariance / np.outer(deviation, deviation))
    components = vectors.T[::-1][:num_components]
    largest = np.take_along_axis(components, np.abs(components).argmax(1)[:, None], 1)
    components = components * np.where(largest < 0, -1.0, 1.0)
    return Projection(
        mean=mean.astype(np.float32),
        deviation=np.maximum(deviation, np.finfo(np.float32).tiny).astype(np.float32),
        components=np.ascontiguousarray(components, dtype=np.float32),
    )


def agree_on_projection(folder: Path, projection: Projection) -> Projection:
    """Writes pca.npy into a folder that has no cache.json yet, unless it is there; gives what is:
    of several processes that fitted at once all use that of the first."""
    create_bytes(folder / PCA, npy_bytes(projection._rows()))
    top_changed(folder, PCA)
    return read_agreed_projection(folder)


def write_projection(folder: Path, projection: Projection) -> None:
    """Writes pca.npy, for a copy beside models."""
    write_bytes(folder / PCA, npy_bytes(projection._rows()))


def read_agreed_projection(folder: Path) -> Projection:
    """That of a cache that is about to be begun; DamagedShard unless it can be one."""
    path = folder / PCA
    data = read_file(path, max_bytes=MAX_BYTES, advice="extract again, it is written first")
    rows = read_npy(data, dtype=np.dtype("<f4"), num_axes=2, where=str(path))
    if len(rows) < 3 or len(rows) - 2 > rows.shape[1] or not np.isfinite(rows).all():
        raise DamagedShard(
            f"{path}: a {rows.shape[0]} x {rows.shape[1]} array, wanted a mean, a deviation and at "
            "most as many components as channels, all finite: restore it, or delete it"
        )
    if not (rows[1] > 0).all():
        raise DamagedShard(f"{path}: row 1 must be above 0: restore it, or delete it")
    return Projection(mean=rows[0], deviation=rows[1], components=rows[2:])


def read_projection(folder: Path | str, info: CacheInfo | None = None) -> Projection:
    """That of the cache in `folder`; UsageError for a cache without one, DamagedShard unless it is
    the one that cache.json names."""
    folder = Path(folder)
    wanted = pca_of((info or read_cache_info(folder)).identity)
    if wanted is None:
        raise UsageError(f"{folder}: its tokens are no principal components: give another cache")
    if not (folder / PCA).is_file():
        raise UsageError(
            f"{folder}: has no {PCA}, which is beside the patch tokens: give the patch cache"
        )
    projection = read_agreed_projection(folder)
    check_projection(projection, wanted, where=str(folder / PCA))
    return projection


def check_projection(
    projection: Projection,
    wanted: Mapping[str, Any],
    *,
    where: str,
    error: type[DamagedShard] | type[CacheMismatch] = DamagedShard,
) -> None:
    """Raises `error` unless it is the one with the identity `wanted`."""
    got = projection.identity()
    if got != dict(wanted):
        raise error(
            f"{where}: {got['components']} components with SHA-256 {got['sha256']}, wanted "
            f"{shown(wanted.get('components'))} with {shown(wanted.get('sha256'))} (backbone.pca "
            "of cache.json): restore pca.npy from a copy, or extract again into another folder"
        )
