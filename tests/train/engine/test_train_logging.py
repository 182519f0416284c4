"""What a run tells of itself: rates, FLOPs, memory, time to go; TensorBoard and W&B if asked."""

import json
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch

from deltatok.shards import UsageError
from deltatok.shards.files import sha256_file
from deltatok.train.engine import logs as trackers
from deltatok.train.engine import loop
from deltatok.train.engine.loop import flops_per_sample
from deltatok.train.tokenizer import TokenizerObjective, train_tokenizer
from deltatok.train.world import train_world

Make = Callable[..., Any]


def lines_of(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def test_log_tells_speed_memory_and_time_to_go(world_config: Make) -> None:
    lines = lines_of(train_world(world_config(steps=3)))
    for line in lines:
        assert line["tokens_per_s"] == pytest.approx(5 * line["windows_per_s"])
        assert line["tflop_per_s"] > 0
        assert 0.05 < line["peak_memory_gb"] < 64
    assert lines[0]["eta_s"] == pytest.approx(2 * 8 / lines[0]["windows_per_s"])
    assert lines[-1]["eta_s"] == 0


def test_flops_are_those_of_the_matrix_products(
    tokenizer_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 per multiply-add; the backward pass takes twice the forward's, but for what needs none."""
    seen: list[float] = []

    def watched(stage: Any, batch: Any, **named: Any) -> float:
        state = torch.random.get_rng_state()
        seen.append(flops_per_sample(stage, batch, **named))
        assert torch.equal(torch.random.get_rng_state(), state)
        assert all(parameter.grad is None for parameter in stage.model.parameters())
        return seen[0]

    monkeypatch.setattr(loop, "flops_per_sample", watched)
    model = {"num_hidden_layers": 1, "use_gated_attn": False}
    out = train_tokenizer(tokenizer_config(steps=2, model=model))
    (counted,) = seen
    for line in lines_of(out):
        rate = line["pairs_per_s"] * counted / 1e12
        assert line["tflop_per_s"] == pytest.approx(rate)
    size, mlp, encoder, decoder = 16, 16, 1 + 2 * 4, 1 + 4  # mlp: two thirds of 24

    def block(length: int, queries: int) -> int:
        products = 2 * length * size * size  # keys and values
        products += 2 * queries * size * size  # queries and output
        products += 2 * length * queries * size  # scores and weighted values
        return 2 * (products + 3 * queries * size * mlp)  # SwiGLU has three matrices

    forward = block(encoder, 1) + block(decoder, decoder)
    assert 2.4 * forward < counted < 3.3 * forward


def test_counting_flops_changes_no_bit(
    world_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = train_world(world_config())
    monkeypatch.setattr(loop, "flops_per_sample", lambda *arguments, **named: 1.0)
    plain = train_world(world_config(out=str(tmp_path / "plain")))
    assert sha256_file(counted / "model.safetensors") == sha256_file(plain / "model.safetensors")


class Recorder:
    """Stands for an accelerate tracker: remembers what it was told."""

    made: list["Recorder"]

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.arguments, self.named = arguments, named
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.told: list[str] = []
        Recorder.made.append(self)

    def start(self) -> None:
        self.told.append("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.told.append("configuration")
        self.configuration = values

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.told.append("finish")


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    """Every tracker is a Recorder, and its package is there."""
    Recorder.made = []
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(loop, "check_trackers", lambda names: None)
    for name in ("tensorboard", "wandb"):
        monkeypatch.setitem(trackers.LOGGER_TYPE_TO_CLASS, name, Recorder)
    return Recorder.made


def test_trackers_get_every_line_and_the_config(
    tokenizer_config: Make, recorded: list[Recorder]
) -> None:
    config = tokenizer_config(trackers=("tensorboard", "wandb"), steps=3)
    out = train_tokenizer(config)
    board, wandb = recorded
    assert board.arguments == ("tensorboard", str(out))
    assert wandb.named == {"dir": str(out), "name": "run", "mode": "offline"}
    assert board.told == wandb.told == ["start", "configuration", "finish"]
    assert board.configuration["model.layer_scale_init"] == 0.1
    lines = lines_of(out)
    assert [step for step, _ in board.logged] == [1, 2, 3, 3]
    assert [values["train/loss"] for _, values in board.logged[:3]] == [x["loss"] for x in lines]
    assert "validation/z_swap_ratio" in board.logged[3][1]


def test_trackers_of_a_run_that_goes_on_hide_what_came_after(
    tokenizer_config: Make, recorded: list[Recorder]
) -> None:
    train_tokenizer(tokenizer_config(trackers=("tensorboard",), steps=2))
    train_tokenizer(tokenizer_config(trackers=("tensorboard",), steps=4))
    assert recorded[1].named == {"purge_step": 3}
    assert recorded[1].told == ["start", "finish"]


def test_trackers_are_ended_when_training_fails(
    tokenizer_config: Make, recorded: list[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **named: Any) -> Any:
        raise RuntimeError("a bug")

    monkeypatch.setattr(TokenizerObjective, "losses", fail)
    monkeypatch.setattr(loop, "flops_per_sample", lambda *arguments, **named: 1.0)
    with pytest.raises(RuntimeError, match="a bug"):
        train_tokenizer(tokenizer_config(trackers=("wandb",)))
    assert recorded[0].told == ["start", "configuration", "finish"]


def test_tracker_that_is_not_installed_is_refused(
    tokenizer_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(trackers, "distribution", missing)
    with pytest.raises(UsageError, match=r"wandb is not installed: pip install 'deltatok\[wandb\]"):
        train_tokenizer(tokenizer_config(trackers=("wandb",)))


def test_unknown_tracker_is_refused(tokenizer_config: Make) -> None:
    with pytest.raises(UsageError, match="trackers 'mlflow': wanted one of tensorboard, wandb"):
        tokenizer_config(trackers=("mlflow",))


def test_tensorboard_files_hold_the_losses(tokenizer_config: Make) -> None:
    pytest.importorskip("tensorboard", reason="pip install deltatok[tensorboard]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = train_tokenizer(tokenizer_config(trackers=("tensorboard",), steps=3))
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    points = [(point.step, point.value) for point in events.Scalars("train/loss")]
    assert points == [(x["step"], pytest.approx(x["loss"])) for x in lines_of(out)]
