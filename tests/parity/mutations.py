"""Does the parity suite notice mistakes? Each mutation breaks one thing; a case must fail.

    python tests/parity/mutations.py [--golden DIR] [NAME ...]

Applied in memory, one at a time, each in a process of its own. Prints a table; exit code 1 if a
mutation goes unnoticed, or if the unbroken code fails.
"""

import argparse
import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deltatok.evaluate.forecast import rollout
from deltatok.train import losses
from deltatok.train.models import blocks, deltatok, deltaworld, dinoworld, rope
from deltatok.train.selection import folded
from deltatok.train.selection import search as best_of_many

MODELS = Path(__file__).resolve().with_name("test_parity_models.py")
split = blocks._split_heads


def unbroken() -> None:
    """the code as it is (every case must pass)"""


def keys_not_rotated() -> None:
    """tokenizer: RoPE not applied to keys"""
    _patch(blocks.SelfAttention, "forward", _attention(rotate_keys=False))


def predictor_keys_not_rotated() -> None:
    """predictor: RoPE not applied to keys"""

    def keys_values(self: Any, tokens: Tensor, _rope: Any) -> tuple[Tensor, Tensor]:
        k, v = self.kv_proj(tokens).chunk(2, dim=-1)
        return split(k, self.head_dim), split(v, self.head_dim)

    _patch(blocks.CrossAttention, "keys_values", keys_values)


def values_rotated() -> None:
    """predictor: RoPE applied to values too"""
    original = blocks.CrossAttention.keys_values

    def keys_values(self: Any, tokens: Tensor, table: Any) -> tuple[Tensor, Tensor]:
        k, v = original(self, tokens, table)
        return k, rope.rotate_axes(v, table)

    _patch(blocks.CrossAttention, "keys_values", keys_values)


def gate_before_attention() -> None:
    """gate before instead of after attention"""
    _patch(blocks.SelfAttention, "forward", _attention(gate_values=True))


def norm_before_rotation() -> None:
    """qk-norm before instead of after the rotation"""
    _patch(blocks.SelfAttention, "forward", _attention(norm_first=True))


def embeddings_exchanged() -> None:
    """embeddings of previous and current frame exchanged"""
    original = deltatok.DeltaTok.load_state_dict

    def load(self: Any, state: dict[str, Tensor], **arguments: Any) -> Any:
        return original(self, state | {"xy_embed.weight": state["xy_embed.weight"].flip(0)})

    _patch(deltatok.DeltaTok, "load_state_dict", load)


def prefix_rotated() -> None:
    """prefix token rotated, as if at the first patch"""

    def with_prefix(table: rope.Rope, *, num_frames: int = 1) -> rope.Rope:
        return rope.Rope(
            torch.cat([table.cos[:1]] + [table.cos] * num_frames),
            torch.cat([table.sin[:1]] + [table.sin] * num_frames),
        )

    _patch(deltatok, "with_prefix", with_prefix)


def decoder_normed() -> None:
    """decoder given a final norm"""
    original = deltatok.DeltaTok.decode

    def decode(self: Any, *arguments: Any, **keywords: Any) -> Tensor:
        normed: Tensor = self.norm(original(self, *arguments, **keywords))
        return normed

    _patch(deltatok.DeltaTok, "decode", decode)


def current_frame_visible() -> None:
    """mask admitting the current frame"""
    original = deltaworld.causal

    def causal(positions: int, **keywords: Any) -> Tensor:
        # One position more: the key of the target frame itself.
        repeats, key_repeats = keywords.get("repeats", 1), keywords.get("key_repeats", 1)
        return original(positions + 1, **keywords)[repeats:, : positions * key_repeats]

    _patch(deltaworld, "causal", causal)
    _patch(dinoworld, "causal", causal)
    _patch(folded, "causal", causal)


def worst_candidate_selected() -> None:
    """argmax for argmin in best-of-many"""
    original = best_of_many.running_best

    def running_worst(chunks: Any) -> tuple[Tensor, ...]:
        losses = torch.cat(list(chunks), dim=2)
        return losses.argmax(dim=2, keepdim=True), *original([losses])[1:]

    _patch(best_of_many, "running_best", running_worst)


def folded_keys_turned_back() -> None:
    """selection: keys rotated away from the target instead of into its frame"""
    original = folded._relative_rope

    def relative_rope(*arguments: Any) -> rope.AxisRope:
        table = original(*arguments)
        return table._replace(sin=tuple(-sin for sin in table.sin))

    _patch(folded, "_relative_rope", relative_rope)


def folded_query_bias_left_out() -> None:
    """selection: bias of the query projection not folded into the scores"""
    original = folded._fold_layer

    def fold_layer(layer: folded.LayerWeights, *arguments: Any) -> folded.Folded:
        queries = layer.queries._replace(bias=torch.zeros_like(layer.queries.bias))
        return original(layer._replace(queries=queries), *arguments)

    _patch(folded, "_fold_layer", fold_layer)


