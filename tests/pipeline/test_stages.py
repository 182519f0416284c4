"""Pipeline files: stages run once, in order, and mistakes are named."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml

from deltatok.pipeline import stages
from deltatok.pipeline.commands.pipeline import quickstart_file
from deltatok.pipeline.stages import (
    StageFailed,
    check_folders,
    forget,
    read_pipeline,
    run_pipeline,
    stages_to_run,
)
from deltatok.shards.errors import CacheMismatch, UsageError

FILE = """
out: {out}
stages:
  - {{name: one, command: first, settings: {{out: "${{out}}/one", size: 1}}}}
  - {{name: two, command: second, settings: {{from: ["${{out}}/one/x"], out: "${{out}}/two"}}}}
  - {{name: else, command: third, settings: {{out: "${{out}}/else"}}}}
"""


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the commands that ran, each makes its folder; `second` fails while a file named
    `fail` stands beside."""
    names: list[str] = []

    def command(name: str) -> Callable[[Sequence[str]], int]:
        def run(words: Sequence[str]) -> int:
            names.append(name)
            Path(yaml.safe_load(Path(words[1]).read_text())["out"]).mkdir(exist_ok=True)
            fails = (Path(words[1]).parent.parent / "fail").exists()
            return 3 if name == "second" and fails else 0

        return run

    known = {name: command(name) for name in ("first", "second", "third")}
    monkeypatch.setattr(stages, "COMMANDS", known)
    return names


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(FILE.format(out=tmp_path / "out"))
    return path


def test_a_second_run_does_nothing_twice(file: Path, ran: list[str]) -> None:
    pipeline = read_pipeline(file, out=None, settings=[])
    assert set(run_pipeline(pipeline)) == {"one", "two", "else"}
    run_pipeline(pipeline)
    assert ran == ["first", "second", "third"]


def test_a_stage_of_other_settings_is_refused_with_the_command_that_makes_it_again(
    file: Path, ran: list[str], tmp_path: Path
) -> None:
    run_pipeline(read_pipeline(file, out=None, settings=[]))
    changed = read_pipeline(file, out=None, settings=["one.size=2"])
    with pytest.raises(CacheMismatch, match=r"stage one.*size: 2, was 1.*: run it --again one$"):
        check_folders(changed, "run it")
    more = read_pipeline(file, out=None, settings=["one.size=2", "two.size=1", "else.size=3"])
    with pytest.raises(CacheMismatch, match=r"run it --again one --again else$"):
        check_folders(more, "run it")
    (tmp_path / "out" / "one" / "old").touch()
    assert forget(changed, ["one"]) == [tmp_path / "out" / "one", tmp_path / "out" / "two"]
    check_folders(changed, "run it")
    assert [stage.name for stage in stages_to_run(changed)] == ["one", "two"]
    run_pipeline(changed)
    assert ran == ["first", "second", "third", "first", "second"]
    assert not (tmp_path / "out" / "one" / "old").exists()


def test_a_folder_of_an_earlier_version_is_refused(
    file: Path, ran: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = read_pipeline(file, out=None, settings=[])
    run_pipeline(pipeline)
    monkeypatch.setattr(stages, "VERSION", stages.VERSION + 1)
    with pytest.raises(CacheMismatch, match=r"stage one .* version"):
        check_folders(pipeline, "again")
    # As versions that kept no settings wrote it.
    old = {stage.name: {"digest": "0", "seconds": 1.0} for stage in pipeline.stages}
    (tmp_path / "out" / "stages.json").write_text(json.dumps(old))
    with pytest.raises(CacheMismatch, match=r"stage one .* version 0"):
        check_folders(pipeline, "again")


def test_a_setting_of_which_no_result_depends_may_change(file: Path, ran: list[str]) -> None:
    run_pipeline(read_pipeline(file, out=None, settings=["one.workers=1"]))
    changed = read_pipeline(file, out=None, settings=["one.workers=2"])
    check_folders(changed, "again")
    assert stages_to_run(changed) == []


def test_a_moved_folder_is_gone_on_with_and_a_removed_one_is_made_again(
    file: Path, ran: list[str], tmp_path: Path
) -> None:
    run_pipeline(read_pipeline(file, out=None, settings=[]))
    (tmp_path / "out").rename(tmp_path / "moved")
    moved = read_pipeline(file, out=str(tmp_path / "moved"), settings=[])
    check_folders(moved, "again")
    assert stages_to_run(moved) == []
    (tmp_path / "moved" / "else").rmdir()
    assert [stage.name for stage in stages_to_run(moved)] == ["else"]


def test_only_folders_of_the_pipeline_are_removed(
    file: Path, ran: list[str], tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    elsewhere = read_pipeline(file, out=None, settings=[f"one.out={tmp_path / 'mine'}"])
    with pytest.raises(UsageError, match="mine"):
        forget(elsewhere, ["one"])
    assert (tmp_path / "mine").exists()
    with pytest.raises(UsageError, match="--again three"):
        forget(elsewhere, ["three"])


def test_a_failing_stage_passes_on_its_exit_code_and_is_tried_again(
    file: Path, ran: list[str], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "fail").touch()
    pipeline = read_pipeline(file, out=None, settings=[])
    with pytest.raises(StageFailed, match="stage two ended with exit code 3") as failure:
        run_pipeline(pipeline)
    assert failure.value.exit_code == 3
    (tmp_path / "out" / "fail").unlink()
    run_pipeline(pipeline)
    assert ran == ["first", "second", "second", "third"]


def test_out_stands_for_the_results_folder(file: Path, ran: list[str], tmp_path: Path) -> None:
    pipeline = read_pipeline(file, out=str(tmp_path / "other"), settings=[])
    assert pipeline.stages[1].settings["from"] == [f"{tmp_path / 'other'}/one/x"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [("three.size=1", "wanted STAGE.KEY=VALUE, stages"), ("size", "wanted STAGE.KEY=VALUE")],
)
def test_a_setting_for_no_stage_is_refused(
    file: Path, ran: list[str], setting: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        read_pipeline(file, out=None, settings=[setting])


def test_an_unknown_command_is_refused(tmp_path: Path, ran: list[str]) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("stages: [{name: a, command: thrid}]")
    with pytest.raises(UsageError, match="'thrid', wanted one of first, second, third"):
        read_pipeline(path, out=None, settings=[])


def test_the_quickstart_file_is_a_pipeline() -> None:
    names = [stage.name for stage in read_pipeline(quickstart_file(), out=None, settings=[]).stages]
    assert names[0] == "world"
    assert names[-1] == "report"
