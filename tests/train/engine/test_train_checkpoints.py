"""The best checkpoint is kept, a checkpoint is a model, and a full disk costs no older one."""

import errno
import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from deltatok.shards import CacheMismatch, DeltatokError, PatchShards, UsageError
from deltatok.train.engine import checkpoints, logs, loop
from deltatok.train.engine.model_folder import read_provenance, read_tensors
from deltatok.train.models.deltatok import DeltaTok
from deltatok.train.tokenizer import TokenizerObjective, train_tokenizer
from deltatok.train.world import train_world

Make = Callable[..., Any]


def steps_in(folder: Path | str) -> list[str]:
    return sorted(path.name for path in (Path(folder) / "checkpoints").iterdir())


def scripted_losses(monkeypatch: pytest.MonkeyPatch, losses: dict[int, float]) -> None:
    """Evaluations after these steps give these validation losses."""
    evaluate = TokenizerObjective.evaluate
    evaluations = iter(losses.values())

    def scripted(self: TokenizerObjective) -> dict[str, float]:
        return {**evaluate(self), "validation_loss": next(evaluations)}

    monkeypatch.setattr(TokenizerObjective, "evaluate", scripted)


def test_the_best_checkpoint_outlives_newer_ones(
    tokenizer_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted_losses(monkeypatch, {2: 0.5, 4: 0.3, 6: 0.4, 8: float("nan"), 9: 0.3})
    config = tokenizer_config(steps=9, eval_every=2, save_every=1, keep_checkpoints=2)
    out = train_tokenizer(config)
    assert steps_in(out) == ["step-00000004", "step-00000008", "step-00000009"]
    assert json.loads((out / "best.json").read_text()) == {
        "step": 4,
        "by": "validation_loss",
        "value": 0.3,
        "model": "checkpoints/step-00000004",
    }


def test_the_best_is_saved_when_nothing_else_is_due(
    tokenizer_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted_losses(monkeypatch, {2: 0.5, 4: 0.3, 6: 0.4})
    out = train_tokenizer(tokenizer_config(eval_every=2, save_every=100, keep_checkpoints=1))
    assert steps_in(out) == ["step-00000004", "step-00000006"]


def test_a_run_that_goes_on_remembers_the_best(
    tokenizer_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted_losses(monkeypatch, {2: 0.3, 4: 0.5, 6: 0.4})
    fields = {"eval_every": 2, "save_every": 1, "keep_checkpoints": 1}
    out = train_tokenizer(tokenizer_config(steps=4, **fields))
    (out / "best.json").unlink()  # as if killed before it was written
    train_tokenizer(tokenizer_config(steps=6, **fields))
    assert json.loads((out / "best.json").read_text())["step"] == 2
    assert steps_in(out) == ["step-00000002", "step-00000006"]


def test_a_checkpoint_is_a_model_folder(tokenizer_config: Make, patches: Path) -> None:
    out = train_tokenizer(tokenizer_config(steps=3))
    best = out / json.loads((out / "best.json").read_text())["model"]
    model = DeltaTok.from_pretrained(best)
    assert torch.equal(
        model.z_embed.weight, read_tensors(best / "model.safetensors")["z_embed.weight"]
    )
    assert read_provenance(best)["patches_fingerprint"] == PatchShards(patches).fingerprint


def test_a_checkpoint_tells_its_story(tokenizer_config: Make, patches: Path) -> None:
    out = train_tokenizer(tokenizer_config(steps=4, save_every=4, seed=7))
    state = json.loads((out / "checkpoints/step-00000004/state.json").read_text())
    assert state["step"] == 4
    assert state["config"]["seed"] == 7
    assert state["versions"]["torch"] == torch.__version__
    assert state["fingerprints"] == {"patches": PatchShards(patches).fingerprint}
    assert state["data"]["patches"] == PatchShards(patches).info.identity
    batches = state["loader"]["batches_per_epoch"]
    assert (state["loader"]["epoch"], state["loader"]["batch"]) == divmod(4, batches)
    assert state["best"]["by"] == "validation_loss"


@contextmanager
def file_size_limit(size_bytes: int) -> Iterator[None]:
    """No file of this process may grow beyond it: what a full disk does, from the system."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def saving_is_limited(monkeypatch: pytest.MonkeyPatch, *, after: int, size_bytes: int) -> None:
    """Checkpoints after that step meet the limit."""
    save = checkpoints.save_checkpoint

    def limited(folder: Path, step: int, *given: Any, **named: Any) -> Path:
        if step <= after:
            return save(folder, step, *given, **named)
        with file_size_limit(size_bytes):
            return save(folder, step, *given, **named)

    monkeypatch.setattr(loop, "save_checkpoint", limited)


@pytest.mark.parametrize("size_bytes", [100, 5000, 60_000])
def test_disk_full_while_saving_costs_no_older_checkpoint(
    tokenizer_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size_bytes: int
) -> None:
    config = tokenizer_config(save_every=2, eval_every=100, keep_checkpoints=1)
    with monkeypatch.context() as patch:
        saving_is_limited(patch, after=2, size_bytes=size_bytes)
        with pytest.raises(DeltatokError, match=r"step-00000004: cannot be written .*make room"):
            train_tokenizer(config)
    assert steps_in(config.out) == ["step-00000002"]
    out = train_tokenizer(config)
    whole = train_tokenizer(
        tokenizer_config(save_every=2, eval_every=100, out=str(tmp_path / "whole"))
    )
    name = "model.safetensors"
    assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_disk_full_while_logging_says_what_to_do(
    tokenizer_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = logs.RunLog.write

    def full(self: logs.RunLog, kind: str, step: int, values: Any) -> None:
        size_bytes = 10 if step == 4 else 1_000_000
        with file_size_limit(size_bytes):
            write(self, kind, step, values)

    monkeypatch.setattr(logs.RunLog, "write", full)
    config = tokenizer_config(save_every=1)
    with pytest.raises(DeltatokError, match=r"log.jsonl: cannot be written .*make room"):
        train_tokenizer(config)
    assert steps_in(config.out)[-1] == "step-00000003"


def test_disk_full_while_a_torn_log_is_mended_says_what_to_do(
    tokenizer_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    drop = logs._drop_after

    def full(path: Path, step: int) -> None:
        with file_size_limit(10):
            drop(path, step)

    log = train_tokenizer(tokenizer_config(steps=2)) / "log.jsonl"
    log.write_bytes(log.read_bytes() + b'{"kind": "tr')
    monkeypatch.setattr(logs, "_drop_after", full)
    with pytest.raises(DeltatokError, match=r"log.jsonl: cannot be written .*make room"):
        train_tokenizer(tokenizer_config(steps=4))


def test_no_space_for_the_model_itself_leaves_the_last_checkpoint(
    tokenizer_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    config = tokenizer_config(steps=2)
    with monkeypatch.context() as patch:
        patch.setattr(DeltaTok, "save_pretrained", full)
        with pytest.raises(DeltatokError, match=r"run: cannot be written .No space left"):
            train_tokenizer(config)
    assert not (Path(config.out) / "config.json").exists()
    out = train_tokenizer(config)
    DeltaTok.from_pretrained(out)


def test_checkpoint_of_another_model_in_the_folder_is_refused(
    tokenizer_config: Make, world_config: Make, tmp_path: Path
) -> None:
    config = tokenizer_config(steps=2)
    train_tokenizer(config)
    world = train_world(world_config(steps=4, save_every=4, out=str(tmp_path / "world")))
    step = "checkpoints/step-00000004"
    (world / step).rename(Path(config.out) / step)
    with pytest.raises(CacheMismatch, match=r"step-00000004/state.json: a run of 'world', wanted"):
        train_tokenizer(tokenizer_config(steps=6))


def test_start_from_the_checkpoint_of_another_model_is_refused(
    tokenizer_config: Make, world_config: Make, tmp_path: Path
) -> None:
    out = train_tokenizer(tokenizer_config(steps=2))
    with pytest.raises(UsageError, match="holds a DeltaTok, wanted a DeltaWorld"):
        train_world(
            world_config(out=str(tmp_path / "w"), start_from=str(out / "checkpoints/step-00000002"))
        )


def test_all_fields_that_changed_are_named(tokenizer_config: Make) -> None:
    train_tokenizer(tokenizer_config(steps=2))
    with pytest.raises(
        DeltatokError,
        match=r"config lr is 0.001, this run has 0.5; config seed is 0, .* 3.*new stage",
    ):
        train_tokenizer(tokenizer_config(steps=4, lr=0.5, seed=3))