def worst_sample_reported() -> None:
    """argmax for argmin in "best" of a rollout"""

    def best_sample(predictions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        index = rollout.sample_losses(predictions, targets).argmax(dim=1)
        return predictions[torch.arange(len(index)), index], index

    _patch(rollout, "best_sample", best_sample)


def mean_after_scoring() -> None:
    """mean over samples after the step that reads features, not before"""
    original = rollout.step_losses
    samples: list[Tensor] = []

    def mean_sample(predictions: Tensor) -> Tensor:
        samples[:] = [predictions]
        return predictions.mean(dim=1)

    def step_losses(prediction: Tensor, targets: Tensor) -> Tensor:
        if torch.equal(prediction, samples[0].mean(dim=1)):
            return torch.stack([original(one, targets) for one in samples[0].unbind(1)]).mean(0)
        return original(prediction, targets)

    _patch(rollout, "mean_sample", mean_sample)
    _patch(rollout, "step_losses", step_losses)


def open_loop_reconstruction() -> None:
    """reconstruction from true instead of reconstructed frames"""

    def reconstruct(self: Any, x: Tensor, x_start: Tensor, *, grid: tuple[int, int]) -> Tensor:
        before = torch.cat([x_start[:, None], x[:, :-1]], dim=1)
        out = self(before.flatten(0, 1), x.flatten(0, 1), grid=grid)
        return out.reshape(x.shape)

    _patch(deltatok.DeltaTok, "reconstruct", reconstruct)


def wrong_loss_beta() -> None:
    """smooth-L1 with beta 1 in selection and scores"""

    def smooth_l1(prediction: Tensor, target: Tensor, *, beta: float = 1.0) -> Tensor:
        del beta
        return F.smooth_l1_loss(prediction, target, reduction="none", beta=1.0)

    for module in (losses, best_of_many, rollout):
        _patch(module, "smooth_l1", smooth_l1)


MUTATIONS: dict[str, Callable[[], None]] = {
    made.__name__: made
    for made in (
        unbroken,
        keys_not_rotated,
        predictor_keys_not_rotated,
        values_rotated,
        gate_before_attention,
        norm_before_rotation,
        embeddings_exchanged,
        prefix_rotated,
        current_frame_visible,
        worst_candidate_selected,
        folded_keys_turned_back,
        folded_query_bias_left_out,
        worst_sample_reported,
        mean_after_scoring,
        decoder_normed,
        open_loop_reconstruction,
        wrong_loss_beta,
    )
}


def _attention(
    *, rotate_keys: bool = True, norm_first: bool = False, gate_values: bool = False
) -> Callable[..., Tensor]:
    """SelfAttention.forward, written out again with one thing changed."""

    def forward(self: Any, x: Tensor, table: rope.Rope, num_queries: int) -> Tensor:
        query_table = rope.Rope(table.cos[:num_queries], table.sin[:num_queries])
        q, k = split(self.q_proj(x[:, :num_queries]), self.head_dim), self.k_proj(x)
        k, v = split(k, self.head_dim), split(self.v_proj(x), self.head_dim)
        if norm_first:
            q, k = rope.rotate(self.q_norm(q), query_table), rope.rotate(self.k_norm(k), table)
        else:
            q = self.q_norm(rope.rotate(q, query_table))
            k = self.k_norm(rope.rotate(k, table) if rotate_keys else k)
        gate = None if self.attn_gate is None else torch.sigmoid(self.attn_gate(x))[..., None]
        if gate is not None and gate_values:
            v = v * gate.transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        if gate is not None and not gate_values:
            out = out * gate[:, :num_queries]
        projected: Tensor = self.o_proj(out.flatten(2))
        return projected

    return forward


def _patch(owner: Any, name: str, value: Any) -> None:
    """For the rest of this process, which runs one mutation."""
    mock.patch.object(owner, name, value).start()


class _Failures:
    """A pytest plugin that counts tests and keeps the names of those that fail."""

    def __init__(self) -> None:
        self.count = 0
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.count += report.when == "call"
        if report.failed:
            self.failed.append(report.nodeid.rsplit("/", 1)[-1].rstrip("]"))


def run_one(name: str, golden: list[str]) -> None:
    """Apply one mutation and print what fails as a line of JSON."""
    MUTATIONS[name]()
    failures = _Failures()
    options = ["-q", "-p", "no:cacheprovider", *golden, str(MODELS)]
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.main(options, plugins=[failures])
    print(json.dumps([failures.count, failures.failed]))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", choices=[[], *MUTATIONS], help="default: all")
    parser.add_argument("--golden", action="append", default=[], metavar="DIR")
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    golden = [part for folder in arguments.golden for part in ("--golden", folder)]
    if arguments.run:
        run_one(arguments.names[0], golden)
        return 0
    good = True
    print("| mutation | cases that fail |\n|---|---|")
    for name in arguments.names or MUTATIONS:
        done = subprocess.run(
            [sys.executable, __file__, "--run", name, *golden],
            capture_output=True,
            text=True,
            check=True,
        )
        count, failed = json.loads(done.stdout.splitlines()[-1])
        good = good and count > 0 and bool(failed) == (name != "unbroken")
        verdict = f"{len(failed)} of {count}: {', '.join(failed)}" if failed else f"none of {count}"
        print(f"| {MUTATIONS[name].__doc__} | {verdict} |", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
