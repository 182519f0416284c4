"""Short runs of the real trainers, and what their own logs say of them. Used by training.py."""

import dataclasses
import json
from pathlib import Path

from deltatok.shards import PatchShards
from deltatok.train.config import TokenizerTrainConfig, WorldTrainConfig
from deltatok.train.data.batches import Batch
from deltatok.train.data.order import RankSlice
from deltatok.train.data.residency import resolve_residency
from deltatok.train.engine.checkpoints import initialise
from deltatok.train.engine.devices import make_accelerator
from deltatok.train.engine.loop import Trainer
from deltatok.train.engine.run_folder import TrainingRun
from deltatok.train.models.configs import DeltaTokConfig
from deltatok.train.models.deltatok import DeltaTok
from deltatok.train.tokenizer import TokenizerObjective
from deltatok.train.world import train_world

STEPS = 6
"""Steps of a run. The first LOG_EVERY warm up and count FLOPs; the others are timed."""
LOG_EVERY = 2


def world_rate(deltas: Path, out: Path, *, batch_size: int, compiled: bool) -> dict[str, float]:
    """The released world model from delta tokens: windows_per_s, gflop_per_window,
    loader_wait_share, selection_share, peak_memory_gb of the run's last steps."""
    train_world(
        WorldTrainConfig(
            deltas=str(deltas),
            out=str(out),
            steps=STEPS,
            batch_size=batch_size,
            log_every=LOG_EVERY,
            validation_fraction=0.0,
            compile=compiled,
        )
    )
    last = _last_line(out)
    names = ("windows_per_s", "loader_wait_share", "selection_share", "peak_memory_gb")
    return {
        **{name: last[name] for name in names},
        "gflop_per_window": last["tflop_per_s"] / last["windows_per_s"] * 1e3,
    }


def tokenizer_rate(
    patches: Path,
    out: Path,
    *,
    num_layers: int,
    batch_size: int,
    in_memory: bool,
    compiled: bool,
) -> float:
    """Pairs/s of the tokenizer's trainer from a patch cache's files; in_memory: from the tensors
    of one batch, kept."""
    shards = PatchShards(patches)
    config = TokenizerTrainConfig(
        patches=str(patches),
        out=str(out),
        model=DeltaTokConfig(num_hidden_layers=num_layers),
        steps=STEPS,
        batch_size=batch_size,
        residency="map",
        log_every=LOG_EVERY,
        validation_fraction=0.0,
        compile=compiled,
    )
    accelerator = make_accelerator(config.device, config.precision)
    config = resolve_residency(config, shards, accelerator)
    model, _ = initialise(DeltaTok, config.model, seed=0, start_from=None)
    run = TrainingRun(command="tokenizer", config=config, data={}, fingerprints={})
    stage = (InMemory if in_memory else TokenizerObjective)(
        model, shards, config, RankSlice(rank=0, num_ranks=1), device=accelerator.device
    )
    Trainer(stage, run, accelerator).train()
    return _last_line(out)["pairs_per_s"]


class InMemory(TokenizerObjective):
    """The same stage with no reading: every step gets the first step's tensors."""

    _kept: Batch | None = None

    def read(self, step: int) -> Batch:
        if self._kept is None:
            batch = super().read(0)
            kept = {name: tensor.clone() for name, tensor in batch.tensors.items()}
            self._kept = dataclasses.replace(batch, tensors=kept)
        return self._kept


def _last_line(run: Path) -> dict[str, float]:
    lines = (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
    last: dict[str, float] = json.loads(lines[-1])
    return last
