"""torch.compile changes a run by rounding only, and says so where nothing can be compiled."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from deltatok.shards import UsageError
from deltatok.train.engine import loop
from deltatok.train.engine.model_folder import read_tensors
from deltatok.train.selection import selector as selection
from deltatok.train.tokenizer import train_tokenizer
from deltatok.train.world import train_world

Make = Callable[..., Any]

pytestmark = pytest.mark.filterwarnings(
    "ignore:.torch.jit:DeprecationWarning"  # torch's compiler uses it itself, when imported
)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was captured. Graphs are differentiated as ever, then run by torch's own kernels:
    generating code takes half a minute a model on this kind of machine (test_train_head.py does
    for one)."""
    seen: list[Any] = []
    compile_module = nn.Module.compile
    backend = torch._dynamo.lookup_backend("aot_eager")

    def capture(graph: Any, inputs: Any) -> Any:
        seen.append(graph)
        return backend(graph, inputs)

    for module in (loop, selection):
        monkeypatch.setattr(module, "check_compiler", lambda device: None)
    monkeypatch.setattr(
        nn.Module, "compile", lambda self, **_: compile_module(self, backend=capture)
    )
    return seen


def same_lines(one: list[dict[str, Any]], other: list[dict[str, Any]], *, rel: float) -> None:
    assert len(one) == len(other) > 0
    for mine, theirs in zip(one, other, strict=True):
        assert mine.pop("kind") == theirs.pop("kind")
        assert mine == pytest.approx(theirs, rel=rel)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "rel"), [("float32", 1e-4), ("bfloat16", 3e-2)])
def test_compiled_world_equals_the_eager_one(
    world_config: Make,
    tmp_path: Path,
    log_lines: Make,
    graphs: list[Any],
    precision: str,
    rel: float,
) -> None:
    fields = {"steps": 3, "precision": precision, "micro_batch_size": 4}
    eager = train_world(world_config(out=str(tmp_path / "eager"), **fields))
    assert not graphs
    compiled = train_world(world_config(compile=True, **fields))
    # Selection and model: no break, and none anew for the second portion or step.
    assert len(graphs) == 2
    same_lines(log_lines(eager), log_lines(compiled), rel=rel)
    one, other = (read_tensors(run / "model.safetensors") for run in (eager, compiled))
    assert one.keys() == other.keys()
    if precision == "float32":
        assert all(torch.allclose(one[name], other[name], atol=2e-5) for name in one)


@pytest.mark.slow
def test_compiled_tokenizer_equals_the_eager_one(
    tokenizer_config: Make, tmp_path: Path, log_lines: Make, graphs: list[Any]
) -> None:
    eager = train_tokenizer(tokenizer_config(steps=3, out=str(tmp_path / "eager")))
    assert not graphs
    compiled = train_tokenizer(tokenizer_config(steps=3, compile=True))
    assert len(graphs) == 1
    same_lines(log_lines(eager), log_lines(compiled), rel=1e-4)


def test_compiling_without_a_compiler_is_refused(
    world_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*arguments: Any, **named: Any) -> Any:
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found")

    config = world_config(compile=True)
    monkeypatch.setattr(torch, "compile", none)
    with pytest.raises(UsageError, match=r"nothing can be compiled here .*No working C\+\+"):
        train_world(config)
