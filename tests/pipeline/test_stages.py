"""Pipeline files: stages run once, in order, and mistakes are named."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from deltatok.pipeline import stages
from deltatok.pipeline.commands.pipeline import quickstart_file
from deltatok.pipeline.stages import StageFailed, read_pipeline, run_pipeline, stages_to_run
from deltatok.shards.errors import UsageError

FILE = """
out: {out}
stages:
  - {{name: one, command: first, settings: {{out: "${{out}}/one", size: 1}}}}
  - {{name: two, command: second, settings: {{from: ["${{out}}/one"]}}}}
"""


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the commands that ran; `second` fails while a file named `fail` stands beside."""
    names: list[str] = []

    def command(name: str) -> stages.Command:
        def run(words: Sequence[str]) -> int:
            names.append(name)
            fails = (Path(words[1]).parent.parent / "fail").exists()
            return 3 if name == "second" and fails else 0

        return run

    known = {"first": command("first"), "second": command("second")}
    monkeypatch.setattr(stages, "COMMANDS", known)
    return names


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(FILE.format(out=tmp_path / "out"))
    return path


def test_a_second_run_does_nothing_twice(file: Path, ran: list[str]) -> None:
    pipeline = read_pipeline(file, out=None, settings=[])
    assert set(run_pipeline(pipeline)) == {"one", "two"}
    run_pipeline(pipeline)
    assert ran == ["first", "second"]


def test_a_changed_setting_runs_its_stage_and_all_later_ones(file: Path, ran: list[str]) -> None:
    run_pipeline(read_pipeline(file, out=None, settings=[]))
    changed = read_pipeline(file, out=None, settings=["one.size=2"])
    assert [stage.name for stage in stages_to_run(changed)] == ["one", "two"]
    run_pipeline(changed)
    assert ran == ["first", "second"] * 2


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
    assert ran == ["first", "second", "second"]


def test_out_stands_for_the_results_folder(file: Path, ran: list[str], tmp_path: Path) -> None:
    pipeline = read_pipeline(file, out=str(tmp_path / "other"), settings=[])
    assert pipeline.stages[1].settings == {"from": [f"{tmp_path / 'other'}/one"]}


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
    with pytest.raises(UsageError, match="'thrid', wanted one of first, second"):
        read_pipeline(path, out=None, settings=[])


def test_the_quickstart_file_is_a_pipeline() -> None:
    names = [stage.name for stage in read_pipeline(quickstart_file(), out=None, settings=[]).stages]
    assert names[0] == "world"
    assert names[-1] == "report"
