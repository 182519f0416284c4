"""Seeded damage to the files of a cache: bytes, numbers, JSON, tars, zips, npy headers, indices.

    mutate(files, rng) -> names of the files that were changed

`files` maps a path in the cache to its bytes. `reseal` then makes done-records, index and
cache.json agree with what was changed, as a forger would, so that the layers below the hashes are
met too.
"""

import copy
import hashlib
import io
import json
import random
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

import google_crc32c

from deltatok.shards.cache import checksum, fingerprint
from deltatok.shards.index import index_header
from deltatok.shards.patches.archive import write_archive
from deltatok.shards.records import done_bytes

Files = dict[str, bytes]
NUMBERS = [0, 1, -1, 2, 7, 255, 65536, 2**31 - 1, 2**31, 2**53, 2**63, 2**64, 10**30, -(2**63)]
VALUES: list[Any] = [
    *NUMBERS,
    *(None, True, False, 1.5, -0.0, 1e308, "", "x", "../x", "/etc/passwd", "a\0b", "\ud800", "é"),
    *([], {}, [[]], [{}], {"": None}, [0] * 100, "x" * 10_000),
    *("numcodecs.pickle", "bytes", "zstd", "float64", "object", "default", "end", "start"),
]
RAW_JSON = [b"NaN", b"1e999", b"-Infinity", b"[" * 3000, b"1" * 5000, b'{"a":' * 3000]
RAW_JSON += [b'"\\ud800"', b"[" * 500 + b"]" * 500, b"[" * 950 + b"]" * 950]
WORDS = [
    b"",
    b"\0",
    b"\xff",
    b"\xff\xff\xff\xff",
    b"\0" * 512,
    b"../",
    b"/",
    b"ustar",
    b"\x93NUMPY",
]


def mutate(files: Files, rng: random.Random) -> set[str]:
    """Changes one to three things in `files`."""
    changed = set()
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        name = rng.choice(sorted(files))
        if name.endswith(".tar") and rng.random() < 0.6:
            change: Any = rng.choice((_tar_header, _tar_header, _npy_header, _windows_json))
        elif name.endswith(".zip") and rng.random() < 0.8:
            change = rng.choice((_zip_member, _zip_member, _zip_member, _zip_field))
        elif name.endswith((".json", ".jsonl")) and rng.random() < 0.75:
            change = rng.choice((_json_value, _json_value, _json_raw))
        elif name.endswith(".npy") and rng.random() < 0.5:
            change = _npy_header
        else:
            change = rng.choice((_flip, _overwrite, _cut, _insert, _digits, _swap))
        data = _swap(files, name, rng) if change is _swap else change(files[name], rng)
        if data != files[name]:
            files[name] = data
            changed.add(name)
    return changed


def reseal(files: Files, changed: set[str], rng: random.Random) -> set[str]:
    """Makes what promises the changed files agree with them; gives all changed names."""
    changed = set(changed)
    for name in changed:
        if name.endswith(".zip"):
            files[name] = _true_crcs(files[name])
    for name in sorted(files):
        if re.fullmatch(r"shards/[0-9]{6}\.json", name):
            record = _parsed(files[name])
            data = [name.replace(".json", suffix) for suffix in (".zarr.zip", ".tar")]
            for file in changed.intersection(data) if isinstance(record, dict) else ():
                record["file"] = _entry(files[file])
                try:
                    files[name] = done_bytes(record)
                except (TypeError, ValueError, RecursionError):
                    return changed
                changed.add(name)
    if "index.jsonl" in files and any(re.fullmatch(r"shards/[0-9]{6}\.json", n) for n in changed):
        files["index.jsonl"] = _index(files)
        changed.add("index.jsonl")
    info = _parsed(files["cache.json"])
    if isinstance(info, dict):
        if isinstance(info.get("files"), dict):
            for name in changed & info["files"].keys():
                info["files"][name] = _entry(files[name])
        if "cache.json" in changed and rng.random() < 0.8:
            try:
                args = info["format"], info["format_version"], info["identity"]
                info["fingerprint"] = fingerprint(*args)
            except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
                return changed
        try:
            files["cache.json"] = _dumped({**info, "checksum": checksum(info)})
        except (TypeError, ValueError, RecursionError):
            return changed
        changed.add("cache.json")
    return changed


def _entry(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _index(files: Files) -> bytes:
    lines = [index_header().rstrip(b"\n")]
    for name in sorted(files):
        record = _parsed(files[name]) if re.fullmatch(r"shards/[0-9]{6}\.json", name) else None
        if isinstance(record, dict):
            file = record.get("file") if isinstance(record.get("file"), dict) else {}
            told = [file.get("bytes", 0), file.get("sha256"), record.get("keys_sha256")]
            lines.append(_dumped([record.get("clips"), record.get("rows"), *told]))
    return b"\n".join(line.replace(b"\n", b" ") for line in lines) + b"\n"


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _dumped(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def _flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 4, 32))):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _overwrite(data: bytes, rng: random.Random) -> bytes:
    at, word = rng.randrange(len(data) + 1), rng.choice([*WORDS, rng.randbytes(8)])
    return data[:at] + word + data[at + len(word) :]


