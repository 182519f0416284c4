"""Selections of a stage: low precision and what it may cost, finalists, K by a schedule."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from deltatok.shards import DeltaShards, DeltatokError, Stopped, UsageError
from deltatok.shards.files import sha256_file
from deltatok.train.config import DINOWorldTrainConfig, WorldTrainConfig
from deltatok.train.data.order import RankSlice
from deltatok.train.engine import loop
from deltatok.train.engine.logs import Meter
from deltatok.train.engine.loop import flops_per_sample
from deltatok.train.models.configs import DeltaWorldConfig, DINOWorldConfig
from deltatok.train.models.deltaworld import DeltaWorldNetwork
from deltatok.train.models.dinoworld import DINOWorld
from deltatok.train.selection import selector as selection
from deltatok.train.selection.folded import (
    LARGEST,
    affine8,
    fold,
    predictions,
    product,
    project,
    scaled8,
    weights_of,
)
from deltatok.train.selection.noise import CounterNoise
from deltatok.train.selection.search import ChunkLosses, Winners, select
from deltatok.train.selection.selector import NamedWindows, Selector, check_float8
from deltatok.train.world import DeltaWorldObjective, train_world

Make = Callable[..., Any]
CPU = torch.device("cpu")
WIDE = {"layer_scale_init": 1.0, "initializer_range": 0.3}
"""So that candidates differ: at the first values of training all are alike."""


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def a_world(size: int = 64) -> DeltaWorldNetwork:
    config = DeltaWorldConfig(
        hidden_size=16,
        predictor_hidden_size=size,
        predictor_num_hidden_layers=3,
        predictor_num_heads=2,
        rope_axis_sizes=(28,),
        **WIDE,
    )
    return DeltaWorldNetwork(config, generator=torch.Generator().manual_seed(0)).eval()


def windows(count: int = 6) -> NamedWindows:
    times = draw(1, count, 5).abs().cumsum(1)
    return NamedWindows(draw(0, count, 5, 16), times, [("test", number) for number in range(count)])


def selector(world: DeltaWorldNetwork, **changed: Any) -> Selector:
    fields = {"deltas": "d", "out": "o", "log_every": 1, "model": world.config}
    return Selector(world, WorldTrainConfig(**{**fields, **changed}), device=CPU)


def regret(picked: Winners, exact: Winners, world: DeltaWorldNetwork) -> float:
    """From the forward pass, independently of what the trainer logs."""
    given = windows(len(picked.indices))
    with torch.no_grad():
        predicted = world(given.tokens, given.timestamps, picked.queries[:, :, 0])
    losses = torch.nn.functional.smooth_l1_loss(
        predicted, given.tokens[:, 1:], beta=0.1, reduction="none"
    ).mean(2)
    return float(((losses - exact.best_losses) / exact.best_losses).mean())


def test_low_precision_is_measured_against_float32() -> None:
    world = a_world()
    fields = {"selection_dtype": "bfloat16", "selection_check_windows": 40}
    picked, values = selector(world, **fields).train(windows(40), step=0, checks=True)
    exact, none = selector(world).train(windows(40), step=0, checks=True)
    assert set(none) == {"mean_candidate_loss"}
    same = (picked.indices == exact.indices).float().mean().item()
    assert 0.5 < same < 1  # of 256 candidates some are within bfloat16's rounding
    assert values["selection_agreement"].item() == pytest.approx(same)
    measured = values["selection_regret"].item()
    assert 0 < measured < 0.01
    assert measured == pytest.approx(regret(picked, exact, world), rel=0.05)


def test_finalists_are_decided_in_the_precision_of_training() -> None:
    world = a_world()
    exact, _ = selector(world).train(windows(), step=0, checks=False)
    fields = {"selection_dtype": "bfloat16", "selection_finalists": 8}
    found, values = selector(world, **fields).train(windows(), step=0, checks=True)
    assert torch.equal(found.indices, exact.indices)
    torch.testing.assert_close(found.best_losses, exact.best_losses)
    assert torch.equal(found.queries, exact.queries)
    assert values["selection_agreement"] == 1
    assert values["selection_regret"] < 1e-6


def test_more_finalists_than_candidates_are_all_of_them() -> None:
    world = a_world()
    world.config = dataclasses.replace(world.config, num_samples_train=3)
    fields = {"selection_dtype": "bfloat16", "selection_finalists": 8}
    found, _ = selector(world, **fields).train(windows(), step=0, checks=False)
    exact, _ = selector(world).train(windows(), step=0, checks=False)
    assert torch.equal(found.indices, exact.indices)


def test_too_much_regret_stops_the_run(world_config: Make) -> None:
    config = world_config(
        model={**WIDE, "num_samples_train": 64},
        selection_dtype="bfloat16",
        selection_max_regret=0.0,
        log_every=2,
    )
    words = r"step 2: selection in bfloat16 has a regret of .* wanted at most .* 0\.0"
    with pytest.raises(DeltatokError, match=words):
        train_world(config)
    assert not (Path(config.out) / "model.safetensors").exists()
    train_world(dataclasses.replace(config, selection_dtype="auto"))  # as the error advises


def test_regret_is_logged_and_the_same_when_the_run_was_stopped(
    world_config: Make, tmp_path: Path, log_lines: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = world_config(
        steps=4, log_every=2, selection_dtype="bfloat16", out=str(tmp_path / "whole"), model=WIDE
    )
    train_world(config)
    lines = log_lines(config.out, ["train"])
    assert all({"selection_regret", "selection_agreement"} < line.keys() for line in lines)
    cut = dataclasses.replace(config, out=str(tmp_path / "cut"))
    stop_after(3, cut, monkeypatch)
    train_world(cut)
    assert log_lines(cut.out) == log_lines(config.out)
    assert model_of(cut) == model_of(config)


@pytest.mark.parametrize("size", [64, 48])
def test_float8_is_refused_where_there_is_none(size: int) -> None:
    words = "selection_dtype float8: got cpu, wanted a GPU of compute capability 8.9 or more"
    with pytest.raises(UsageError, match=words):
        selector(a_world(), selection_dtype="float8")


def test_float8_is_refused_on_an_older_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    with pytest.raises(UsageError, match=r"got A100 \(compute capability 8.0\), wanted"):
        check_float8(a_world(), torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    check_float8(a_world(), torch.device("cuda"))  # the first that has it


def test_float8_is_refused_for_sizes_it_cannot_multiply(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    check_float8(a_world(), torch.device("cuda"))
    world = a_world()
    world.config = dataclasses.replace(
        world.config, predictor_hidden_size=72, rope_axis_sizes=(32,)
    )
    with pytest.raises(UsageError, match="predictor_hidden_size 72, wanted a multiple of 16"):
        check_float8(world, torch.device("cuda"))


def test_float8_rounds_to_its_three_bits() -> None:
    x = draw(0, 50, 64) * draw(1, 50, 1).exp()
    rounded, scale = scaled8(x)
    assert rounded.dtype == torch.float8_e4m3fn
    back = rounded.float() * scale
    assert ((back - x).abs() <= x.abs() / 16 + scale * 2**-10).all()
    assert rounded.float().abs().amax(1).tolist() == [LARGEST] * 50
    zeros, scale = scaled8(torch.zeros(2, 3))
    assert torch.equal(zeros.float() * scale, torch.zeros(2, 3))


def test_float8_products_are_those_of_their_rounded_factors() -> None:
    """On the CPU, which multiplies float8 too, if slowly."""
    linear = nn.Linear(64, 32)
    x = draw(0, 3, 5, 64)
    layer = affine8(linear)
    with torch.no_grad():
        weight = layer.weight.float() * layer.scale.t()
        rows, scale = scaled8(x.flatten(0, 1))
        wanted = (rows.float() * scale) @ weight.t() + linear.bias
        got = product(x, layer).flatten(0, 1)
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), wanted, atol=2e-2, rtol=1e-2)
        exact = linear(x).flatten(0, 1)
    assert (got - exact).norm() / exact.norm() < 0.06


def test_float8_predicts_nearly_the_same() -> None:
    world, given = a_world(), windows()
    noise = draw(3, 6, 4, 5, 64)
    with torch.no_grad():
        results = []
        for products in ("float32", "bfloat16", "float8"):
            weights = weights_of(world, products)  # type: ignore[arg-type]
            folded = fold(weights, project(weights, given.tokens), given.timestamps)
            results.append(predictions(weights, folded, noise).float())
    errors = [float((got - results[0]).norm() / results[0].norm()) for got in results[1:]]
    assert 0 < errors[0] < 0.01 < errors[1] < 0.1


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"selection_dtype": "float16"}, "selection_dtype 'float16': wanted one of auto, float32"),
        ({"selection_finalists": 0}, "selection_finalists 0: wanted at least 1"),
        ({"selection_finalists": 4}, "selection_finalists 4: wanted a selection_dtype as well"),
        ({"selection_max_regret": -1.0}, "selection_max_regret -1.0: wanted at least 0"),
        ({"selection_check_windows": 0}, "selection_check_windows 0: wanted at least 1"),
        ({"num_samples_schedule": ((1, 8),)}, r"begins at the steps \[1\]: wanted 0 first"),
        ({"num_samples_schedule": ((0, 8), (0, 16))}, r"steps \[0, 0\]: wanted 0 first, then ri"),
        ({"num_samples_schedule": ((0, 8), (9, 16), (5, 2))}, "then rising steps"),
        ({"num_samples_schedule": ((0, 0),)}, "num_samples_schedule 0: wanted at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        WorldTrainConfig(deltas="d", out="o", **fields)


def test_a_schedule_gives_each_step_its_candidates() -> None:
    config = WorldTrainConfig(deltas="d", out="o", num_samples_schedule=((0, 4), (3, 16), (7, 64)))
    counts = [config.num_samples_at(step, default=256) for step in range(9)]
    assert counts == [4, 4, 4, 16, 16, 16, 16, 64, 64]
    assert WorldTrainConfig(deltas="d", out="o").num_samples_at(5, default=256) == 256


def test_the_first_candidates_are_the_same_for_any_number_of_them() -> None:
    """K = 8 is the first 8 of K = 16: runs with different K compare like with like."""
    noise = CounterNoise(torch.tensor([1, 2]), 4, 64, 1.0)
    few, many = noise.chunk(torch.tensor(0), 8), noise.chunk(torch.tensor(0), 16)
    assert torch.equal(few, many[:, :, :8])


def test_a_run_follows_its_schedule(world_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def spying(*given: Any, **named: Any) -> Winners:
        seen.append(named["num_samples"])
        return select(*given, **named)

    monkeypatch.setattr(selection, "select", spying)
    monkeypatch.setattr(loop, "flops_per_sample", lambda *_, **__: 1.0)
    train_world(world_config(num_samples_schedule=((0, 2), (2, 5), (4, 7)), validation_fraction=0))
    assert seen == [2, 2, 5, 5, 7, 7]


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_schedule_is_resumed_exactly(
    world_config: Make, tmp_path: Path, log_lines: Make, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    schedule = ((0, 2), (2, 9))
    config = world_config(steps=4, num_samples_schedule=schedule, out=str(tmp_path / "whole"))
    train_world(config)
    cut = dataclasses.replace(config, out=str(tmp_path / "cut"))
    stop_after(step, cut, monkeypatch)
    train_world(cut)
    assert log_lines(cut.out) == log_lines(config.out)
    assert model_of(cut) == model_of(config)


def test_another_schedule_is_another_run(world_config: Make) -> None:
    config = world_config(steps=2, num_samples_schedule=((0, 2),))
    train_world(config)
    changed = dataclasses.replace(config, steps=3, num_samples_schedule=((0, 2), (2, 4)))
    with pytest.raises(DeltatokError, match="config num_samples_schedule is"):
        train_world(changed)


def test_flops_are_counted_anew_where_the_schedule_changes(
    world_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[tuple[int, float]] = []

    def counting(*given: Any, step: int, **named: Any) -> float:
        counted.append((step, flops_per_sample(*given, step=step, **named)))
        return counted[-1][1]

    monkeypatch.setattr(loop, "flops_per_sample", counting)
    train_world(world_config(num_samples_schedule=((0, 2), (3, 9)), selection_dtype="bfloat16"))
    assert [step for step, _ in counted] == [0, 3]
    layers, positions, mlp = 2, 4, 2 * 2 * 16 * 64
    more = counted[1][1] - counted[0][1]
    assert 1 < more / (7 * positions * layers * mlp) < 1.5  # attention and head beside the MLP


def test_the_log_counts_each_step_with_its_own_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("deltatok.train.engine.logs.time.perf_counter", lambda: clock[0])
    meter = Meter("windows", CPU)
    meter.flop_per_sample = 1e12
    meter.count(3)
    meter.flop_per_sample = 5e12
    meter.count(1)
    clock[0] = 4.0
    assert meter.report()["tflop_per_s"] == 2.0


def test_selection_is_one_graph() -> None:
    """Nothing in it waits for the device or breaks the graph; the last chunk is no other shape."""
    world, given = a_world(), windows()
    noise = CounterNoise(torch.arange(6), 4, 64, 0.3)
    graphs: list[Any] = []

    def capture(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = ChunkLosses()
    compiled.compile(backend=capture, fullgraph=True, dynamic=False)
    found = select(
        world,
        given.tokens,
        given.timestamps,
        noise,
        num_samples=23,
        chunks=selection.default_chunks(
            world, given.tokens, num_samples=23, products="float32", memory_mb=1
        )._replace(windows=4, samples=5),
        chunk_losses=compiled,
    )
    assert len(graphs) == 1
    plain = select(world, given.tokens, given.timestamps, noise, num_samples=23)
    assert torch.equal(found.indices, plain.indices)
    torch.testing.assert_close(found.best_losses, plain.best_losses)


def test_only_what_is_asked_for_is_compiled(
    world_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(
        nn.Module, "compile", lambda self, **_: compiled.append(type(self).__name__)
    )
    monkeypatch.setattr(loop, "check_compiler", lambda device: None)
    monkeypatch.setattr(selection, "check_compiler", lambda device: None)
    for fields, wanted in (
        ({"compile": True}, ["ChunkLosses"]),
        ({"compile": True, "compile_selection": False}, []),
        ({"compile_selection": True}, ["ChunkLosses"]),
        ({"compile": True, "model": {"use_bom": False}}, []),
        ({}, []),
    ):
        compiled.clear()
        config = world_config(**fields)
        model = DeltaWorldNetwork(config.model)
        DeltaWorldObjective(model, DeltaShards(config.deltas), config, RankSlice(), device=CPU)
        assert compiled == wanted


def stop_after(step: int, config: WorldTrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train, and be asked to stop during that step."""
    read, left = loop.Trainer._read_numbers, [step]

    def stopping(self: loop.Trainer, *given: Any, **known: Any) -> loop.Update:
        left[0] -= 1
        return read(self, *given, **known)._replace(stopping=left[0] == 0)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_read_numbers", stopping)
        with pytest.raises(Stopped):
            train_world(config)


