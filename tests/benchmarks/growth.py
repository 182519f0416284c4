"""How each step grows with the number of clips: time, memory, files, bytes read.

    python tests/benchmarks/growth.py --folder BIG_DISK --json FILE [--large]

Makes caches of 1,000, 10,000 and 100,000 clips (`--large`: 1,000,000 too) below --folder, through
the real writers, with tokens of a few bytes: ten clips a shard, one of them in quarantine, a window
of each other. Every step runs in a process of its own, forked when all is imported, and is measured
there: CPU seconds, the peak of resident memory above what it began with, files opened, folders
listed, bytes read. What is said of growth is the exponent: the slope of a line through the sizes
on logarithmic axes, 1 is linear. Sizes at which a step takes less than 20 ms (4 MB) are left out:
there the constant part decides.
"""

import argparse
import contextlib
import gc
import itertools
import json
import logging
import multiprocessing
import shutil
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from deltatok.evaluate.forecast.config import ForecastConfig
from deltatok.evaluate.forecast.run import run_forecast
from deltatok.extract.ledger import Ledger, Part, close_cache
from deltatok.extract.sources.clip import Clip
from deltatok.extract.sources.find import find_clips
from deltatok.shards import PATCHES, CacheInfo, CacheShape, DeltaShards, PatchShards
from deltatok.shards.cache import finish_cache, open_cache, reopen_cache
from deltatok.shards.patches.writer import write_black, write_patch_shard
from deltatok.shards.plan import Plan, check_same_clips, longer_plan, make_plan, write_plan
from deltatok.shards.records import Quarantined, read_quarantine, remove_done
from deltatok.shards.tools.info import describe_cache
from deltatok.shards.tools.verify import verify_cache
from deltatok.shards.windows import ShardRows
from deltatok.train.config import TokenizeConfig
from deltatok.train.data.order import BatchOrder, StreamOrder, split_windows
from deltatok.train.encode import write_deltas
from deltatok.train.engine.model_folder import weights_sha256
from deltatok.train.models.configs import DeltaTokConfig, DeltaWorldConfig
from deltatok.train.models.deltatok import DeltaTok
from deltatok.train.models.deltaworld import DeltaWorldNetwork

SIZES = (1_000, 10_000, 100_000)
LARGE = 1_000_000
CLIPS_PER_SHARD = 10
NUM_RANKS = 8
CLIPS_PER_CLASS = 1000
WINDOWS_PER_CLIP = 100
"""For the order of an epoch, which needs no cache: 100 M windows with `--large`."""
CLIPS_PER_SEQUENCE = 10
"""Evaluation runs models, so it has a tenth of the sizes: 10,000 sequences of 100,000 clips."""
BLOCK_WINDOWS = 64
NUM_FRAMES, EVALUATED_FRAMES, SIZE = 2, 7, 16
LEAST_SECONDS, LEAST_BYTES = 0.02, 4e6

IDENTITY = {
    "backbone": {"config": {"hidden_size": SIZE}, "weights_sha256": "0" * 64},
    "preprocessing": {"frame_size": 32, "patch_size": 16, "image_mean": [0.5, 0.5, 0.5]},
    "sampling": {"policy": "windows", "num_frames": NUM_FRAMES, "seed": 0},
    "storage": {"dtype": "float16"},
    "autocast_dtype": "float32",
}


@dataclass(frozen=True, kw_only=True)
class Found:
    """What one step took at one size."""

    clips: int
    cpu_s: float
    wall_s: float
    peak_bytes: int
    """Resident memory, above that before the step."""
    read_bytes: int
    """Asked for by read calls, not by page faults of mapped files."""
    files_opened: int
    folders_listed: int


class Watch:
    """`with watch:` around the work of a step, once."""

    def __init__(self, clips: int) -> None:
        self._clips = clips
        self._counted = {"open": 0, "os.listdir": 0, "os.scandir": 0}
        self.found: Found | None = None

    def __enter__(self) -> None:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        self._resident, self._read = _status("VmRSS"), _read_bytes()
        sys.addaudithook(self._count)
        self._start = time.perf_counter(), time.process_time()

    def __exit__(self, *error: object) -> None:
        wall_s, cpu_s = time.perf_counter() - self._start[0], time.process_time() - self._start[1]
        counted = dict(self._counted)
        self.found = Found(
            clips=self._clips,
            cpu_s=cpu_s,
            wall_s=wall_s,
            peak_bytes=max(0, _status("VmHWM") - self._resident),
            read_bytes=_read_bytes() - self._read,
            files_opened=counted["open"],
            folders_listed=counted["os.listdir"] + counted["os.scandir"],
        )

    def _count(self, event: str, arguments: object) -> None:
        if event in self._counted:
            self._counted[event] += 1


