"""Every file under configs/ is a run one can start, and opens with what to expect of it."""

from pathlib import Path

import pytest

from deltatok.extract.config import ExtractConfig
from deltatok.pipeline.config import build_config, read_yaml
from deltatok.train.config import TokenizerTrainConfig, WorldTrainConfig

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
GIVEN = {  # what the command line of the file's header adds
    "extract": (ExtractConfig, {"videos": ["clips"], "out": "cache"}),
    "tokenizer": (TokenizerTrainConfig, {"patches": "cache", "out": "run"}),
    "world": (WorldTrainConfig, {"deltas": "cache", "out": "run"}),
}
FILES = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent != CONFIGS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_config_file_builds_and_says_what_it_makes(path: Path) -> None:
    config_type, given = GIVEN[path.parent.name]
    build_config(config_type, read_yaml(path) | given, where=path.name)
    head = "".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    for word in ("Makes:", "Command:", "Hardware:", "Size:", "Expect:"):
        assert word in head
    assert f"configs/{path.parent.name}/{path.name}" in head


def test_all_stages_of_the_release_and_the_paper_are_there() -> None:
    names = {f"{path.parent.name}/{path.stem}" for path in FILES}
    stages = ("256", "512", "512-cooldown-1", "512-cooldown-2")
    wanted = {f"tokenizer/{kind}-{stage}" for kind in ("released", "paper") for stage in stages}
    assert names >= wanted | {"world/released", "world/released-cooldown", "world/discriminative"}
