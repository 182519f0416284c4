"""A clip as its plan names it -> what a decoder reads, with proof that it is still that clip.

Called by decoders.py inside a decoding process.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..shards.errors import UsageError
from .clips import FrameFolder, Source, Stamp, TargetFrames, TarMember, Unreadable, ZipFolder
from .found import list_frames
from .frames_decoder import FrameImages
from .packets import VideoFile, describe
from .slices import FileSlice
from .unusable import UnusableClip
from .zip_directory import BadZip
from .zip_frames import MAX_FRAME_BYTES, ZipImages
from .zip_parts import ZipParts


class FolderImages:
    """Image files below a folder, by name: its frames, or those named."""

    def __init__(self, folder: Path, names: Sequence[str] | None = None) -> None:
        """OSError where it cannot be read, or one of `names` is not there."""
        self._folder = folder
        if names is None:
            self._sizes = dict(list_frames(folder))
        else:
            self._sizes = {name: (folder / name).stat().st_size for name in names}

    @property
    def names(self) -> list[str]:
        return list(self._sizes)

    @property
    def size_bytes(self) -> int:
        """Of all together."""
        return sum(self._sizes.values())

    def read(self, name: str) -> bytes:
        if self._sizes[name] > MAX_FRAME_BYTES:
            raise UnusableClip(f"{name}: {self._sizes[name]} bytes, no frame", stage="decode")
        try:
            return (self._folder / name).read_bytes()
        except OSError as error:
            raise UnusableClip(f"{name}: {describe(error)}", stage="decode") from error


@contextmanager
def opened_clip(
    path: Path, source: Source | None, *, size_bytes: int | None = None
) -> Iterator[VideoFile | FrameImages]:
    """What to decode. Held against its size when it is opened and again when it is left.

    Raises:
        UnusableClip: it cannot be opened, or is not what it was when it was planned.
    """
    if isinstance(source, Unreadable):
        raise UnusableClip(source.reason, stage="open")
    try:
        if isinstance(source, ZipFolder):
            with ZipParts(path) as parts:
                _check_stamp(path, parts.stamp, source.stamp)
                images = ZipImages(parts, source)
                _check_size(images.size_bytes, size_bytes)
                yield images
        elif isinstance(source, FrameFolder):
            folder = FolderImages(path)
            _check_size(folder.size_bytes, size_bytes)
            yield folder
            _check_size(FolderImages(path).size_bytes, folder.size_bytes)
        elif isinstance(source, TargetFrames) and source.names:
            listed = FolderImages(path, source.names)
            _check_size(listed.size_bytes, size_bytes)
            yield listed
            _check_size(FolderImages(path, source.names).size_bytes, size_bytes)
        elif isinstance(source, TarMember):
            _check_stamp(path, _stamp(path), source.stamp)
            yield FileSlice(path, source.offset, size_bytes or 0)
            _check_stamp(path, _stamp(path), source.stamp)
        else:
            before = _stamp(path) if path.exists() else None
            if before is not None:
                _check_size(before[0], size_bytes)
            yield path
            if before is not None:
                _check_stamp(path, _stamp(path), before)
    except (OSError, BadZip, UsageError) as error:
        raise UnusableClip(f"cannot be opened: {describe(error)}", stage="open") from error


def _stamp(path: Path) -> Stamp:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _check_size(got: int, planned: int | None) -> None:
    if planned is not None and got != planned:
        raise UnusableClip(
            f"was changed: had {planned} bytes when it was found, now {got}", stage="open"
        )


def _check_stamp(path: Path, got: Stamp, wanted: Stamp) -> None:
    if got != wanted:
        size = f"had {wanted[0]} bytes, now {got[0]}" if got[0] != wanted[0] else "written to"
        raise UnusableClip(f"{path.name} was changed since it was opened: {size}", stage="open")
