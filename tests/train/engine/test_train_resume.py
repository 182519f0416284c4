"""A run that was stopped in any way ends as if it had not been."""

import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deltatok.shards import CacheMismatch, DamagedShard, DeltatokError, Stopped, UsageError
from deltatok.shards.files import sha256_file
from deltatok.train.config import TokenizerTrainConfig, WorldTrainConfig
from deltatok.train.engine import loop
from deltatok.train.tokenizer import train_tokenizer
from deltatok.train.world import train_world

Make = Callable[..., Any]


def weights(folder: Path | str) -> str:
    return sha256_file(Path(folder) / "model.safetensors")


def stop_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if SIGTERM came while step number `steps` was computed."""
    read = loop.Trainer._read_numbers
    left = [steps]

    def counting(self: loop.Trainer, *arguments: Any, **known: Any) -> loop.Update:
        left[0] -= 1
        return read(self, *arguments, **known)._replace(stopping=left[0] == 0)

    monkeypatch.setattr(loop.Trainer, "_read_numbers", counting)


@pytest.mark.parametrize(
    "changed",
    [
        {"wide_pair_fraction": 0.3},
        {"closed_loop_steps": 3},
        {
            "encoder_patch_fraction": 0.5,
            "decoder_patch_fraction": 0.25,
            "whole_frames_from": 3,
        },
    ],
    ids=["wide pairs", "closed loop", "patches"],
)
def test_tokenizer_resumed_at_every_step_equals_uninterrupted(
    tokenizer_config: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    log_lines: Make,
    changed: dict[str, Any],
) -> None:
    config = tokenizer_config(steps=4, save_every=100, **changed)
    whole = dataclasses.replace(config, out=str(tmp_path / "whole"))
    train_tokenizer(whole)
    for step in range(1, 4):
        cut = dataclasses.replace(config, out=str(tmp_path / f"cut{step}"))
        with monkeypatch.context() as patch:
            stop_after(step, patch)
            with pytest.raises(Stopped, match=f"stopped after step {step} of 4"):
                train_tokenizer(cut)
        train_tokenizer(cut)
        assert weights(cut.out) == weights(whole.out)
        assert log_lines(cut.out) == log_lines(whole.out)


def test_world_resumed_at_every_step_equals_uninterrupted(
    world_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_lines: Make
) -> None:
    config = world_config(steps=4, save_every=100)
    whole = dataclasses.replace(config, out=str(tmp_path / "whole"))
    train_world(whole)
    for step in range(1, 4):
        cut = dataclasses.replace(config, out=str(tmp_path / f"cut{step}"))
        with monkeypatch.context() as patch:
            stop_after(step, patch)
            with pytest.raises(Stopped):
                train_world(cut)
        train_world(cut)
        assert weights(cut.out) == weights(whole.out)
        assert log_lines(cut.out) == log_lines(whole.out)


KILLED = """
import os, signal, sys
from pathlib import Path
from deltatok.train.engine import checkpoints, loop, model_folder as pretrained, run_folder
from deltatok.train.config import TokenizerTrainConfig
from deltatok.train.models.configs import DeltaTokConfig
from deltatok.train.tokenizer import train_tokenizer
import json
fields = json.loads(sys.argv[1])
where = sys.argv[2]

def die(*arguments, **named):
    os.kill(os.getpid(), signal.SIGKILL)

if where == "before a checkpoint has its name":
    publish, left = checkpoints.publish, [2]
    def publish_or_die(partial, final):
        left[0] -= 1
        publish(partial, final) if left[0] else die()
    checkpoints.publish = publish_or_die
elif where == "between two checkpoints":
    check, left = loop.Trainer._check_finite, [3]
    def check_or_die(self, *arguments):
        left[0] -= 1
        return check(self, *arguments) if left[0] else die()
    loop.Trainer._check_finite = check_or_die
elif where == "while the model is written":
    pretrained.write_json = die
