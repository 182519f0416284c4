"""JSON made to exhaust a reader, or to mean two things: refused in every file of a cache."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from deltatok.shards import DeltatokError, PatchShards
from deltatok.shards.cache import reopen_cache
from deltatok.shards.schema import parse_json
from deltatok.shards.tools.info import describe_cache
from deltatok.shards.tools.verify import verify_cache

TOKENS = "shards/000000.zarr.zip/tokens/zarr.json"


def use(folder: Path) -> None:
    reader = PatchShards(folder, allow_incomplete=True)
    reader.tokens([0])
    reader.timestamps_s([0])
    _ = reader.labels


DEEP = "[" * 100_000 + "]" * 100_000
BAD_JSON = {
    "nested 100,000 deep": DEEP,
    "objects nested 100,000 deep": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "nested 900 deep": "[" * 900 + "]" * 900,
    "an integer of 5,000 digits": "1" * 5_000,
    "an integer of 100 digits": "1" * 100,
    "NaN": "NaN",
    "an infinity": "1e999",
    "half a character": '"\\ud800"',
    "three million lists": "[" + "[]," * 3_000_000 + "0]",
}


@pytest.mark.parametrize("text", BAD_JSON.values(), ids=BAD_JSON)
@pytest.mark.parametrize(
    "name",
    ["cache.json", "plan.json", "shards/000000.json", "shards/000000.zarr.zip/zarr.json", TOKENS],
)
def test_json_that_is_made_to_harm_is_refused_everywhere(
    patches: Any, name: str, text: str
) -> None:
    patches.write(name, f'{{"aaa": {text}, '.encode() + patches.read(name)[1:])
    if ".zarr" in name:
        patches.reseal()
    if name.startswith("shards/000000.json"):
        reopen_cache(patches.folder)  # else no reader reads it
    with pytest.raises(DeltatokError):
        use(patches.folder)
    with suppress(DeltatokError):
        assert verify_cache(patches.folder, deep=True).problems
    with suppress(DeltatokError):
        describe_cache(patches.folder)


@pytest.mark.parametrize("text", BAD_JSON.values(), ids=BAD_JSON)
def test_windows_json_that_is_made_to_harm_is_refused(text: str) -> None:
    with pytest.raises(DeltatokError, match=r"000000\.windows\.json: not valid JSON"):
        parse_json(text.encode(), where="x.tar: 000000.windows.json")


def test_a_key_twice_is_refused_as_two_readers_may_differ() -> None:
    with pytest.raises(DeltatokError, match="'rows' twice in one object"):
        parse_json(b'{"rows": 1, "shard": 0, "rows": 2}', where="x")
    many = b",".join(b'"k%d":0' % index for index in range(300_000))
    with pytest.raises(DeltatokError, match="twice"):
        parse_json(b"{" + many + b',"k299999":1}', where="x")


def test_characters_in_two_halves_are_fine() -> None:
    assert parse_json(b'"\\ud83d\\ude00"', where="x") == "\U0001f600"
