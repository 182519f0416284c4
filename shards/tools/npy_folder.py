"""export_npy: windows of finished caches as plain npy files, for tools that know nothing else.

    OUT/tokens.npy         (W, T, N, D) patch tokens or (W, T, D) delta tokens, to be memory-mapped
    OUT/timestamps.npy     float32 (W, T), seconds
    OUT/windows.jsonl      one object a window: clip, label, split, frames, crop, flipped
    OUT/black.npy          patch tokens: float32 (N, D), the tokens of a black frame
    OUT/token_scale.npy, channel_scale.npy    int8 codes only
    OUT/source.json        cache.json of the (first) cache, with `exported_from`
    OUT/README.txt         what is what, and the licence

The folder appears whole, or not at all.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cache import BLACK, CHANNEL_SCALE
from ..errors import DeltatokError, UsageError
from ..files import check_free, partial_path, publish, remove, remove_partials, write_json
from ..npy import npy_bytes
from ..patches.layout import STORED_DTYPES
from ..patches.reader import PatchShards
from .export import SPARE
from .export_plan import Reader, Selection, Source, exported_from, open_sources, select_clips
from .npy_readme import readme

CHUNK_BYTES = 64 * 2**20
"""Of tokens, copied at once (a guess)."""

VALUE_DTYPES: dict[str, np.dtype[Any]] = {"float16": np.dtype("<f2"), "float32": np.dtype("<f4")}
"""What tokens can be converted to; without a dtype they are as stored."""


def export_npy(
    folders: Sequence[Path | str],
    out: Path | str,
    *,
    selection: Selection | None = None,
    dtype: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Writes the selected clips of the caches `folders` into the new folder `out`; gives W.

    Windows come cache by cache in the order of their numbers. dtype: None, as stored (bfloat16 as
    its bits in uint16, int8 as codes with scales), or one of VALUE_DTYPES. progress(done, all)
    counts windows. Raises as `export_cache`; UsageError if there is something at `out`.
    """
    out, selection = Path(out), selection or Selection()
    if dtype is not None and dtype not in VALUE_DTYPES:
        raise UsageError(f"dtype {dtype!r}, npy folders hold {', '.join(VALUE_DTYPES)}")
    if out.is_dir() and not any(out.iterdir()):
        out.rmdir()
    if out.exists():
        raise UsageError(f"{out}: is there already: give a new folder, or remove it")
    sources = open_sources(folders)
    clips = select_clips(sources, selection)
    windows = [_windows(source, clips) for source in sources]
    count = sum(map(len, windows))
    if not count:
        raise UsageError(f"{out}: the clips asked for have no windows: all are in quarantine")
    shape = (count, *sources[0].reader.shape)
    stored = _stored_dtype(sources[0].reader)
    tokens_dtype = stored if dtype is None else VALUE_DTYPES[dtype]
    check_free(out, int(math.prod(shape) * tokens_dtype.itemsize * SPARE), what="the export")
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    remove_partials(out.absolute().parent, prefix=f"{out.name}.partial-")
    partial = partial_path(out)
    try:
        partial.mkdir()
        pairs = list(zip(sources, windows, strict=True))
        _write_tokens(partial, pairs, shape, tokens_dtype, progress)
        _write_columns(partial, pairs, with_scales=tokens_dtype == np.int8)
        source_info = exported_from(sources, selection, clips)
        info = sources[0].reader.info
        write_json(
            partial / "source.json",
            {
                "format": info.format,
                "fingerprint": info.fingerprint,
                "identity": info.identity,
                "shape": asdict(info.shape),
                "backbone": info.backbone,
                "licence": info.licence,
                "exported_from": source_info,
            },
        )
        text = readme(info, shape=shape, dtype=tokens_dtype, converted=dtype is not None)
        (partial / "README.txt").write_text(text, encoding="utf-8")
        publish(partial, out)
    except OSError as error:
        raise DeltatokError(f"{out}: cannot be written ({error.strerror or error})") from error
    finally:
        remove(partial)
    return count


def _windows(source: Source, clips: Mapping[str, Source]) -> NDArray[np.int64]:
    """The windows of a cache that are taken, ascending."""
    own = [source.windows_of(key) for key, other in clips.items() if other is source]
    return np.sort(np.concatenate([np.empty(0, dtype=np.int64), *own]))


def _stored_dtype(reader: Reader) -> np.dtype[Any]:
    return STORED_DTYPES[reader.dtype if isinstance(reader, PatchShards) else "float16"]


def _write_tokens(
    folder: Path,
    pairs: Sequence[tuple[Source, NDArray[np.int64]]],
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    progress: Callable[[int, int], None] | None,
) -> None:
    target = np.lib.format.open_memmap(
        folder / "tokens.npy", mode="w+", dtype=dtype, shape=shape, version=(1, 0)
    )
    as_stored = dtype == _stored_dtype(pairs[0][0].reader)
    done = 0
    for reader, windows in _chunks(pairs, max(1, CHUNK_BYTES // (math.prod(shape[1:]) * 4))):
        part = target[done : done + len(windows)]
        if isinstance(reader, PatchShards) and as_stored:
            reader.stored_tokens(windows, out=part)
        else:
            _convert(reader.tokens(windows), part, reader, windows)
        done += len(windows)
        if progress is not None:
            progress(done, shape[0])
    target.flush()


def _convert(
    values: NDArray[Any], out: NDArray[Any], reader: Reader, windows: NDArray[np.int64]
) -> None:
    with np.errstate(over="ignore"):
        out[...] = values
    lost = ~np.isfinite(out)
    if lost.any():
        window = int(windows[np.flatnonzero(lost.reshape(len(windows), -1).any(axis=1))[0]])
        raise DeltatokError(
            f"clip {reader.window(window)['clip']!r}: {np.count_nonzero(lost)} values are beyond "
            f"the range of {out.dtype}: export float32, or as stored"
        )


def _write_columns(
    folder: Path, pairs: Sequence[tuple[Source, NDArray[np.int64]]], *, with_scales: bool
) -> None:
    """Everything but the tokens."""
    times = np.concatenate([source.reader.timestamps_s(windows) for source, windows in pairs])
    (folder / "timestamps.npy").write_bytes(npy_bytes(times.astype("<f4")))
    with (folder / "windows.jsonl").open("w", encoding="utf-8") as file:
        for source, windows in pairs:
            table, keys = source.reader.table(), source.reader.keys
            for window in windows.tolist():
                entry = source.plan[keys[int(table.clip[window])]]
                line = {
                    "clip": entry.key,
                    "label": entry.label,
                    "split": entry.split,
                    "frames": table.frame_index[window].tolist(),
                    "crop": table.crop[window].tolist(),
                    "flipped": bool(table.flipped[window]),
                }
                file.write(f"{json.dumps(line)}\n")
    first = pairs[0][0].reader
    if isinstance(first, PatchShards):
        (folder / BLACK).write_bytes(npy_bytes(first.black))
    if isinstance(first, PatchShards) and with_scales:
        (folder / CHANNEL_SCALE).write_bytes(npy_bytes(first.channel_scale))
        scales = [
            source.reader.token_scale(windows)
            for source, windows in pairs
            if isinstance(source.reader, PatchShards)
        ]
        (folder / "token_scale.npy").write_bytes(npy_bytes(np.concatenate(scales)))


def _chunks(
    pairs: Sequence[tuple[Source, NDArray[np.int64]]], size: int
) -> Iterator[tuple[Reader, NDArray[np.int64]]]:
    for source, windows in pairs:
        for start in range(0, len(windows), size):
            yield source.reader, windows[start : start + size]