train_tokenizer(
    TokenizerTrainConfig(**{**fields, "model": DeltaTokConfig(**fields["model"])})
)
"""


def test_run_killed_three_times_equals_uninterrupted(
    tokenizer_config: Make, tmp_path: Path, log_lines: Make, run_program: Make
) -> None:
    config: TokenizerTrainConfig = tokenizer_config()
    train_tokenizer(dataclasses.replace(config, out=str(tmp_path / "whole")))
    program = tmp_path / "killed.py"
    program.write_text(KILLED)
    fields = json.dumps(dataclasses.asdict(config))
    for where in (
        "before a checkpoint has its name",
        "between two checkpoints",
        "while the model is written",
    ):
        done = run_program(program, fields, where)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert not (Path(config.out) / "config.json").exists()
    train_tokenizer(config)
    assert weights(config.out) == weights(tmp_path / "whole")
    assert log_lines(config.out) == log_lines(tmp_path / "whole")
    assert not list(Path(config.out).rglob("*.partial-*"))


def test_finished_run_is_not_run_again(
    tokenizer_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tokenizer_config(steps=2)
    train_tokenizer(config)
    monkeypatch.setattr(loop, "Trainer", None)
    before = (Path(config.out) / "train.json").stat().st_mtime_ns
    assert train_tokenizer(config) == Path(config.out)
    assert (Path(config.out) / "train.json").stat().st_mtime_ns == before


def test_finished_run_goes_on_to_more_steps(tokenizer_config: Make, tmp_path: Path) -> None:
    train_tokenizer(tokenizer_config(steps=2))
    train_tokenizer(tokenizer_config(steps=4))
    train_tokenizer(tokenizer_config(steps=4, out=str(tmp_path / "whole")))
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_fewer_steps_than_trained_are_refused(tokenizer_config: Make) -> None:
    train_tokenizer(tokenizer_config(steps=2))
    with pytest.raises(UsageError, match="2 steps are trained, steps asks for 1"):
        train_tokenizer(tokenizer_config(steps=1))


@pytest.mark.parametrize(
    ("changed", "name"),
    [({"lr": 0.5}, "config lr is"), ({"model": {"layer_scale_init": 0.2}}, "model.layer_scale")],
)
def test_other_config_does_not_go_on(
    tokenizer_config: Make, changed: dict[str, Any], name: str
) -> None:
    train_tokenizer(tokenizer_config(steps=2))
    with pytest.raises(CacheMismatch, match=name):
        train_tokenizer(tokenizer_config(steps=4, **changed))


def test_other_cache_does_not_go_on(
    tokenizer_config: Make, make_patches: Make, tmp_path: Path
) -> None:
    train_tokenizer(tokenizer_config(steps=2))
    other = make_patches(tmp_path / "other", weights_sha256="f" * 64)
    with pytest.raises(CacheMismatch, match=r"data patches\.backbone\.weights_sha256 is"):
        train_tokenizer(tokenizer_config(steps=4, patches=str(other)))


def test_moved_cache_goes_on(tokenizer_config: Make, make_patches: Make, tmp_path: Path) -> None:
    train_tokenizer(tokenizer_config(steps=2))
    moved = make_patches(tmp_path / "moved")
    train_tokenizer(tokenizer_config(steps=4, patches=str(moved), log_every=2, save_every=4))
    train_tokenizer(tokenizer_config(steps=4, out=str(tmp_path / "whole")))
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_folder_of_something_else_is_refused(tokenizer_config: Make, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").touch()
    with pytest.raises(UsageError, match=r"holds 'thesis.tex' but no train.json"):
        train_tokenizer(tokenizer_config())


def test_folder_of_a_run_killed_at_its_very_start_is_taken(tokenizer_config: Make) -> None:
    config = tokenizer_config(steps=1)
    Path(config.out).mkdir()
    (Path(config.out) / f"train.json.partial-{2**22 + 1}-00000000").touch()
    train_tokenizer(config)


def test_checkpoint_beyond_the_steps_asked_for_is_refused(
    tokenizer_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        with pytest.raises(Stopped):
            train_tokenizer(tokenizer_config())
    with pytest.raises(UsageError, match="3 steps are trained, steps asks for 2"):
        train_tokenizer(tokenizer_config(steps=2))


def test_finished_run_without_checkpoints_is_done_but_cannot_go_on(tokenizer_config: Make) -> None:
    config = tokenizer_config(steps=2)
    train_tokenizer(config)
    shutil.rmtree(Path(config.out) / "checkpoints")
    train_tokenizer(config)
    with pytest.raises(UsageError, match="checkpoints are gone, so it cannot go on to 4"):
        train_tokenizer(tokenizer_config(steps=4))


def test_folder_of_another_command_is_refused(tokenizer_config: Make, world_config: Make) -> None:
    train_tokenizer(tokenizer_config(steps=2))
    with pytest.raises(CacheMismatch, match="a run of 'tokenizer', wanted 'world'"):
        train_world(world_config(steps=2))


def test_damaged_checkpoint_is_named(tokenizer_config: Make) -> None:
    config = tokenizer_config(steps=2)
    train_tokenizer(config)
    file = Path(config.out) / "checkpoints/step-00000002/model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(DeltatokError, match=r"step-00000002/model.safetensors: not readable"):
        train_tokenizer(tokenizer_config(steps=4))


def test_only_the_newest_checkpoints_are_kept(tokenizer_config: Make) -> None:
    config = tokenizer_config(save_every=1, keep_checkpoints=2)
    train_tokenizer(config)
    names = sorted(path.name for path in (Path(config.out) / "checkpoints").iterdir())
    assert names == ["step-00000005", "step-00000006"]


def test_sigterm_saves_and_stops(
    world_config: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config: WorldTrainConfig = world_config(save_every=100)
    forward = loop.Trainer._forward_backward

    def terminated(self: loop.Trainer, batch: Any, step: int) -> Any:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, batch, step)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_forward_backward", terminated)
        with pytest.raises(Stopped):
            train_world(config)
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000003"]


@pytest.mark.parametrize(
    ("name", "is_torn"),
    [("model.safetensors", True), ("optimizer.safetensors", False), ("state.json", True)],
)
def test_run_goes_on_from_the_checkpoint_before_as_the_error_says(
    tokenizer_config: Make, name: str, is_torn: bool
) -> None:
    config = tokenizer_config(steps=2, save_every=1)
    train_tokenizer(config)
    folder = Path(config.out) / "checkpoints/step-00000002"
    if is_torn:
        (folder / name).write_bytes((folder / name).read_bytes()[:-10])
    else:
        (folder / name).unlink()
    words = rf"{name}: not readable .*; or remove the folder .*/checkpoints/step-00000002$"
    with pytest.raises(DamagedShard, match=words):
        train_tokenizer(tokenizer_config(steps=3))
    shutil.rmtree(folder)
    train_tokenizer(tokenizer_config(steps=3, save_every=1))
    assert (folder.parent / "step-00000003").is_dir()


def test_log_lines_that_are_no_text_are_dropped(tokenizer_config: Make, log_lines: Make) -> None:
    """As a file system may leave what was not flushed when the power went."""
    config = tokenizer_config(steps=2)
    log = train_tokenizer(config) / "log.jsonl"
    log.write_bytes(log.read_bytes() + b"\xff\x00\xfe\n\x00\x00")
    train_tokenizer(tokenizer_config(steps=3))
    assert [line["step"] for line in log_lines(config.out, ["train"])] == [1, 2, 3]


def test_run_without_a_model_yet_is_no_start(tokenizer_config: Make, tmp_path: Path) -> None:
    config = tokenizer_config(start_from=str(tmp_path))
    with pytest.raises(UsageError, match=r"no model there.*checkpoint, RUN/checkpoints/step-N"):
        train_tokenizer(config)


def test_torn_description_is_mended_as_the_error_says(tokenizer_config: Make) -> None:
    config = tokenizer_config(steps=2)
    out = train_tokenizer(config)
    (out / "train.json").write_text("{")
    with pytest.raises(DamagedShard, match=r"train.json: not readable: copy state.json of the new"):
        train_tokenizer(tokenizer_config(steps=3))
    shutil.copy(out / "checkpoints/step-00000002/state.json", out / "train.json")
    train_tokenizer(tokenizer_config(steps=3))
    assert (out / "checkpoints/step-00000003").is_dir()
