"""Configs: YAML and flags map 1:1 onto dataclasses, and mistakes are named."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from deltatok.pipeline.cli import Command, as_plain, config_from_arguments, field_docs, read_yaml
from deltatok.shards.errors import UsageError
from deltatok.shards.schema import load


@dataclass(frozen=True, kw_only=True)
class Inner:
    """A nested group of settings."""

    width: int = 8
    """Channels."""


@dataclass(frozen=True, kw_only=True)
class Outer:
    """Settings of a made-up command."""

    out: str
    """Folder."""
    rate: float = 0.5
    """Rate, per
    second."""
    kind: Literal["a", "b"] = "a"
    """Kind."""
    scale: tuple[float, float] = (0.1, 1.0)
    """Range."""
    names: tuple[str, ...] = ()
    """Names."""
    limit: int | None = None
    """Limit; none = no limit."""
    fast: bool = False
    """Speed."""
    inner: Inner = field(default_factory=Inner)
    """Group."""


def parse(*words: str) -> Outer:
    command = Command(help="", summary="", examples=("made-up",), config="", run="")
    parser = command.parser("made-up", Outer, words)
    return config_from_arguments(Outer, parser.parse_args(words))


def test_defaults_file_flags_and_settings_override_in_that_order(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("out: here\nrate: 1e-3\nlimit: 4\ninner: {width: 16}\nkind: b\n")
    config = parse("--config", str(file), "--limit", "5", "--set", "inner.width=32")
    assert config == Outer(out="here", rate=1e-3, limit=5, kind="b", inner=Inner(width=32))


def test_a_flag_takes_several_values_and_none() -> None:
    config = parse("--out", "x", "--scale", "0.2", "0.4", "--names", "p", "q", "--limit", "none")
    assert (config.scale, config.names, config.limit) == ((0.2, 0.4), ("p", "q"), None)


def test_boolean_flags_can_be_turned_on_and_off() -> None:
    assert parse("--out", "x", "--fast").fast
    assert not parse("--out", "x", "--no-fast").fast


def test_plain_values_build_the_same_config() -> None:
    config = parse("--out", "x", "--set", "scale=[0.2, 0.4]")
    assert load(Outer, as_plain(config), where="copy") == config


def test_unknown_key_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="unknown key 'ratee'; did you mean 'rate'"):
        parse("--out", "x", "--set", "ratee=1")
    with pytest.raises(UsageError, match="unknown key 'widht'; did you mean 'width'"):
        parse("--out", "x", "--set", "inner.widht=1")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rate", "1"], "out not given"),
        (["--out", "x", "--limit", "2.5"], "limit: got '2.5', wanted int"),
        (["--out", "x", "--limits", "1"], r"--limits 1; did you mean --limit\?"),
        (["--out", "x", "--kind", "c"], "wanted one of a, b"),
        (["--out", "x", "--scale", "1", "2", "3"], "got 3 values, wanted 2"),
        (["--out", "x", "--set", "rate"], "wanted key.sub=value"),
        (["--out", "x", "--set", "rate.x=1", "--rate", "1"], "is a value, not a group"),
        (["--out", "x", "--config", "nowhere.yaml"], "cannot be read"),
        (["--outt", "x"], "unrecognized arguments"),
    ],
)
def test_mistakes_are_usage_errors(words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(*words)


def test_field_docs_come_from_the_source() -> None:
    assert field_docs(Outer)["rate"] == "Rate, per second."


def test_the_configs_of_the_package_are_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_yaml(Path("configs/world/one-h200.yaml"))["steps"] == 100_000
    Path("configs/world").mkdir(parents=True)
    Path("configs/world/one-h200.yaml").write_text("steps: 7\n")
    assert read_yaml(Path("configs/world/one-h200.yaml")) == {"steps": 7}
    with pytest.raises(UsageError, match=r"configs/world/two-h200.yaml: cannot be read"):
        read_yaml(Path("configs/world/two-h200.yaml"))
