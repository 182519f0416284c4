"""A checkpoint that was changed is refused by the file's name, and nothing is trained from it."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltatok.shards import DamagedShard
from deltatok.train.config import TokenizerTrainConfig
from deltatok.train.models.configs import DeltaTokConfig
from deltatok.train.tokenizer import train_tokenizer

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
CHECKPOINT = "checkpoints/step-00000002"
Tensors = dict[str, torch.Tensor]


def config_of(patches: Path, out: Path, **changed: Any) -> TokenizerTrainConfig:
    model = DeltaTokConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    fields: dict[str, Any] = {
        "steps": 3,
        "batch_size": 3,
        "validation_fraction": 0.2,
        "eval_every": 2,
        "save_every": 2,
        "device": "cpu",
    }
    return TokenizerTrainConfig(
        patches=str(patches), out=str(out), model=model, **{**fields, **changed}
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, patches: Path) -> Path:
    """A run of two steps."""
    return train_tokenizer(config_of(patches, tmp_path_factory.mktemp("runs") / "run", steps=2))


@pytest.fixture
def checkpoint(trained: Path, tmp_path: Path) -> Path:
    """Its checkpoint, in a copy of a test's own."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run" / CHECKPOINT


def state_of(checkpoint: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((checkpoint / STATE).read_text())
    return value


def forget_checksums(checkpoint: Path) -> None:
    """As a version before this one wrote it."""
    state = state_of(checkpoint)
    del state["files"]
    (checkpoint / STATE).write_text(json.dumps(state))


def is_refused(patches: Path, checkpoint: Path, words: str) -> None:
    out = checkpoint.parent.parent
    with pytest.raises(DamagedShard, match=words) as caught:
        train_tokenizer(config_of(patches, out))
    assert f"remove the folder {checkpoint}" in str(caught.value)
    assert caught.value.exit_code == 1
    assert [path.name for path in checkpoint.parent.iterdir()] == ["step-00000002"]


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER, "config.json", "provenance.json"])
def test_a_flipped_bit_is_found(patches: Path, checkpoint: Path, name: str) -> None:
    flip(checkpoint / name)
    is_refused(patches, checkpoint, rf"{CHECKPOINT}/{name}: not what was written")


def test_a_run_does_not_start_from_a_checkpoint_with_a_flipped_bit(
    patches: Path, checkpoint: Path, tmp_path: Path
) -> None:
    flip(checkpoint / MODEL)
    with pytest.raises(DamagedShard, match=rf"{CHECKPOINT}/{MODEL}: not what was written"):
        train_tokenizer(config_of(patches, tmp_path / "next", start_from=str(checkpoint)))
    for out in (checkpoint, checkpoint.parent.parent):
        with pytest.raises(DamagedShard, match=rf"{CHECKPOINT}/{MODEL}: not what was written"):
            train_tokenizer(
                config_of(patches, tmp_path / "next", start_from=str(out), start_optimizer=True)
            )


def one_missing(tensors: Tensors) -> None:
    del tensors["z_embed.weight.exp_avg"]


def all_of_one_element(tensors: Tensors) -> None:
    for name, tensor in tensors.items():
        tensors[name] = tensor.reshape(-1)[:1].clone()


def one_that_broadcasts(tensors: Tensors) -> None:
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
    tensors[name] = tensors[name][:1].clone()


def all_float64(tensors: Tensors) -> None:
    for name, tensor in tensors.items():
        tensors[name] = tensor.double()


def a_key_without_a_dot(tensors: Tensors) -> None:
    tensors["exp_avg"] = torch.zeros(3)


def a_stranger(tensors: Tensors) -> None:
    tensors["encoder.nowhere.exp_avg"] = torch.zeros(3)


@pytest.mark.parametrize("has_checksums", [True, False])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (one_missing, "missing: z_embed.weight.exp_avg"),
        (all_of_one_element, "misshapen: .*exp_avg"),
        (one_that_broadcasts, "misshapen: .*exp_avg"),
        (all_float64, r"mistyped: .*got torch.float64, wanted torch.float32"),
        (a_key_without_a_dot, "left over: exp_avg"),
        (a_stranger, "left over: encoder.nowhere.exp_avg"),
    ],
)
def test_optimizer_states_that_do_not_fit_are_named(
    patches: Path,
    checkpoint: Path,
    change: Callable[[Tensors], None],
    words: str,
    has_checksums: bool,
) -> None:
    tensors = load_file(checkpoint / OPTIMIZER)
    change(tensors)
    save_file(tensors, checkpoint / OPTIMIZER)
    if has_checksums:
        words = "not what was written"
    else:
        forget_checksums(checkpoint)
    is_refused(patches, checkpoint, rf"{CHECKPOINT}/{OPTIMIZER}: {words}")


def test_a_state_that_was_taken_out_whole_is_found(patches: Path, checkpoint: Path) -> None:
    tensors = load_file(checkpoint / OPTIMIZER)
    for key in ("exp_avg", "exp_avg_sq", "step"):
        del tensors[f"z_embed.weight.{key}"]
    save_file(tensors, checkpoint / OPTIMIZER)
    is_refused(patches, checkpoint, rf"{CHECKPOINT}/{OPTIMIZER}: not what was written")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float16])
