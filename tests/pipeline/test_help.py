"""--help of every command: the examples run, every setting has its choices and its default."""

import re
import shlex
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from deltatok.pipeline import command, pipeline_command, shards_command
from deltatok.pipeline.evaluate_command import main as evaluate
from deltatok.pipeline.extract_command import main as extract
from deltatok.pipeline.pipeline_command import main as pipeline
from deltatok.pipeline.shards_command import main as shards
from deltatok.pipeline.train_command import main as train

Main = Callable[[Sequence[str]], int]
COMMANDS: dict[str, Main] = {
    "deltatok-extract": extract,
    "deltatok-train": train,
    "deltatok-evaluate": evaluate,
    "deltatok-shards": shards,
    "deltatok-pipeline": pipeline,
}
HELPS = [
    *["extract", "extract --patches x", "extract --dataset x"],
    *["train", "train tokenizer", "train world", "train dinoworld", "train head"],
    *["evaluate", "evaluate forecast", "evaluate compare", "evaluate flops"],
    "evaluate cache-fidelity",
    *["shards", "shards info", "shards verify", "shards preview", "shards export", "shards bench"],
    *["pipeline", "pipeline run", "pipeline plan", "pipeline quickstart"],
    *["pipeline import-official", "pipeline export-official"],
]


class ParsedError(Exception):
    """A command has read its words and found nothing wrong."""


@pytest.fixture
def help_of(capsys: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    """The help of a command like "train world", with its line breaks folded."""

    def read(words: str) -> str:
        name, *rest = words.split()
        try:
            code = COMMANDS[f"deltatok-{name}"]([*rest, "--help"])
        except SystemExit as stop:
            code = int(stop.code or 0)
        assert code == 0
        return capsys.readouterr().out

    return read


@pytest.mark.parametrize("words", HELPS)
def test_the_examples_in_the_help_are_understood(
    words: str, help_of: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    build = command.build_config

    def only_build(*arguments: Any, **named: Any) -> None:
        build(*arguments, **named)
        raise ParsedError

    monkeypatch.setattr(command, "build_config", only_build)
    text = re.sub(r"\\\n *", "", help_of(words))
    _, _, after = text.partition("example")
    lines = [line.strip() for line in after.splitlines()]
    lines = [line for line in lines if line.startswith("deltatok-") and "..." not in line]
    assert lines, "no example"
    for line in lines:
        name, *rest = shlex.split(line.partition("   ")[0])
        if name == "deltatok-shards":
            shards_command._parser().parse_args(rest)
        elif name == "deltatok-pipeline":
            pipeline_command._parser().parse_args(rest)
        else:
            with pytest.raises(ParsedError):
                COMMANDS[name](rest)


def test_what_must_be_given_says_so(help_of: Callable[[str], str]) -> None:
    folded = " ".join(help_of("train world").split())
    assert "--deltas DELTAS Delta-token cache to train on. [required]" in folded


def test_choices_are_listed(help_of: Callable[[str], str]) -> None:
    text = help_of("train tokenizer")
    assert "--compile-mode {default,reduce-overhead,max-autotune}" in text
    assert "--precision {auto,float32,bfloat16}" in text


def test_defaults_are_shown_as_they_are_typed(help_of: Callable[[str], str]) -> None:
    folded = " ".join(help_of("extract").split())
    assert "[0.75 1.333]" in folded
    assert "(0.75" not in folded
    assert "[none]" in " ".join(help_of("evaluate forecast").split())


def test_settings_of_the_model_have_meaning_and_default(help_of: Callable[[str], str]) -> None:
    folded = " ".join(help_of("train world").split())
    assert "num_samples_train Candidates K of a position in best-of-many training. [256]" in folded
    assert "rope_axis_sizes Rotated channels of a head for time. [60]" in folded