def _cut(data: bytes, rng: random.Random) -> bytes:
    begin, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return rng.choice((data[:begin], data[begin:], data[:begin] + data[end:]))


def _insert(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    begin, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return data[:at] + rng.choice([*WORDS, data[begin:end]]) + data[at:]


def _digits(data: bytes, rng: random.Random) -> bytes:
    """Another number in the place of one in text."""
    found = list(re.finditer(rb"[0-9]+", data))
    if not found:
        return _flip(data, rng)
    match = rng.choice(found)
    return data[: match.start()] + str(rng.choice(NUMBERS)).encode() + data[match.end() :]


def _swap(files: Files, name: str, rng: random.Random) -> bytes:
    return files[rng.choice(sorted(files))]


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _places(item, (*path, key))


def _json_value(data: bytes, rng: random.Random) -> bytes:
    """Another value, no value, a value twice, or another key, somewhere in the JSON."""
    lines = data.splitlines()
    number = rng.randrange(len(lines)) if len(lines) > 1 and _parsed(data) is None else None
    value = _parsed(data if number is None else lines[number])
    if value is None:
        return _digits(data, rng)
    path = rng.choice(list(_places(value)))
    if not path:
        value = rng.choice(VALUES)
    else:
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        action = rng.randrange(5)
        if action == 0:
            del parent[path[-1]]
        elif action == 1 and isinstance(parent, list):
            parent.insert(path[-1], copy.deepcopy(rng.choice(parent)))
        elif action == 2 and isinstance(parent, dict):
            parent[rng.choice(("", "x", "../x", *parent))] = parent.pop(path[-1])
        else:
            parent[path[-1]] = copy.deepcopy(rng.choice(VALUES))
    made = json.dumps(value, allow_nan=True).encode()
    return made if number is None else b"\n".join([*lines[:number], made, *lines[number + 1 :]])


def _json_raw(data: bytes, rng: random.Random) -> bytes:
    """Text that is not what json.dumps writes: duplicate keys, deep nesting, NaN."""
    colons = [match.end() for match in re.finditer(rb": ?", data)]
    if not colons or rng.random() < 0.2:
        return rng.choice(RAW_JSON)
    at = rng.choice(colons)
    if rng.random() < 0.3:
        opening = data.find(b"{") + 1
        return data[:opening] + b'"rows": 1, "rows": 2, "shape": 3, ' + data[opening:]
    end = re.compile(rb"[,}\]\n]").search(data, at)
    return data[:at] + rng.choice(RAW_JSON) + (data[end.start() :] if end else b"")


def _tar_header(data: bytes, rng: random.Random) -> bytes:
    """A changed field in a header, its checksum mended."""
    headers = [match.start() - 257 for match in re.finditer(rb"ustar", data)]
    if not headers:
        return _flip(data, rng)
    at = rng.choice(headers)
    header = bytearray(data[at : at + 512].ljust(512, b"\0"))
    field, value = rng.choice(
        [
            (
                slice(0, 100),
                rng.choice((b"/etc/x", b"../x", b"000000.tokens.pkl", b"", b"\xff" * 100)),
            ),
            (slice(0, 100), b"%06d.tokens.npy" % rng.randrange(3)),
            (slice(124, 136), rng.choice((b"77777777777\0", b"0" * 12, b"\x80" + b"\xff" * 11))),
            (slice(124, 136), b"%011o\0" % rng.randrange(1 << rng.randrange(1, 33))),
            (slice(156, 157), rng.choice((b"1", b"2", b"3", b"5", b"6", b"L", b"S", b"g", b"x"))),
            (slice(157, 257), b"/etc/passwd"),
            (slice(345, 500), rng.choice((b"..", b"/", b"a/b"))),
            (slice(257, 265), rng.choice((b"ustar  \0", b"\0" * 8))),
        ]
    )
    header[field] = value.ljust(field.stop - field.start, b"\0")[: field.stop - field.start]
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:at] + bytes(header) + data[at + 512 :]


def _npy_header(data: bytes, rng: random.Random) -> bytes:
    found = list(re.finditer(rb"\x93NUMPY.{4}(\{[^\n]*\n)", data, re.DOTALL))
    if not found:
        return _flip(data, rng)
    match = rng.choice(found)
    header = match[1]
    old, new = rng.choice(
        [
            (rb"'<f[24]'", rng.choice((b"'|O'", b"'>f2'", b"'<f8'", b"'<f2'", b"'<f4'"))),
            (rb"False", b"True"),
            (rb"\([0-9, ]*\)", rng.choice((b"(99999999999, 3, 6)", b"(0, 3, 6)", b"()", b"(-1,)"))),
            (rb"[0-9]+(?=[,)])", str(rng.choice(NUMBERS)).encode()),
            (rb"\{", b"__import__('os').abort() or {"),
        ]
    )
    changed = re.sub(old, new, header.rstrip(b" \n"), count=1)[: len(header) - 1]
    return data[: match.start(1)] + changed.ljust(len(header) - 1) + b"\n" + data[match.end(1) :]