def test_weights_of_another_dtype_are_refused(
    patches: Path, checkpoint: Path, dtype: torch.dtype
) -> None:
    forget_checksums(checkpoint)
    tensors = load_file(checkpoint / MODEL)
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, checkpoint / MODEL)
    is_refused(patches, checkpoint, rf"{CHECKPOINT}/{MODEL}: mistyped: .*got {dtype}, wanted")


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER, STATE])
def test_a_pipe_in_place_of_a_file_is_refused_without_waiting(
    patches: Path, checkpoint: Path, name: str
) -> None:
    (checkpoint / name).unlink()
    os.mkfifo(checkpoint / name)
    is_refused(patches, checkpoint, rf"{CHECKPOINT}/{name}: not readable")


@pytest.mark.parametrize("value", [float("nan"), "nan", None, [1.0]])
def test_a_best_value_that_is_no_number_is_refused(
    patches: Path, checkpoint: Path, value: object
) -> None:
    state = state_of(checkpoint)
    state["best"]["value"] = value
    (checkpoint / STATE).write_text(json.dumps(state))
    is_refused(patches, checkpoint, rf"{CHECKPOINT}/{STATE}: ")


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)


@pytest.fixture
def three(patches: Path, trained: Path, tmp_path: Path) -> Path:
    """A run of six steps, with checkpoints after 2, 4 and 6; validation was best after 2."""
    shutil.copytree(trained, tmp_path / "run")
    out = train_tokenizer(config_of(patches, tmp_path / "run", steps=6, keep_checkpoints=3))
    assert [path.name[-1] for path in sorted((out / "checkpoints").iterdir())] == ["2", "4", "6"]
    return out


@pytest.mark.parametrize("has_checksums", [True, False])
@pytest.mark.parametrize("damaged", [(6,), (6, 4)])
def test_damaged_checkpoints_are_skipped_if_asked(
    patches: Path,
    three: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    damaged: tuple[int, ...],
    has_checksums: bool,
) -> None:
    for step in damaged:
        checkpoint = three / f"checkpoints/step-{step:08d}"
        if has_checksums:
            flip(checkpoint / OPTIMIZER)
        else:
            forget_checksums(checkpoint)
            tensors = load_file(checkpoint / OPTIMIZER)
            one_missing(tensors)
            save_file(tensors, checkpoint / OPTIMIZER)
    config = config_of(patches, three, steps=8)
    before = min(damaged) - 2
    with pytest.raises(DamagedShard, match=rf"{OPTIMIZER}: .*--skip-damaged .* step {before};"):
        train_tokenizer(config)
    gone_on = train_tokenizer(replace(config, skip_damaged=True, keep_checkpoints=4))
    for step in damaged:
        assert f"step-{step:08d}/{OPTIMIZER}: " in caplog.text
        assert (three / f"checkpoints/damaged-step-{step:08d}").is_dir()
    assert f"going on after step {before}" in caplog.text
    whole = train_tokenizer(config_of(patches, tmp_path / "whole", steps=8, keep_checkpoints=4))
    names = [MODEL, *(f"checkpoints/step-{step:08d}/{OPTIMIZER}" for step in (4, 6, 8))]
    for name in names:
        assert (gone_on / name).read_bytes() == (whole / name).read_bytes()


def test_where_every_checkpoint_is_damaged_nothing_is_skipped(patches: Path, three: Path) -> None:
    for checkpoint in (three / "checkpoints").iterdir():
        flip(checkpoint / MODEL)
    with pytest.raises(DamagedShard, match=rf"step-00000006/{MODEL}: .*none before it"):
        train_tokenizer(config_of(patches, three, steps=8, skip_damaged=True))
    assert len(list((three / "checkpoints").iterdir())) == 3


def test_a_run_does_not_start_from_a_damaged_model_folder(
    patches: Path, checkpoint: Path, tmp_path: Path
) -> None:
    run = checkpoint.parent.parent
    flip(run / MODEL)
    with pytest.raises(DamagedShard, match=rf"run/{MODEL}: not what was written"):
        train_tokenizer(config_of(patches, tmp_path / "next", start_from=str(run)))


def test_a_run_does_not_start_from_a_pipe(patches: Path, checkpoint: Path, tmp_path: Path) -> None:
    run = checkpoint.parent.parent
    (run / "config.json").unlink()
    os.mkfifo(run / "config.json")
    with pytest.raises(DamagedShard, match=r"run/config\.json: .*no regular file"):
        train_tokenizer(config_of(patches, tmp_path / "next", start_from=str(run)))


def test_a_checkpoint_under_the_name_of_another_step_is_refused(
    patches: Path, checkpoint: Path
) -> None:
    renamed = checkpoint.with_name("step-00000001")
    checkpoint.rename(renamed)
    with pytest.raises(DamagedShard, match=rf"{renamed.name}/{STATE}: of step 2"):
        train_tokenizer(config_of(patches, checkpoint.parent.parent))


def test_a_checkpoint_of_before_checksums_goes_on(
    patches: Path, checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    forget_checksums(checkpoint)
    gone_on = train_tokenizer(config_of(patches, checkpoint.parent.parent))
    assert "has no checksums" in caplog.text
    whole = train_tokenizer(config_of(patches, tmp_path / "whole"))
    assert (gone_on / MODEL).read_bytes() == (whole / MODEL).read_bytes()
