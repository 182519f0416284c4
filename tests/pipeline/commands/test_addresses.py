"""An address is taken where a cache is; anywhere else, or of an unknown scheme, it is refused."""

import argparse
import dataclasses
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from deltatok.evaluate import DeltaWorld, Futures
from deltatok.extract.backbone import find_folder
from deltatok.extract.sources.find import find_clips
from deltatok.pipeline import stages
from deltatok.pipeline.cli import Command, load_name
from deltatok.pipeline.commands import evaluate, extract, pipeline, shards, train
from deltatok.shards import DeltaShards, PatchShards, UsageError, read_cache_info
from deltatok.shards.cache import open_cache
from deltatok.shards.evaluation.labels import ClipLabels
from deltatok.shards.files import local_path
from deltatok.shards.tools.export import export_cache
from deltatok.shards.tools.verify import verify_cache
from deltatok.train.models.deltatok import DeltaTok

ADDRESS = "s3://bucket/cache"
UNKNOWN = "ftp://host/cache"
TABLES: dict[str, dict[str, Command]] = {
    "deltatok-extract": dict(extract.SOURCES),
    "deltatok-train": train.COMMANDS,
    "deltatok-evaluate": evaluate.COMMANDS,
    "deltatok-shards": shards.COMMANDS,
    "stage": stages.LITTLE_WORLD,
}


def _is_text(hint: Any) -> bool:
    return hint is str or any(map(_is_text, typing.get_args(hint)))


def _is_place(hint: Any) -> bool:
    """Whether a cache, or another thing at an address, may be given."""
    return typing.get_origin(hint) is typing.Annotated or any(map(_is_place, typing.get_args(hint)))


def _texts() -> list[Any]:
    """Every flag of every command that takes a text, and an address that it does not take: all
    paths are among them."""
    found = []
    for prog, commands in TABLES.items():
        for name, command in commands.items():
            config = load_name(command.config)
            hints = typing.get_type_hints(config, include_extras=True)
            for field in dataclasses.fields(config):
                hint = hints[field.name]
                if _is_text(hint) and typing.get_origin(hint) is not typing.Literal:
                    about = f"{prog} {name} {field.name}"
                    found.append(pytest.param(command, field.name, UNKNOWN, id=about))
                    if not _is_place(hint):
                        found.append(pytest.param(command, field.name, ADDRESS, id=f"{about} s3"))
    return found


def test_the_table_has_the_flags_that_are_known_to_be_paths() -> None:
    names = {parameter.values[1] for parameter in _texts()}
    assert {"out", "videos", "patches", "deltas", "tokenizer", "labels", "dir", "json"} <= names


def test_the_table_has_the_flags_that_are_known_to_be_caches() -> None:
    refused = {parameter.id for parameter in _texts() if parameter.values[2] == ADDRESS}
    for flag in (
        "deltatok-extract videos out",
        "deltatok-train tokenizer patches",
        "deltatok-train world deltas",
        "deltatok-evaluate forecast patches",
        "deltatok-shards info dir",
    ):
        assert f"{flag} s3" not in refused
        assert any(parameter.id == flag for parameter in _texts())


@pytest.mark.parametrize(("command", "name", "address"), _texts())
def test_no_flag_takes_an_address(command: Command, name: str, address: str) -> None:
    words = [] if command.positional in (None, name) else ["x"]
    words += [address] if command.positional == name else [f"--{name.replace('_', '-')}", address]
    with pytest.raises(UsageError, match=address):
        command.parse("command", words)


@pytest.mark.parametrize(("command", "name", "address"), _texts())
def test_no_config_file_takes_an_address(
    command: Command, name: str, address: str, tmp_path: Path
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({name: address}))
    with pytest.raises(UsageError, match=rf"{name}.*{address}"):
        command.parse("command", ["--config", str(file)])


def _flags_of_pipeline() -> list[Any]:
    [kinds] = [
        action
        for action in pipeline._parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    ]
    found = []
    for kind, parser in kinds.choices.items():
        actions = [
            action
            for action in parser._actions
            if action.nargs != 0 and action.choices is None and action.dest != "set"
        ]
        for action in actions:
            words = [kind]
            for other in actions:
                value = ADDRESS if other is action else "x"
                if other is action or other.required:
                    words += [*other.option_strings[:1], value]
            found.append(pytest.param(words, id=f"{kind} {action.dest}"))
    return found


@pytest.mark.parametrize("words", _flags_of_pipeline())
def test_deltatok_pipeline_takes_no_address(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert pipeline.main(words) == 2
    assert "bucket/cache: an address" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_address_in_a_stage_is_refused_before_any_stage_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    stage = {"name": "world", "command": "little-world", "settings": {"out": "${out}/world"}}
    late = {"name": "late", "command": "deltatok-extract", "settings": {"videos": [ADDRESS]}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"stages": [stage, late]}))
    assert pipeline.main(["run", "mine.yaml"]) == 2
    assert f"{ADDRESS}: an address" in capsys.readouterr().err
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"stages": [stage]}))
    assert pipeline.main(["run", "mine.yaml", "--set", f"world.out={ADDRESS}"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


def test_a_command_ends_with_2_and_makes_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "videos").mkdir()
    assert extract.main(["--videos", "videos", "--out", UNKNOWN]) == 2
    assert f"out: {UNKNOWN}: an address of ftp, wanted a path" in capsys.readouterr().err
    assert extract.main(["--config", ADDRESS]) == 2
    assert extract.main(["--videos", "videos", "--out", "x", "--plan", "--json", ADDRESS]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["videos"]


@pytest.mark.parametrize("address", [UNKNOWN, Path(ADDRESS)], ids=["text", "Path"])
@pytest.mark.parametrize(
    "take",
    [
        PatchShards,
        DeltaShards,
        read_cache_info,
        verify_cache,
        lambda address: open_cache(address, None),
        lambda address: export_cache([], address),
        lambda address: export_cache([address], "out"),
        lambda address: find_clips([address]),
        lambda address: find_clips(["."], root=address),
        lambda address: find_folder(str(address)),
        lambda address: ClipLabels(address, last_frames={}, num_classes=2),
        DeltaTok.from_pretrained,
        DeltaWorld.from_pretrained,
        lambda address: Futures.save_grid(None, address),
        lambda address: Futures.save_mp4(None, address),
    ],
)
def test_python_takes_no_address(take: Callable[[Any], Any], address: str | Path) -> None:
    with pytest.raises(UsageError, match=r"an address.*wanted a path"):
        take(address)


def test_a_list_takes_no_address_of_an_unknown_scheme(tmp_path: Path) -> None:
    file = tmp_path / "list.txt"
    file.write_text(f"{UNKNOWN}/clip.mp4\n")
    with pytest.raises(UsageError, match=rf"list\.txt: line 1: {UNKNOWN}.*an address"):
        find_clips([file])


@pytest.mark.parametrize(
    "text", ["gs://b/c", "http://host/x", "hf://a/b", "file:///data", "s3:/b", "pipe:cat x"]
)
def test_any_scheme_is_an_address(text: str) -> None:
    with pytest.raises(UsageError, match="an address"):
        local_path(text)


@pytest.mark.parametrize(
    "text", ["./s3:/b", "/data/a:b", "C:/data", "a/b://c", "facebook/dinov3-vitb16", "12:30.mp4"]
)
def test_other_names_are_paths(text: str) -> None:
    assert local_path(text) == Path(text)
