"""Whatever stands in a cache's JSON files, readers give data or one of our errors.

Every value in every file is replaced by, in turn, every kind of wrong value (one half of the kinds
in the tests marked slow).
"""

import copy
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deltatok.shards import (
    CacheMismatch,
    DamagedShard,
    DeltaShards,
    PatchShards,
    UsageError,
)
from deltatok.shards.cache import reopen_cache
from deltatok.shards.plan import Plan
from deltatok.shards.tools.info import describe_cache
from deltatok.shards.tools.verify import verify_cache

WRONG: list[Any] = [
    None,
    True,
    -1,
    0,
    7,
    2**70,
    1.5,
    "",
    "x",
    "../x",
    "\udc80",
    [],
    [[]],
    [None],
    {},
]
OURS = (CacheMismatch, DamagedShard, UsageError)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value within a JSON value, its own first."""
    yield path
    if isinstance(value, dict | list):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(item, (*path, name))


def replaced(value: Any, path: tuple[Any, ...], wrong: Any) -> Any:
    if not path:
        return wrong
    result = copy.copy(value)
    result[path[0]] = replaced(value[path[0]], path[1:], wrong)
    return result


def without(value: Any, path: tuple[Any, ...]) -> Any:
    result = copy.copy(value)
    if len(path) == 1:
        del result[path[0]]
    else:
        result[path[0]] = without(value[path[0]], path[1:])
    return result


def variants(value: Any, kinds: list[Any]) -> Iterator[Any]:
    for path in places(value):
        if path:
            yield without(value, path)
        for wrong in kinds:
            yield replaced(value, path, wrong)


def read_everything(folder: Path, reader: type[PatchShards] | type[DeltaShards]) -> None:
    opened = reader(folder, allow_incomplete=True)
    windows = np.arange(len(opened))
    opened.tokens(windows)
    opened.timestamps_s(windows)
    assert len(opened.clip_index) == len(opened)
    assert set(opened.clip_index.tolist()) <= set(range(len(opened.keys)))
    if isinstance(opened, PatchShards):
        assert opened.black.shape == opened.shape[1:]
    elif len(opened):
        opened.window(0)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("patches", "cache.json"),
        ("patches", "shards/000000.json"),
        ("patches", "shards/000000.zarr.zip/zarr.json"),
        ("patches", "shards/000000.zarr.zip/tokens/zarr.json"),
        ("patches", "shards/000000.zarr.zip/flipped/zarr.json"),
        ("deltas", "cache.json"),
        ("deltas", "shards/000000.json"),
    ],
)
@pytest.mark.parametrize("kinds", [WRONG[::2], pytest.param(WRONG[1::2], marks=pytest.mark.slow)])
def test_made_up_json_gives_data_or_our_errors(
    request: pytest.FixtureRequest, kind: str, name: str, kinds: list[Any]
) -> None:
    cache = request.getfixturevalue(kind)
    folder = cache.folder
    if name == "shards/000000.json":
        reopen_cache(folder)  # else no reader reads it
    value = json.loads(cache.read(name))
    for key in ("backbone", "preprocessing", "software", "other_decoders"):
        for inner in (value, value.get("identity", {})):
            if isinstance(inner, dict) and key in inner:
                inner[key] = {}  # their contents are nobody's business but describe_cache's
    if "files" in value:
        value["files"] = dict(list(value["files"].items())[:3])
    refused = 0
    for variant in variants(value, kinds):
        cache.write(name, json.dumps(variant).encode())
        if ".zarr" in name:
            cache.reseal()
        try:
            read_everything(folder, PatchShards if kind == "patches" else DeltaShards)
        except OURS:
            refused += 1
        if name in ("cache.json", "shards/000000.json"):
            with suppress(*OURS):
                describe_cache(folder)
    assert refused > 50


def test_a_made_up_plan_gives_a_plan_or_our_errors(patches: Any, edit_plan: Any) -> None:
    path = patches.folder / "plan.json"
    original = path.read_text()
    for variant in variants(json.loads(original), WRONG):
        path.write_text(json.dumps(variant))
        with suppress(*OURS):
            assert all(isinstance(entry.key, str) for entry in Plan.open(patches.folder))
    path.write_text(original)
    (part,) = (patches.folder / "plan").iterdir()
    value = [json.loads(line) for line in part.read_text().splitlines()]
    for variant in variants(value, WRONG):
        made_up = variant if isinstance(variant, list) else [variant]

        def edit(lines: list[Any], made_up: list[Any] = made_up) -> None:
            lines[:] = made_up

        edit_plan(patches.folder, edit)
        with suppress(*OURS):
            assert all(isinstance(entry.key, str) for entry in Plan.open(patches.folder))


@pytest.mark.parametrize("name", ["shards/000000.json", "plan.json", "quarantine.jsonl"])
def test_verify_reports_made_up_json_and_goes_on(patches: Any, name: str) -> None:
    path = patches.folder / name
    original = path.read_text()
    for text in ("", "{", "[]", "{}", "null", "\x00", '{"shard": 0}', "[" * 100_000):
        path.write_text(text)
        if text != original:
            assert verify_cache(patches.folder, deep=True).problems, text
