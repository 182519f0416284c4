"""What both readers are: a sequence of windows, with the clips they come from.

    reader[3], reader[-1]           tokens of one window
    reader[10:20], reader[[4, 2]]   tokens of several, as `tokens` gives them
    reader.select(splits="train")   numbers of windows, for `tokens` and all other columns

`PatchShards` and `DeltaShards` add what they store. Nothing is read before it is asked for; a
reader is pickled as its arguments, so that every process opens the cache for itself.
"""

import difflib
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .cache import CacheInfo, canonical_json
from .errors import UsageError
from .opening import OpenedCache, checked_windows
from .plan import PlanEntry, read_plan
from .windows import WindowColumns

Scalar = TypeVar("Scalar", bound=np.generic)
"""What `tokens` gives: float32 for patch tokens, float16 for delta tokens."""

MAX_NAMES_SHOWN = 5
"""Known labels or splits that an error lists."""


class CacheReader(ABC, Generic[Scalar]):
    """An opened cache of W windows, numbered through all shards in shard order."""

    def __init__(self, cache: OpenedCache) -> None:
        self._cache = cache

    @abstractmethod
    def tokens(self, windows: ArrayLike) -> NDArray[Scalar]:
        """The tokens of `windows` (B,), whole numbers from 0 to W - 1, in the order asked."""

    @property
    @abstractmethod
    def clip_index(self) -> NDArray[np.int64]:
        """int64 (W,): the clip of every window, index into `keys`; read on first use."""

    @abstractmethod
    def table(self) -> WindowColumns:
        """Everything but the tokens of all windows, read on first use."""

    @abstractmethod
    def window(self, index: int) -> dict[str, Any]:
        """What is known of one window, as plain values: `clip` (key), `frames` (T indices in
        presentation order), `crop` ([top, left, height, width], source pixels), `flipped`."""

    def __len__(self) -> int:
        return self.num_windows

    def __getitem__(self, index: Any) -> NDArray[Scalar]:
        """`tokens` of one window (T, ...) or, for a slice, a list or an array, of several
        (B, T, ...). As with arrays, negative numbers count from the end and a mask is bool (W,);
        IndexError for a window that is not there."""
        if isinstance(index, slice):
            return self.tokens(np.arange(*index.indices(self.num_windows)))
        numbers = np.asarray(index)
        if numbers.ndim == 0 and numbers.dtype.kind in "iu":
            tokens: NDArray[Scalar] = self.tokens(self._from_the_front(numbers[None]))[0]
            return tokens
        if numbers.dtype == np.bool_ and numbers.shape == (self.num_windows,):
            return self.tokens(np.flatnonzero(numbers))
        return self.tokens(self._from_the_front(numbers))

    @property
    def folder(self) -> Path:
        """The folder of the cache."""
        return self._cache.folder

    @property
    def info(self) -> CacheInfo:
        """The cache.json."""
        return self._cache.info

    @property
    def fingerprint(self) -> str:
        """What the cache is, see `CacheInfo.fingerprint`."""
        return self.info.fingerprint

    @property
    def num_windows(self) -> int:
        """W, the windows of all shards."""
        return self._cache.num_windows

    @property
    def shard_starts(self) -> NDArray[np.int64]:
        """int64 (shards + 1,): the first window of every shard that has any, and the end."""
        return self._cache.starts

    @cached_property
    def arrangement(self) -> str:
        """ "sha256:" + a hash of which clips lie in which shard: with the fingerprint, what decides
        the number of every window. An export of other shards, or an appended cache, has another."""
        ends = self._cache.starts[1:].tolist()
        text = canonical_json(list(zip(self._cache.shard_keys, ends, strict=True)))
        return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"

    @cached_property
    def keys(self) -> list[str]:
        """All clips that have windows; `clip_index` indexes into this list."""
        return self._cache.keys()

    @property
    def labels(self) -> list[str | None]:
        """The class of every clip in `keys`, where a list or an archive named one."""
        return [entry.label for entry in self._planned]

    @property
    def splits(self) -> list[str | None]:
        """The split of every clip in `keys`, where a list or an archive named one."""
        return [entry.split for entry in self._planned]

    @property
    def crop(self) -> NDArray[np.float32]:
        """float32 (W, 4): top, left, height, width in source pixels of every window."""
        return self.table().crop

    @property
    def flipped(self) -> NDArray[np.bool_]:
        """bool (W,): whether the window was mirrored."""
        return self.table().flipped

    def frame_index(self, windows: ArrayLike) -> NDArray[np.int32]:
        """int32 (B, T): index of the frames in presentation order."""
        return self.table().frame_index[checked_windows(windows, self.num_windows)]

    def select(
        self,
        *,
        clips: str | Iterable[str] | None = None,
        labels: str | Iterable[str] | None = None,
        splits: str | Iterable[str] | None = None,
    ) -> NDArray[np.int64]:
        """The numbers of the windows, int64 (n,) ascending, whose clip has one of these keys,
        labels and splits; what is None does not matter.

        A clip of the plan that has no windows (quarantined) selects none. Raises UsageError for a
        clip that is not in the plan, and for a label or split that no clip has.
        """
        chosen = np.ones(len(self.keys), dtype=np.bool_)
        where = str(self.folder)
        if clips is not None:
            planned = {entry.key for entry in read_plan(self.folder)}
            names = known_names(clips, planned, what="clip", where=where)
            chosen &= np.array([key in names for key in self.keys], dtype=np.bool_)
        for wanted, column, what in (
            (labels, self.labels if labels is not None else [], "label"),
            (splits, self.splits if splits is not None else [], "split"),
        ):
            if wanted is not None:
                names = known_names(wanted, set(filter(None, column)), what=what, where=where)
                chosen &= np.array([value in names for value in column], dtype=np.bool_)
        return np.flatnonzero(chosen[self.clip_index]).astype(np.int64)

    @cached_property
    def _planned(self) -> list[PlanEntry]:
        return self._cache.planned()

    def _from_the_front(self, numbers: NDArray[Any]) -> NDArray[Any]:
        if numbers.dtype.kind != "i":
            return numbers
        shifted = np.where(numbers < 0, numbers + self.num_windows, numbers)
        if (shifted < 0).any():
            raise IndexError(
                f"window {numbers.min()} asked for, the cache has {self.num_windows} windows"
            )
        return shifted


def known_names(
    wanted: str | Iterable[str], known: Collection[str], *, what: str, where: str
) -> set[str]:
    """`wanted` as a set; UsageError naming the first that is not among `known`, and its nearest."""
    names = {wanted} if isinstance(wanted, str) else set(wanted)
    unknown = sorted(names - set(known))
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1) or sorted(known)
        hint = ", ".join(map(repr, near[:MAX_NAMES_SHOWN])) or "none"
        raise UsageError(
            f"{where}: has no {what} {unknown[0]!r} ({len(unknown)} of {len(names)} "
            f"asked for); known {what}s: {hint}{', ...' if len(near) > MAX_NAMES_SHOWN else ''}"
        )
    return names
