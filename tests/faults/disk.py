"""What a disk may hold after a power loss: a run's writes, replayed up to a point, then forgotten.

    writes = read_log(log, top)                what record_writes.c recorded below `top`
    disk = Disk(tree, inodes)                  as it was before the run, all of it safe
    for write in writes:
        disk.apply(write)
        for state in disk.states(): ...        every tree that could be found after the plug is out

Safe is only what was flushed: a file's bytes by fsync of the file, a folder's names by fsync of the
folder. Of the rest anything may be there, in any order, so a state takes, of the names that were
given and taken since a folder's flush,

    all, none, all but one, or one alone,

and of the bytes that were written since a file's flush

    all, none (an empty file where there was none), zeros in their place, or the first half of them.

Harder than journals are on real disks, which keep the order of renames; a rename within a folder is
one step here as it is there. Only regular files and folders.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import product
from pathlib import Path, PurePosixPath
from typing import Literal

_HEAD = struct.Struct("<IIIQQQ")


class Operation(IntEnum):
    """As record_writes.c numbers them."""

    CREATE = 1
    TRUNCATE = 2
    WRITE = 3
    RENAME = 4
    LINK = 5
    SYMLINK = 6
    REMOVE = 7
    MKDIR = 8
    SYNC = 9
    SYNC_ALL = 10


@dataclass(frozen=True)
class Write:
    """One record of the log."""

    operation: Operation
    path: str
    """Below the folder; of a file that is written or flushed, its name at that moment."""
    other: str
    """Of RENAME and LINK the new name."""
    inode: int
    """Of the file or folder."""
    offset: int
    """Of WRITE; of TRUNCATE the new size."""
    data: bytes

    @property
    def is_flush(self) -> bool:
        """Of a file, a folder, or everything."""
        return self.operation in (Operation.SYNC, Operation.SYNC_ALL)

    @property
    def is_into_file(self) -> bool:
        """Whether it gives and takes no name."""
        return self.operation in (Operation.WRITE, Operation.TRUNCATE, Operation.SYNC)

    def words(self) -> str:
        """For messages."""
        return " ".join(part for part in (self.operation.name, self.path, self.other) if part)


def read_log(file: Path, top: Path) -> list[Write]:
    """The records of a log of what was written below `top`, in order."""
    data, at, writes = file.read_bytes(), 0, []
    while at < len(data):
        number, path, other, inode, offset, size = _HEAD.unpack_from(data, at)
        parts = []
        at += _HEAD.size
        for length in (path, other, size if number == Operation.WRITE else 0):
            parts.append(data[at : at + length])
            at += length
        names = [_below(part.decode(), top) for part in parts[:2]]
        writes.append(Write(Operation(number), *names, inode, offset, parts[2]))
    return writes


def _below(path: str, top: Path) -> str:
    return str(PurePosixPath(path).relative_to(top)) if path else ""


@dataclass(eq=False)
class File:
    """A file's bytes: all of them, those that are safe, and what was written since."""

    data: bytearray = field(default_factory=bytearray)
    safe: bytes = b""
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)
    """(offset, bytes), or (size, None) where it was cut or emptied."""
    _found: dict[str, bytes] = field(default_factory=dict)

    def write(self, offset: int, data: bytes | None) -> None:
        """Into the bytes that a reader sees now."""
        _put(self.data, offset, data)
        self.pending.append((offset, data))
        self._found.clear()

    def flush(self) -> None:
        self.safe = bytes(self.data)
        self.pending.clear()
        self._found = dict.fromkeys(KEPT, self.safe)

    def found(self, kept: "Kept") -> bytes:
        """What may be found of it; the same object until it changes."""
        if kept not in self._found:
            self._found[kept] = self._make(kept)
        return self._found[kept]

    def _make(self, kept: "Kept") -> bytes:
        if kept == "all":
            return bytes(self.data)
        if kept == "none":
            return self.safe
        data = bytearray(self.safe)
        left = sum(len(part) for _, part in self.pending if part is not None) // 2
        left = left if kept == "half" else 0
        for offset, part in self.pending:
            if part is None:
                _put(data, offset, None)
            else:
                _put(data, offset, part[:left] + bytes(len(part[left:])))
                left -= min(left, len(part))
        return bytes(data)


Kept = Literal["all", "none", "zeros", "half"]
KEPT: tuple[Kept, ...] = ("all", "none", "zeros", "half")


def _put(data: bytearray, offset: int, part: bytes | None) -> None:
    """`part` into `data` at `offset`; None: cuts it there."""
    data.extend(bytes(max(0, offset - len(data))))
    if part is None:
        del data[offset:]
    else:
        data[offset : offset + len(part)] = part


Names = dict[str, "File | Folder"]


@dataclass(frozen=True, eq=False)
class Change:
    """A name taken (`gone`), given (`name`), or both at once."""

    gone: str | None = None
    name: str | None = None
    node: "File | Folder | None" = None

    def apply(self, names: Names) -> None:
        if self.gone is not None:
            names.pop(self.gone, None)
        if self.name is not None and self.node is not None:
            names[self.name] = self.node


