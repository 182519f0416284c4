"""What a step does: rates, clipping, micro-batches, refusals; and that training works at all."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deltatok.shards import CacheMismatch, DeltatokError, PatchShards, UsageError
from deltatok.train.data.order import generator
from deltatok.train.engine.checkpoints import find_checkpoints
from deltatok.train.engine.model_folder import read_provenance, read_tensors
from deltatok.train.models.deltatok import DeltaTok
from deltatok.train.tokenizer import TokenizerObjective, train_tokenizer

Make = Callable[..., Any]


def test_tokenizer_learns_to_beat_copy_last_with_its_delta_token(
    tokenizer_config: Make, make_patches: Make, tmp_path: Path, log_lines: Make
) -> None:
    config = tokenizer_config(
        patches=str(make_patches(tmp_path / "patches", num_clips=60)),
        steps=150,
        batch_size=24,
        lr=1e-2,
        warmup_steps=10,
        eval_every=150,
        save_every=150,
    )
    train_tokenizer(config)
    losses = [line["loss"] for line in log_lines(config.out, ["train"])]
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:5])
    values = log_lines(config.out, ["validation"])[-1]
    assert values["validation_copy_last_ratio"] < 0.7
    assert values["validation_z_swap_ratio"] > 2
    assert 1 < values["validation_z_participation_ratio"] <= 16


def test_run_folder_ends_as_a_model_folder_with_its_story(
    tokenizer_config: Make, patches: Path
) -> None:
    config = tokenizer_config(steps=2)
    out = train_tokenizer(config)
    model = DeltaTok.from_pretrained(out)
    assert model.config == config.model
    assert read_provenance(out) == {
        "patches": PatchShards(patches).info.identity,
        "patches_fingerprint": PatchShards(patches).fingerprint,
    }
    story = json.loads((out / "train.json").read_text())
    assert story["config"]["lr"] == config.lr
    assert story["command"] == "tokenizer"
    last = find_checkpoints(out / "checkpoints")[-1][1]
    for name, tensor in read_tensors(last / "model.safetensors").items():
        assert torch.equal(tensor, model.state_dict()[name])


def test_first_update_has_learning_rate_zero(tokenizer_config: Make, log_lines: Make) -> None:
    config = tokenizer_config(steps=4, warmup_steps=2, lr=0.5, weight_decay=0.0, save_every=1)
    out = train_tokenizer(config)
    rates = [line["learning_rate"] for line in log_lines(out, ["train"])]
    assert rates == [0.0, 0.25, 0.5, 0.5]


def test_first_update_changes_no_weight(tokenizer_config: Make) -> None:
    config = tokenizer_config(steps=1)
    out = train_tokenizer(config)
    fresh = DeltaTok(config.model, generator=generator(config.seed, "first weights"))
    trained = DeltaTok.from_pretrained(out).state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in fresh.state_dict().items())


def test_seed_decides_weights_and_order(tokenizer_config: Make, tmp_path: Path) -> None:
    outs = [
        train_tokenizer(tokenizer_config(steps=2, seed=seed, out=str(tmp_path / name)))
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    a, b, c = ((out / "model.safetensors").read_bytes() for out in outs)
    assert a == b != c


def test_micro_batches_change_no_step(
    tokenizer_config: Make, tmp_path: Path, log_lines: Make
) -> None:
    whole = train_tokenizer(tokenizer_config(steps=4, out=str(tmp_path / "whole")))
    parts = train_tokenizer(tokenizer_config(steps=4, micro_batch_size=4))
    for one, other in zip(log_lines(whole), log_lines(parts), strict=True):
        assert one.pop("kind") == other.pop("kind")
        assert one == pytest.approx(other, rel=1e-4)


def test_gradient_is_clipped(
    tokenizer_config: Make, monkeypatch: pytest.MonkeyPatch, log_lines: Make
) -> None:
    norms: list[float] = []
    step = torch.optim.AdamW.step

    def watched(self: torch.optim.AdamW, *arguments: Any, **named: Any) -> Any:
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())
        return step(self, *arguments, **named)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    config = tokenizer_config(steps=2, clip_grad_norm=1e-4)
    train_tokenizer(config)
    assert norms == pytest.approx([1e-4, 1e-4], rel=0.02)
    assert all(line["gradient_norm"] > 1e-3 for line in log_lines(config.out, ["train"]))


def test_loss_that_is_not_finite_stops_before_the_weights_change(
    tokenizer_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = TokenizerObjective.losses

    def broken(self: TokenizerObjective, *arguments: Any, step: int, **named: Any) -> Any:
        values, extras = losses(self, *arguments, step=step, **named)
        if step == 4:
            values = values * torch.tensor([1.0] * 8 + [math.nan])
        return values, extras

    monkeypatch.setattr(TokenizerObjective, "losses", broken)
    config = tokenizer_config(save_every=1)
    with pytest.raises(DeltatokError, match=r"step 5: loss nan.*not changed.*window \d+ of clip"):
        train_tokenizer(config)
    assert find_checkpoints(Path(config.out) / "checkpoints")[-1][0] == 4


def test_gradient_that_is_not_finite_stops(
    tokenizer_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = TokenizerObjective.losses

    def broken(self: TokenizerObjective, *arguments: Any, **named: Any) -> Any:
        values, extras = losses(self, *arguments, **named)
        values.register_hook(lambda gradient: gradient * math.inf)
        return values, extras

    monkeypatch.setattr(TokenizerObjective, "losses", broken)
    with pytest.raises(DeltatokError, match=r"gradient norm nan.*its own losses are finite"):
        train_tokenizer(tokenizer_config())


def test_fewer_windows_than_a_batch_are_refused(tokenizer_config: Make) -> None:
    with pytest.raises(UsageError, match=r"\d+ training windows .* one batch takes 100"):
        train_tokenizer(tokenizer_config(batch_size=300))


def test_hidden_size_is_taken_from_the_cache(tokenizer_config: Make) -> None:
    config = tokenizer_config(steps=1, model={"hidden_size": 768})
    assert DeltaTok.from_pretrained(train_tokenizer(config)).config.hidden_size == 16


def test_other_hidden_size_than_the_caches_is_refused(tokenizer_config: Make) -> None:
    with pytest.raises(CacheMismatch, match=r"model.hidden_size is 32, the tokens in .* have 16"):
        train_tokenizer(tokenizer_config(model={"hidden_size": 32}))


def test_run_starts_from_the_weights_of_another(tokenizer_config: Make, tmp_path: Path) -> None:
    first = train_tokenizer(tokenizer_config(steps=3))
    config = tokenizer_config(
        steps=1,
        out=str(tmp_path / "cooldown"),
        start_from=str(first),
        model={"layer_scale_init": 0.7},
    )
    second = train_tokenizer(config)  # its only update has learning rate 0
    one, other = (read_tensors(out / "model.safetensors") for out in (first, second))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_weights_of_another_shape_are_no_start(tokenizer_config: Make, tmp_path: Path) -> None:
    first = train_tokenizer(tokenizer_config(steps=1))
    config = tokenizer_config(
        out=str(tmp_path / "next"), start_from=str(first), model={"num_hidden_layers": 1}
    )
    with pytest.raises(CacheMismatch, match="num_hidden_layers is 2, this run's model has 1"):
        train_tokenizer(config)


def test_bfloat16_trains_and_keeps_float32_weights(tokenizer_config: Make, log_lines: Make) -> None:
    out = train_tokenizer(tokenizer_config(precision="bfloat16"))
    assert {t.dtype for t in read_tensors(out / "model.safetensors").values()} == {torch.float32}
    losses = [line["validation_loss"] for line in log_lines(out, ["validation"])]
    assert losses[-1] < losses[0]


def test_log_tells_rate_and_waiting(tokenizer_config: Make) -> None:
    out = train_tokenizer(tokenizer_config(steps=2))
    line = json.loads((out / "log.jsonl").read_text().splitlines()[0])
    assert line["pairs_per_s"] > 0
    assert 0 <= line["loader_wait_share"] <= 1


def test_no_validation_clips_no_evaluation(tokenizer_config: Make, log_lines: Make) -> None:
    out = train_tokenizer(tokenizer_config(steps=3, validation_fraction=0))
    assert log_lines(out, ["validation"]) == []