def model_of(config: WorldTrainConfig) -> str:
    return sha256_file(Path(config.out) / "model.safetensors")


def test_float8_is_for_the_mlps_and_bfloat16_for_the_rest() -> None:
    weights = weights_of(a_world(), "float8")
    layer = weights.layers[0]
    assert {part.weight.dtype for part in (layer.up, layer.down)} == {torch.float8_e4m3fn}
    rest = (layer.queries, layer.keys_values, layer.out, weights.head)
    assert {part.weight.dtype for part in rest} == {torch.bfloat16}
    assert {part.weight.dtype for part in (layer.norm1, layer.norm2, weights.norm)} == {
        torch.float32
    }


def test_two_finalists_are_compared_in_the_precision_of_training() -> None:
    world, given = a_world(), windows()
    fields = {"selection_dtype": "bfloat16", "selection_finalists": 2}
    found, _ = selector(world, **fields).train(given, step=0, checks=False)
    with torch.no_grad():
        predicted = world(given.tokens, given.timestamps, found.queries[:, :, 0])
    losses = torch.nn.functional.smooth_l1_loss(
        predicted, given.tokens[:, 1:], beta=0.1, reduction="none"
    )
    torch.testing.assert_close(found.best_losses, losses.mean(2), atol=1e-6, rtol=1e-5)
    all_of_them, _ = selector(world, selection_dtype="bfloat16").train(given, step=0, checks=False)
    assert torch.equal(found.mean_losses, all_of_them.mean_losses)  # not the finalists' mean