def _windows_json(data: bytes, rng: random.Random) -> bytes:
    """Other JSON of the same length in a tar, so that everything around it stays in place."""
    found = list(re.finditer(rb"\[\{\"clip\".*?\}\]", data, re.DOTALL))
    if not found:
        return _flip(data, rng)
    match = rng.choice(found)
    made = _json_value(match[0], rng)[: len(match[0])]
    return data[: match.start()] + made.ljust(len(match[0])) + data[match.end() :]


def _zip_entries(data: bytes) -> list[tuple[str, int, int]]:
    """Name, place of the header, and of the entry in the directory; none where that is damaged."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            found, at = [], archive.start_dir
            for info in archive.infolist():
                found.append((info.filename, info.header_offset, at))
                at += 46 + sum(struct.unpack_from("<3H", data, at + 28))
            return found
    except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError, OSError):
        return []


def _zip_place(data: bytes, header_at: int, entry_at: int) -> tuple[int, int]:
    """Where a member's data begins and ends."""
    begin = header_at + 30 + sum(struct.unpack_from("<2H", data, header_at + 26))
    return begin, begin + int(struct.unpack_from("<L", data, entry_at + 24)[0])


def _zip_member(data: bytes, rng: random.Random) -> bytes:
    """A changed member; its checksum in the zip is still the old one."""
    entries = _zip_entries(data)
    if not entries:
        return _flip(data, rng)
    members, crcs = {}, {}
    for name, header_at, entry_at in entries:
        begin, end = _zip_place(data, header_at, entry_at)
        members[name] = data[begin:end]
        crcs[name] = data[entry_at + 16 : entry_at + 20]
    name = rng.choice(sorted(members))
    if name.endswith(".json") and rng.random() < 0.75:
        change: Any = rng.choice((_json_value, _json_value, _json_raw))
    elif rng.random() < 0.6:
        change = _zarr_chunk
    else:
        change = rng.choice((_flip, _overwrite, _cut, _insert, _digits))
    members[name] = change(members[name], rng)
    if rng.random() < 0.1:
        members.pop(rng.choice(sorted(members)))
    file = io.BytesIO()
    write_archive(file, members.items(), last=sorted(members)[-1])
    return _with_crcs(file.getvalue(), crcs)


def _with_crcs(data: bytes, crcs: dict[str, bytes]) -> bytes:
    changed = bytearray(data)
    for name, header_at, entry_at in _zip_entries(data):
        changed[header_at + 14 : header_at + 18] = crcs[name]
        changed[entry_at + 16 : entry_at + 20] = crcs[name]
    return bytes(changed)


def _true_crcs(data: bytes) -> bytes:
    crcs = {}
    for name, header_at, entry_at in _zip_entries(data):
        try:
            begin, end = _zip_place(data, header_at, entry_at)
        except struct.error:
            return data
        crcs[name] = zlib.crc32(data[begin:end]).to_bytes(4, "little")
    return _with_crcs(data, crcs)


def _zip_field(data: bytes, rng: random.Random) -> bytes:
    """Another number in a header, the directory or its end; now and then in both headers."""
    changed = bytearray(data)
    entries = _zip_entries(data)
    if not entries:
        return _flip(data, rng)
    _, header_at, entry_at = rng.choice(entries)
    width = rng.choice((1, 2, 4))
    value = (rng.choice([*NUMBERS, len(data), header_at]) % 256**width).to_bytes(width, "little")
    at = rng.randrange(28)
    for start in rng.choice(((header_at + 2 + at,), (entry_at + at,), (len(data) - 22 + at,), ())):
        changed[start : start + width] = value
    if at < 22:  # the same field of both
        changed[header_at + 4 + at : header_at + 4 + at + width] = value
        changed[entry_at + 6 + at : entry_at + 6 + at + width] = value
    return bytes(changed[: len(data)])


def _zarr_chunk(data: bytes, rng: random.Random) -> bytes:
    """A changed piece before a crc32c that is mended: of the index, or of a whole small array."""
    if len(data) < 24:
        return _flip(data, rng)
    entries = rng.choice([count for count in (15, 18) if len(data) > count * 16 + 4] or [0])
    begin = len(data) - 4 - entries * 16 if entries and rng.random() < 0.7 else 0
    body = bytearray(data[begin:-4])
    for _ in range(rng.choice((1, 1, 3))):
        at = rng.randrange(0, max(1, len(body) - 8), 8) if begin else rng.randrange(len(body))
        number = rng.choice([*NUMBERS, len(data), begin, rng.randrange(len(data))]) % 2**64
        piece = number.to_bytes(8, "little") if begin else rng.randbytes(rng.choice((1, 2, 4)))
        body[at : at + len(piece)] = piece
    body = body[: len(data) - 4 - begin]
    crc = google_crc32c.value(bytes(body)).to_bytes(4, "little")
    return data[:begin] + bytes(body) + crc