Work = Watch | contextlib.nullcontext[None]


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _read_bytes() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])  # rchar


@dataclass(frozen=True)
class Case:
    """The folders of one size."""

    folder: Path
    num_clips: int

    def path(self, name: str) -> Path:
        return self.folder / name

    @property
    def num_shards(self) -> int:
        return -(-self.num_clips // CLIPS_PER_SHARD)

    @property
    def num_classes(self) -> int:
        return -(-self.num_clips // CLIPS_PER_CLASS)

    def names(self) -> Iterator[str]:
        """As Kinetics names its files."""
        for clip in range(self.num_clips):
            yield f"{clip:011d}_{clip % 400:06d}_{clip % 400 + 10:06d}.mp4"

    def clips(self, *, more: int = 0) -> dict[str, Clip]:
        """As a search gives them; `more` than there are in the cache."""
        names = itertools.chain(self.names(), (f"new{clip:011d}.mp4" for clip in range(more)))
        keys = (f"{number % self.num_classes:03d}/{name}" for number, name in enumerate(names))
        return {
            key: Clip(
                key=key,
                path=self.path("tree") / key,
                size_bytes=1,
                label=f"class {number % self.num_classes}",
                split="train",
            )
            for number, key in enumerate(keys)
        }


def make_sources(case: Case) -> None:
    """A tree of files in folders of classes, Kinetics' list of them, a tar of as many."""
    for number in range(case.num_classes):
        (case.path("tree") / f"{number:03d}").mkdir(parents=True)
    with case.path("list.csv").open("w") as rows, tarfile.open(case.path("clips.tar"), "w") as tar:
        rows.write("label,youtube_id,time_start,time_end,split\n")
        for number, name in enumerate(case.names()):
            key = f"{number % case.num_classes:03d}/{name}"
            (case.path("tree") / key).write_bytes(b"-")
            start_s = number % 400
            rows.write(
                f"class {number % case.num_classes},{name[:11]},{start_s},{start_s + 10},train\n"
            )
            member = tarfile.TarInfo(key)
            member.size = 1
            tar.addfile(member, BytesIO(b"-"))


def find_in_tree(case: Case, watch: Work) -> None:
    with watch:
        found = find_clips([case.path("tree")])
    assert len(found) == case.num_clips


def find_in_kinetics_list(case: Case, watch: Work) -> None:
    with watch:
        found = find_clips([case.path("list.csv")], root=case.path("tree"))
    assert len(found) == case.num_clips


def find_in_tar(case: Case, watch: Work) -> None:
    with watch:
        found = find_clips([case.path("clips.tar")])
    assert len(found) == case.num_clips


def plan_clips(case: Case, watch: Work) -> None:
    clips = case.clips()
    shape = CacheShape(num_frames=NUM_FRAMES, num_tokens=1, grid=(1, 1), hidden_size=SIZE)
    folder = case.path("patches")
    open_cache(folder, CacheInfo(format=PATCHES, identity=IDENTITY, shape=shape))
    with watch:
        write_plan(folder, make_plan(clips.values(), clips_per_shard=CLIPS_PER_SHARD, seed=0))


def read_part_of_plan(case: Case, watch: Work) -> None:
    part, count = Part(rank=3, num_ranks=NUM_RANKS), 0
    with watch:
        for _, entries in Plan.open(case.path("patches")).shards(part):
            count += len(entries)
    assert count > 0


def shard_rows(keys: list[str], quarantined: list[Quarantined], *, num_frames: int) -> ShardRows:
    """A window of each clip, of one token a frame."""
    frames = np.tile(np.arange(num_frames, dtype=np.int32), (len(keys), 1))
    tokens = np.random.default_rng(0).normal(size=(len(keys), num_frames, 1, SIZE)).cumsum(axis=1)
    return ShardRows(
        tokens=tokens.astype(np.float16),
        timestamps_s=(frames / 5).astype(np.float32),
        frame_index=frames,
        crop=np.tile(np.array([0, 0, 32, 32], dtype=np.float32), (len(keys), 1)),
        flipped=np.zeros(len(keys), dtype=np.bool_),
        clip=np.arange(len(keys), dtype=np.int32),
        keys=keys,
        decoders=dict.fromkeys(keys, "decord"),
        quarantined=quarantined,
    )


def write_shards(case: Case, watch: Work) -> None:
    folder = case.path("patches")
    write_black(folder, np.zeros((1, SIZE), dtype=np.float32))
    with watch:
        for shard, entries in Plan.open(folder).shards():
            keys = [entry.key for entry in entries]
            lost = Quarantined(clip=keys[0], stage="decode", reason="no frame in it", attempts=1)
            rows = shard_rows(keys[1:], [lost], num_frames=NUM_FRAMES)
            write_patch_shard(folder, shard, rows, dtype="float16", seed=0)


def list_quarantine(case: Case, watch: Work) -> None:
    folder = case.path("patches")
    ledger = Ledger.read(folder, Plan.open(folder))
    with watch:
        ledger.list_quarantined(now=True)
        listed = read_quarantine(folder)
    assert len(listed) == case.num_shards


def resume(case: Case, watch: Work) -> None:
    """What an extraction does before it makes the one shard that is left."""
    folder, clips = case.path("patches"), case.clips()
    record = folder / "shards" / "000007.json"
    hidden = record.rename(folder / "hidden")
    with watch:
        plan = Plan.open(folder)
        check_same_clips(plan, clips)
        missing = Ledger.read(folder, plan).missing
        (entries,) = (entries for _, entries in plan.shards(set(missing)))
    hidden.rename(record)
    assert missing == [7]
    assert len(entries) == CLIPS_PER_SHARD


def close(case: Case, watch: Work) -> None:
    with watch:
        totals = close_cache(case.path("patches"), changed=True, part=Part())
    assert totals.is_complete


def open_reader(case: Case, watch: Work) -> None:
    with watch:
        patches = PatchShards(case.path("patches"))
    assert len(patches) == case.num_clips - case.num_shards


def read_keys(case: Case, watch: Work) -> None:
    patches = PatchShards(case.path("patches"))
    with watch:
        assert len(patches.keys) == len(patches)


def read_labels(case: Case, watch: Work) -> None:
    patches = PatchShards(case.path("patches"))
    with watch:
        assert len(patches.labels) == len(patches)


def read_table(case: Case, watch: Work) -> None:
    patches = PatchShards(case.path("patches"))
    with watch:
        patches.table()


def split(case: Case, watch: Work) -> None:
    patches = PatchShards(case.path("patches"))
    keys, clips = patches.keys, patches.clip_index
    with watch:
        split_windows(keys, clips, 0.05)


def order_of_epoch(case: Case, watch: Work) -> None:
    windows = np.broadcast_to(np.int64(0), (WINDOWS_PER_CLIP * case.num_clips,))  # no memory
    with watch:
        order = BatchOrder(windows, 256, 0)
        for epoch in range(100):
            order.at((epoch + 1) * order.steps_per_epoch - 1)


def order_of_blocks(case: Case, watch: Work) -> None:
    num_windows = WINDOWS_PER_CLIP * case.num_clips
    windows = np.arange(num_windows)
    starts = np.append(np.arange(0, num_windows, BLOCK_WINDOWS), num_windows)
    order = StreamOrder(windows, 256, 0, block_starts=starts, group_windows=87_000)
    with watch:
        order.at(order.steps_per_epoch)


def append(case: Case, watch: Work) -> None:
    """A tenth more clips; into a copy of the plan."""
    folder, clips = case.path("appended"), case.clips(more=case.num_clips // 10)
    folder.mkdir()
    shutil.copy(case.path("patches") / "plan.json", folder)
    shutil.copytree(case.path("patches") / "plan", folder / "plan")
    with watch:
        plan = Plan.open(folder)
        longer = longer_plan(plan, clips, clips_per_shard=CLIPS_PER_SHARD, seed=0)
        longer.commit()
    assert longer.num_clips == len(clips)


def verify(case: Case, watch: Work, *, deep: bool) -> None:
    with watch:
        report = verify_cache(case.path("patches"), deep=deep)
    assert not report.problems, report


def describe(case: Case, watch: Work) -> None:
    with watch:
        describe_cache(case.path("patches"))


def make_tokenizer(folder: Path, **changes: Any) -> DeltaTok:
    config = DeltaTokConfig(
        hidden_size=SIZE, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model = DeltaTok(config, generator=torch.Generator().manual_seed(0)).eval()
    model.save_pretrained(folder, {"patches": IDENTITY | changes})
    return model


def tokenize_config(case: Case) -> TokenizeConfig:
    return TokenizeConfig(
        patches=str(case.path("patches")),
        tokenizer=str(case.path("tokenizer")),
        out=str(case.path("deltas")),
        device="cpu",
    )


def encode(case: Case, watch: Work) -> None:
    make_tokenizer(case.path("tokenizer"))
    with watch:
        write_deltas(tokenize_config(case))


def encode_the_last(case: Case, watch: Work) -> None:
    reopen_cache(case.path("deltas"))
    remove_done(case.path("deltas"), 7)
    with watch:
        write_deltas(tokenize_config(case))


def open_deltas(case: Case, watch: Work) -> None:
    with watch:
        deltas = DeltaShards(case.path("deltas"))
    assert len(deltas) == case.num_clips - case.num_shards


def evaluate(case: Case, watch: Work) -> None:
    num_sequences = case.num_clips // CLIPS_PER_SEQUENCE
    folder = case.path("validation")
    changes = {"sampling": {"policy": "uniform", "num_frames": EVALUATED_FRAMES, "fps": 5.0}}
    shape = CacheShape(num_frames=EVALUATED_FRAMES, num_tokens=1, grid=(1, 1), hidden_size=SIZE)
    open_cache(folder, CacheInfo(format=PATCHES, identity=IDENTITY | changes, shape=shape))
    clips = [clip for clip, _ in zip(case.clips().values(), range(num_sequences), strict=False)]
    plan = write_plan(folder, make_plan(clips, clips_per_shard=100, seed=0))
    write_black(folder, np.zeros((1, SIZE), dtype=np.float32))
    for shard, entries in plan.shards():
        keys = [entry.key for entry in entries]
        rows = shard_rows(keys, [], num_frames=EVALUATED_FRAMES)
        write_patch_shard(folder, shard, rows, dtype="float16", seed=0)
    finish_cache(folder)
    tokenizer = make_tokenizer(case.path("evaluated-tokenizer"), **changes)
    config = DeltaWorldConfig(
        hidden_size=SIZE,
        predictor_hidden_size=16,
        predictor_num_hidden_layers=1,
        predictor_num_heads=2,
        rope_axis_sizes=(4,),
    )
    world = DeltaWorldNetwork(config, generator=torch.Generator().manual_seed(0))
    hashes = {"config": {}, "weights_sha256": weights_sha256(tokenizer)}
    provenance = {"deltas": {"patches": IDENTITY | changes, "tokenizer": hashes}}
    world.save_pretrained(case.path("world"), provenance)
    with watch:
        run_forecast(
            ForecastConfig(
                patches=str(folder),
                tokenizer=str(case.path("evaluated-tokenizer")),
                world=str(case.path("world")),
                out=str(case.path("report")),
                num_samples=4,
                batch_windows=64,
                num_pictures=2,
                device="cpu",
            )
        )


STEPS: dict[str, Callable[[Case, Work], None]] = {
    "find clips: a folder tree": find_in_tree,
    "find clips: Kinetics' list": find_in_kinetics_list,
    "find clips: one tar": find_in_tar,
    "make the plan": plan_clips,
    "read the plan, one rank of 8": read_part_of_plan,
    "write shards and records": write_shards,
    "list the quarantine": list_quarantine,
    "resume with one shard left": resume,
    "close the cache": close,
    "open the cache": open_reader,
    "keys": read_keys,
    "labels": read_labels,
    "table of all windows": read_table,
    "split for validation": split,
    "order of 100 epochs' last batches": order_of_epoch,
    "order of an epoch of blocks": order_of_blocks,
    "append a tenth": append,
    "verify": partial(verify, deep=False),
    "verify deep": partial(verify, deep=True),
    "info": describe,
    "encode delta tokens": encode,
    "encode with one shard left": encode_the_last,
    "open the delta cache": open_deltas,
    "evaluate a tenth as many sequences": evaluate,
}


def warm_up(folder: Path) -> None:
    """Every step once, so that imports and other firsts are no part of what is measured."""
    case = Case(folder, 20 * CLIPS_PER_SHARD)
    make_sources(case)
    for step in STEPS.values():
        step(case, contextlib.nullcontext())


def measure(step: str, case: Case) -> Found:
    """The step in a forked process."""
    ours, theirs = multiprocessing.Pipe(duplex=False)

    def run() -> None:
        watch = Watch(case.num_clips)
        STEPS[step](case, watch)
        theirs.send(watch.found)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    theirs.close()
    with contextlib.closing(ours):
        try:
            found: Found = ours.recv()
        except EOFError:
            raise SystemExit(f"{step}: failed at {case.num_clips} clips") from None
    process.join()
    return found


def exponent(found: list[Found], name: str, least: float) -> float | None:
    """The slope of the line through log(clips), log(value); None where under two sizes count."""
    points = [(f.clips, getattr(f, name)) for f in found if getattr(f, name) >= least]
    if len(points) < 2:
        return None
    x, y = np.log(np.array(points)).T
    return float(np.polyfit(x, y, 1)[0])


def stored(case: Case) -> dict[str, float]:
    """Bytes of what is beside the tokens, by what they grow with."""
    folder = case.path("patches")
    records = sum(path.stat().st_size for path in folder.glob("shards/*.json"))
    plan = sum(path.stat().st_size for path in folder.glob("plan*/**/*.jsonl"))
    return {
        "plan_bytes_per_clip": plan / case.num_clips,
        "index_bytes_per_shard": (folder / "index.jsonl").stat().st_size / case.num_shards,
        "record_bytes_per_shard": records / case.num_shards,
        "files_per_shard": sum(1 for _ in folder.glob("shards/*")) / case.num_shards,
    }


def main() -> None:
    """Runs the benchmark; prints the table and writes it to --json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where the caches are made")
    parser.add_argument("--json", type=Path, required=True, help="where the result goes")
    parser.add_argument("--large", action="store_true", help="1,000,000 clips, too")
    parser.add_argument("--sizes", type=int, nargs="+", help="these numbers of clips instead")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    torch.set_num_threads(1)
    sizes = arguments.sizes or [*SIZES, *([LARGE] if arguments.large else [])]
    with TemporaryDirectory(dir=arguments.folder) as name:
        warm_up(Path(name))
    rows: dict[str, list[Found]] = {step: [] for step in STEPS}
    beside: dict[str, float] = {}
    for size in sizes:
        with TemporaryDirectory(dir=arguments.folder) as name:
            case = Case(Path(name), size)
            make_sources(case)
            for step, found in rows.items():
                found.append(measure(step, case))
                last = found[-1]
                print(
                    f"{size:>9,} {step:36} {last.cpu_s:9.3f} s CPU {last.wall_s:9.3f} s "
                    f"{last.peak_bytes / 1e6:9.1f} MB {last.read_bytes / 1e6:9.1f} MB read "
                    f"{last.files_opened:>8} opened {last.folders_listed:>5} listed",
                    flush=True,
                )
            beside = stored(case)
    steps = {
        step: {
            "time_exponent": exponent(found, "cpu_s", LEAST_SECONDS),
            "memory_exponent": exponent(found, "peak_bytes", LEAST_BYTES),
            "us_per_clip": found[-1].cpu_s / found[-1].clips * 1e6,
            "bytes_per_clip": found[-1].peak_bytes / found[-1].clips,
            "sizes": [asdict(one) for one in found],
        }
        for step, found in rows.items()
    }
    result = {"clips_per_shard": CLIPS_PER_SHARD, "sizes": sizes, **beside, "steps": steps}
    arguments.json.write_text(f"{json.dumps(result, indent=1)}\n")


if __name__ == "__main__":
    main()
