"""Every file under configs/ is a run one can start, and opens with what to expect of it."""

import re
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from deltatok.extract.config import ExtractConfig
from deltatok.extract.datasets.base import DatasetConfig
from deltatok.pipeline.cli import read_yaml
from deltatok.pipeline.commands import train as train_command
from deltatok.shards.schema import load
from deltatok.train.config import (
    DINOWorldTrainConfig,
    HeadTrainConfig,
    TokenizerTrainConfig,
    WorldTrainConfig,
)
from deltatok.train.engine.checkpoints import NOT_IN_THE_WEIGHTS

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
GIVEN = {  # what the command line of the file's header adds
    "extract": (ExtractConfig, {"videos": ["clips"], "out": "cache"}),
    "tokenizer": (TokenizerTrainConfig, {"patches": "cache", "out": "run"}),
    "world": (WorldTrainConfig, {"deltas": "cache", "out": "run"}),
    "targets": (DatasetConfig, {"root": "data", "out": "cache"}),
    "head": (HeadTrainConfig, {"patches": "cache", "labels": "data", "out": "run"}),
    "dinoworld": (DINOWorldTrainConfig, {"patches": "cache", "out": "run"}),
}
FILES = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent != CONFIGS)
TRAINED = ("tokenizer", "world", "dinoworld", "head")
TRAINING_FILES = [path for path in FILES if path.parent.name in TRAINED]


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_config_file_builds_and_says_what_it_makes(path: Path) -> None:
    kind = path.parent.name  # of configs/foresight, which has one of every kind, by its name
    kind = path.stem.partition("-")[0] if kind == "foresight" else kind
    config_type, given = GIVEN[kind]
    load(config_type, read_yaml(path) | given, where=path.name)
    head = "".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    for word in ("Makes:", "Command:", "Hardware:", "Hours:", "Size:", "Expect:"):
        assert word in head
    hours = head.partition("Hours:")[2].partition("Size:")[0]  # a number says where it is from
    known = ("measured", "computed", "not stated")
    assert kind in ("extract", "targets") or any(word in hours for word in known)
    assert f"configs/{path.parent.name}/{path.name}" in head


def test_all_stages_of_the_release_and_the_paper_are_there() -> None:
    names = {f"{path.parent.name}/{path.stem}" for path in FILES}
    stages = ("256", "512", "512-cooldown-1", "512-cooldown-2")
    wanted = {f"tokenizer/{kind}-{stage}" for kind in ("released", "paper") for stage in stages}
    assert names >= wanted | {"world/released", "world/released-cooldown", "world/discriminative"}


def test_there_is_a_run_for_every_size_of_machine_and_every_ablation() -> None:
    names = {f"{path.parent.name}/{path.stem}" for path in FILES}
    machines = {"world/one-24gb", "world/one-h200", "world/eight-h200"}
    machines |= {"tokenizer/one-24gb-256", "tokenizer/one-h200-256"}
    ablations = {f"dinoworld/{kind}-256" for kind in ("discriminative", "best-of-many")}
    ablations |= {f"world/ablation-{kind}-token-256" for kind in ("frame", "delta")}
    assert names >= machines | ablations | {"tokenizer/frame-token-256", "world/discriminative"}


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """By their OUT, the configs that the commands of the files' headers train with."""
    monkeypatch.chdir(CONFIGS.parent)
    found: dict[str, Any] = {}
    for kind in TRAINED:
        module = "heads.train" if kind == "head" else kind
        monkeypatch.setattr(
            f"deltatok.train.{module}.train_{kind}",
            lambda config: found.update({config.out: config}),
        )
    for path in TRAINING_FILES:
        (command,) = re.findall("^# Command: (.*)$", path.read_text(), flags=re.MULTILINE)
        words = shlex.split(command)
        at = words.index("-m") + 1 if words[0] == "accelerate" else 0
        assert words[at] in ("deltatok-train", "deltatok.pipeline.commands.train")
        assert train_command.main(words[at + 1 :]) == 0, command
    return found


def test_a_stage_starts_from_a_run_with_the_same_model(trained: dict[str, Any]) -> None:
    stages = [config for config in trained.values() if config.start_from is not None]
    assert len(stages) == 7
    for stage in stages:
        mine, source = (asdict(config.model) for config in (stage, trained[stage.start_from]))
        assert {n: v for n, v in mine.items() if n not in NOT_IN_THE_WEIGHTS} == {
            n: v for n, v in source.items() if n not in NOT_IN_THE_WEIGHTS
        }