@dataclass(eq=False)
class Folder:
    """A folder's names: all of them, those that are safe, and what changed since."""

    names: Names = field(default_factory=dict)
    safe: Names = field(default_factory=dict)
    pending: list[Change] = field(default_factory=list)

    def change(self, change: Change) -> None:
        change.apply(self.names)
        self.pending.append(change)

    def flush(self) -> None:
        self.safe = dict(self.names)
        self.pending.clear()

    def found(self, which: "Which") -> Names:
        """The names that may be found; `which`: of the pending changes."""
        kept, number = which
        names = dict(self.safe)
        for index, change in enumerate(self.pending):
            if kept == "all" or (kept != "none" and (index == number) == (kept == "one")):
                change.apply(names)
        return names


Which = tuple[Literal["all", "none", "one", "but one"], int]
"""Which changes of names are kept; of "one" and "but one" its number in each folder."""

Tree = dict[str, bytes | None]
"""Path relative to the top -> bytes of a file, None for a folder."""


class Disk:
    """A folder while a log is replayed."""

    def __init__(self, tree: Tree, inodes: dict[str, int]) -> None:
        """tree: what is there before, all of it safe. inodes: of all its paths, and of "." itself,
        as the log knows them."""
        self.root = Folder()
        self._nodes: dict[int, File | Folder] = {inodes["."]: self.root}
        for path, data in sorted(tree.items()):
            node = Folder() if data is None else File(bytearray(data))
            node.flush()
            parent, name = self._parent(path)
            parent.change(Change(name=name, node=node))
            parent.flush()
            self._nodes[inodes[path]] = node

    def apply(self, write: Write) -> None:
        """The next record."""
        match write.operation:
            case Operation.CREATE | Operation.MKDIR:
                made = File() if write.operation == Operation.CREATE else Folder()
                self._nodes[write.inode] = made
                parent, name = self._parent(write.path)
                parent.change(Change(name=name, node=made))
            case Operation.WRITE | Operation.TRUNCATE:
                file = self._nodes[write.inode]
                assert isinstance(file, File)
                file.write(write.offset, write.data if write.operation == Operation.WRITE else None)
            case Operation.REMOVE:
                parent, name = self._parent(write.path)
                parent.change(Change(gone=name))
            case Operation.LINK:
                parent, name = self._parent(write.other)
                parent.change(Change(name=name, node=self._at(write.path)))
            case Operation.RENAME:
                assert write.inode == 0, "flags of renameat2"
                node, (old, gone) = self._at(write.path), self._parent(write.path)
                new, name = self._parent(write.other)
                if new is old:
                    old.change(Change(gone=gone, name=name, node=node))
                else:
                    new.change(Change(name=name, node=node))
                    old.change(Change(gone=gone))
            case Operation.SYNC:
                self._nodes[write.inode].flush()
            case Operation.SYNC_ALL:
                for node in self._nodes.values():
                    node.flush()
            case Operation.SYMLINK:
                raise NotImplementedError(f"{write.path}: a link in a cache")

    def flushed_below(self, path: str) -> list[str]:
        """The JSON files of a folder whose names were flushed, and not taken since."""
        try:
            folder = self._at(path)
        except KeyError:
            return []
        assert isinstance(folder, Folder)
        names = folder.safe.keys() & folder.names.keys()
        return [f"{path}/{name}" for name in sorted(names) if name.endswith(".json")]

    def tree(self) -> Tree:
        """What a reader sees now."""
        return _tree(self.root, ("all", 0), "all")

    def states(self) -> Iterator[tuple[str, Tree]]:
        """What may be found if the power fails now, each with words for it; some twice."""
        most = max((len(folder.pending) for folder in _folders(self.root)), default=0)
        which: list[Which] = [("all", 0), ("none", 0)]
        which += [(how, number) for number in range(most) for how in ("one", "but one")]  # type: ignore[misc]
        for names, data in product(which, KEPT):
            number = f" {names[1]}" if names[0] in ("one", "but one") else ""
            yield f"names: {names[0]}{number}, data: {data}", _tree(self.root, names, data)

    def _at(self, path: str) -> File | Folder:
        node: File | Folder = self.root
        for name in PurePosixPath(path).parts:
            assert isinstance(node, Folder)
            node = node.names[name]
        return node

    def _parent(self, path: str) -> tuple[Folder, str]:
        parent = self._at(str(PurePosixPath(path).parent))
        assert isinstance(parent, Folder)
        return parent, PurePosixPath(path).name


def _folders(folder: Folder) -> Iterator[Folder]:
    yield folder
    for child in {*folder.names.values(), *folder.safe.values()}:
        if isinstance(child, Folder):
            yield from _folders(child)


def _tree(folder: Folder, which: Which, kept: Kept, *, under: str = "") -> Tree:
    tree: Tree = {}
    for name, node in folder.found(which).items():
        path = f"{under}{name}"
        if isinstance(node, File):
            tree[path] = node.found(kept)
        else:
            tree[path] = None
            tree |= _tree(node, which, kept, under=f"{path}/")
    return tree


def put_tree(tree: Tree, folder: Path) -> None:
    """Makes the new folder `folder` hold `tree`."""
    folder.mkdir(parents=True)
    for name, data in sorted(tree.items()):
        if data is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(data)


def get_tree(folder: Path) -> Tree:
    """What `folder` holds."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def get_inodes(folder: Path) -> dict[str, int]:
    """Path below `folder` -> its inode; "." is the folder."""
    paths = (folder, *folder.rglob("*"))
    return {path.relative_to(folder).as_posix(): path.stat().st_ino for path in paths}
