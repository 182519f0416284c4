"""Every command that is written down is one that is understood: help, README, docs, configs."""

import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from deltatok.pipeline import cli as command
from deltatok.pipeline.commands import pipeline as pipeline_command
from deltatok.pipeline.commands.evaluate import main as evaluate
from deltatok.pipeline.commands.extract import main as extract
from deltatok.pipeline.commands.pipeline import main as pipeline
from deltatok.pipeline.commands.shards import main as shards
from deltatok.pipeline.commands.train import main as train

ROOT = Path(__file__).resolve().parents[3]
Main = Callable[[Sequence[str]], int]
COMMANDS: dict[str, Main] = {
    "deltatok-extract": extract,
    "deltatok-train": train,
    "deltatok-evaluate": evaluate,
    "deltatok-shards": shards,
    "deltatok-pipeline": pipeline,
}
MODULES = {f"deltatok.pipeline.commands.{name[9:]}": name for name in COMMANDS}
HELPS = [
    *["extract", "extract --patches x", "extract --dataset x"],
    *["train", "train tokenizer", "train world", "train dinoworld", "train head"],
    *["evaluate", "evaluate forecast", "evaluate compare", "evaluate flops"],
    "evaluate cache-fidelity",
    *["shards", "shards info", "shards verify", "shards preview", "shards export", "shards bench"],
    *["shards push", "shards pull"],
    *["pipeline", "pipeline run", "pipeline plan", "pipeline quickstart"],
    *["pipeline init", "pipeline doctor"],
    *["pipeline import-official", "pipeline export-official"],
]
WITHOUT_COMMANDS = {"architecture.md", "experiments.md", "log.md", "measured.md"}
PAGES = [
    ROOT / "README.md",
    *sorted(p for p in (ROOT / "docs").glob("*.md") if p.name not in WITHOUT_COMMANDS),
]
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.yaml"))


class ParsedError(Exception):
    """A command has read its words and found nothing wrong."""


@pytest.fixture
def understood(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Checks that a command line is parsed, its config built; nothing is run."""
    load = command.load

    def only_load(*arguments: Any, **named: Any) -> None:
        load(*arguments, **named)
        raise ParsedError

    monkeypatch.setattr(command, "load", only_load)

    def check(line: str) -> None:
        name, *words = shlex.split(line, comments=True)
        if name == "accelerate":
            module = words.index("-m") + 1
            name, words = MODULES[words[module]], words[module + 1 :]
        if name == "deltatok-pipeline":
            pipeline_command._parser().parse_args(words)
        else:
            with pytest.raises(ParsedError):
                COMMANDS[name](words)

    return check


def help_of(words: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The help of a command like "train world"."""
    name, *rest = words.split()
    try:
        code = COMMANDS[f"deltatok-{name}"]([*rest, "--help"])
    except SystemExit as stop:
        code = int(stop.code or 0)
    assert code == 0
    return capsys.readouterr().out


def commands_in(text: str) -> list[str]:
    """The lines of `text` that start our commands, continued lines joined."""
    lines = (line.strip() for line in re.sub(r" *\\\n *", " ", text).splitlines())
    return [line for line in lines if re.match(r"(deltatok-\w+|accelerate launch) ", line)]


@pytest.mark.parametrize("words", HELPS)
def test_examples_of_the_help(
    words: str, understood: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    lines = commands_in(help_of(words, capsys).partition("example")[2])
    assert lines
    for line in lines:
        understood(line.partition("   ")[0])


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_commands_of_the_pages(page: Path, understood: Callable[[str], None]) -> None:
    blocks = re.findall(r"(?ms)^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"))
    lines = commands_in("".join(text for language, text in blocks if not language))
    assert lines
    for line in lines:
        understood(line)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_commands_of_the_config_files(path: Path, understood: Callable[[str], None]) -> None:
    head = [line for line in path.read_text(encoding="utf-8").splitlines() if line[:1] == "#"]
    lines = [line.partition("Command: ")[2] or line[1:] for line in head]
    found = commands_in("\n".join(lines))
    assert found
    for line in found:
        understood(line.partition("   ")[0])


def test_what_must_be_given_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    folded = " ".join(help_of("train world", capsys).split())
    assert "--deltas DELTAS Delta-token cache to train on. [required]" in folded


def test_choices_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of("train tokenizer", capsys)
    assert "--compile-mode {default,reduce-overhead,max-autotune}" in text
    assert "--precision {auto,float32,bfloat16}" in text


def test_defaults_are_shown_as_they_are_typed(capsys: pytest.CaptureFixture[str]) -> None:
    folded = " ".join(help_of("extract", capsys).split())
    assert "[0.75 1.333]" in folded
    assert "(0.75" not in folded
    assert "[none]" in " ".join(help_of("evaluate forecast", capsys).split())


def test_settings_of_the_model_have_meaning_and_default(
    capsys: pytest.CaptureFixture[str],
) -> None:
    folded = " ".join(help_of("train world", capsys).split())
    assert "num_samples_train Candidates K of a position in best-of-many training. [256]" in folded
    assert "rope_axis_sizes Rotated channels of a head for time. [60]" in folded