def test_a_regret_at_its_limit_goes_on() -> None:
    strict = selector(a_world(), selection_dtype="bfloat16", selection_max_regret=0.25)
    strict.check({"loss": 1.0, "selection_regret": 0.25}, step=1)
    strict.check({"loss": 1.0}, step=2)
    with pytest.raises(DeltatokError, match=r"step 3: selection in bfloat16 has a regret of 0\.26"):
        strict.check({"loss": 1.0, "selection_regret": 0.26}, step=3)


def test_an_evaluation_selects_in_the_precision_of_training() -> None:
    world = a_world()
    low = selector(world, selection_dtype="bfloat16").evaluate(windows())
    assert torch.equal(low.best_losses, selector(world).evaluate(windows()).best_losses)


def test_another_seed_draws_other_candidates() -> None:
    one, other = (selector(a_world(), seed=seed).noise(windows()) for seed in (0, 1))
    assert not set(one.keys.tolist()) & set(other.keys.tolist())


def test_a_run_in_bfloat16_selects_in_bfloat16() -> None:
    world, given = a_world(), windows()
    in_training = selector(world, precision="bfloat16")
    found, values = in_training.train(given, step=0, checks=True)
    noise, count = in_training.noise(given), world.config.num_samples_train
    wanted, exact = (
        select(
            world, given.tokens, given.timestamps, noise, num_samples=count, products=products
        ).best_losses
        for products in ("bfloat16", "float32")
    )
    torch.testing.assert_close(found.best_losses, wanted, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(found.best_losses, exact, atol=1e-6, rtol=1e-5)
    assert set(values) == {"mean_candidate_loss"}


def test_training_selects_with_what_is_compiled_and_evaluation_without() -> None:
    calls: list[int] = []
    used = selector(a_world())
    used._chunk_losses.register_forward_hook(lambda *_: calls.append(1))
    used.evaluate(windows())
    assert calls == []
    used.train(windows(), step=0, checks=False)
    assert calls


def test_every_validation_window_has_noise_of_its_own(
    world_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[list[int]] = []

    def spying(*given: Any, **named: Any) -> Winners:
        if named["num_samples"] == 4:  # num_samples_eval
            drawn.append(given[3].keys.tolist())
        return select(*given, **named)

    monkeypatch.setattr(selection, "select", spying)
    train_world(world_config(steps=2, eval_every=1))
    first, second = drawn
    assert len(set(first)) == len(first) > 1
    assert first == second  # the same every time


def test_dinoworld_selects_in_its_selection_dtype_too() -> None:
    config = DINOWorldConfig(
        hidden_size=16,
        predictor_hidden_size=16,
        predictor_num_hidden_layers=1,
        predictor_num_heads=1,
        rope_axis_sizes=(4, 4, 4),
        use_bom=True,
        num_samples_train=8,
        **WIDE,
    )
    world = DINOWorld(config, generator=torch.Generator().manual_seed(0)).eval()
    given = NamedWindows(draw(0, 2, 3, 4, 16), draw(1, 2, 3).abs().cumsum(1), [("a", 0), ("a", 1)])

    def found(**changed: Any) -> Winners:
        fields = {"patches": "p", "out": "o", "model": config, **changed}
        stage = Selector(world, DINOWorldTrainConfig(**fields), device=CPU, grid=(2, 2))
        return stage.train(given, step=0, checks=False)[0]

    exact, low = found(), found(selection_dtype="bfloat16")
    assert not torch.equal(exact.mean_losses, low.mean_losses)
    torch.testing.assert_close(exact.mean_losses, low.mean_losses, atol=0, rtol=0.02)
    decided = found(selection_dtype="bfloat16", selection_finalists=8)
    assert decided.finalists.shape == (2, 2, 8)
    assert torch.equal(decided.indices, exact.indices)
