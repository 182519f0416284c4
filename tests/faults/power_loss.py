"""Pull the plug, on paper, at every write of real runs, and go on from what the disk could hold:

    python tests/faults/power_loss.py --folder F [--json FILE] [--only NAME...] [--quick]

Each run (an extraction, an appended one, an encoding, ...) is recorded by record_writes.c; then
again for each of its renames, killed there and run to its end, in one log: what a killed run did
not flush is not safe yet. After every write disk.py gives the trees that a disk could hold if the
power failed then. Of each that differs in more than the contents of partial files:

    what says done is whole     every done-record's shard, by SHA-256 and by its values; a finished
                                cache opens, verifies, and has the bytes of an undisturbed run;
                                nothing is gone that was there before an append; a checkpoint has
                                all its files
    the run goes on             the same command ends well, with the bytes of an undisturbed run

and after the last write every tree must be the finished one: the command has said so. Then mutants:
the undisturbed log without the flushes of a file, or without one of a folder. All must be found but
those of a folder that is flushed again before anything relies on it; what was not found is listed.

--quick: no killed runs, and mutants are not resumed. Prints figures as JSON; exits with 1 if
anything was found, or the missing flush of a file was not.
"""

import argparse
import contextlib
import ctypes
import io
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

from disk import Disk, Operation, Tree, Write, get_inodes, get_tree, put_tree, read_log

HERE = Path(__file__).resolve().parent
PRELOADED = "DELTATOK_RECORD_WRITES"
MAY_DIFFER = ("timings.jsonl", "log.jsonl", ".lock")
"""Files that tell the clock, or of a process."""
PARTIAL = re.compile(r"\.partial-[0-9]+-[0-9a-f]{8}")


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A command that writes into a folder."""

    command: Callable[[list[str]], int]
    words: Callable[[Path], list[str]]
    """Its flags, for the folder to write into."""
    before: Callable[[Path], None] | None = None
    """Makes what the folder holds before."""
    between: Callable[[], None] | None = None
    """What changes in the sources after that."""
    keeps: bool = False
    """Shards that are there before stay, whatever happens."""
    may_stay: str = "-"
    """What a run that goes on need not remove: the beginning of its path."""


@dataclass
class Figures:
    """Of one log, or of several."""

    logs: int = 0
    cut_points: int = 0
    flushes: int = 0
    states: int = 0
    trees: int = 0
    """Different ones, but for what is in partial files."""
    complete: int = 0
    """Trees that say the cache is complete."""
    problems: list[str] = field(default_factory=list)


Key = frozenset[tuple[str, bytes | None]]


class Runner:
    """Runs a scenario: recorded, and from what a disk may hold."""

    def __init__(self, name: str, scenario: Scenario, folder: Path) -> None:
        self.name, self.scenario, self.folder = name, scenario, folder
        self.start: Tree = {}
        folder.mkdir(parents=True)
        if scenario.before is not None:
            scenario.before(folder / "start" / "out")
            self.start = get_tree(folder / "start")
        if scenario.between is not None:
            scenario.between()
        self.said = ""
        self.wanted: Tree = {}
        self.checked: dict[Key, list[str]] = {}
        self.went_on: dict[Key, list[str]] = {}

    def run(self, out: Path) -> int:
        """The command's exit code; what it says is in `self.said`."""
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as said:
            code = self.scenario.command(self.scenario.words(out))
        self.said = said.getvalue().strip().rpartition("\n")[2]
        return code

    def record(self, *, last_name: str = "") -> tuple[list[Write], dict[str, int]]:
        """What a run writes, and the inodes of what was there before; if `last_name`, it is killed
        once a file or folder of this name is there, and run again."""
        top, log = self.folder / "disk", self.folder / "log"
        shutil.rmtree(top, ignore_errors=True)
        log.unlink(missing_ok=True)
        put_tree(self.start, top)
        inodes = get_inodes(top)
        recorder = ctypes.CDLL(None)
        if last_name:
            child = os.fork()
            if child == 0:
                with contextlib.suppress(BaseException):
                    recorder.record_start(bytes(top), bytes(log), last_name.encode())
                    self.run(top / "out")
                os._exit(1)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if status != -signal.SIGKILL:
                raise RuntimeError(f"{self.name}: ended with {status}, wanted a kill: {last_name}")
        recorder.record_start(bytes(top), bytes(log), b"")
        code = self.run(top / "out")
        recorder.record_stop()
        if code != 0:
            raise RuntimeError(f"{self.name}: ended with {code}: {self.said}")
        writes, disk = read_log(log, top), Disk(self.start, inodes)
        for write in writes:
            disk.apply(write)
        found = get_tree(top)
        if disk.tree() != found:
            raise RuntimeError(f"{self.name}: the log misses something that was written")
        self.wanted = self.wanted or compared(found)
        if self.ended(found) != self.wanted:
            raise RuntimeError(f"{self.name}: killed at {last_name}, it ends with other bytes")
        return writes, inodes

    def replay(
        self,
        writes: Sequence[Write],
        inodes: dict[str, int],
        *,
        resume: bool = True,
        first_only: bool = False,
        start: int = 0,
    ) -> Figures:
        """Goes through all cut points of a log from `start` on, or up to the first problem."""
        figures = Figures(logs=1, flushes=sum(write.is_flush for write in writes))
        disk, seen = Disk(self.start, inodes), set[Key]()
        for number, write in enumerate(writes, start=1):
            disk.apply(write)
            figures.cut_points += 1
            is_last = number == len(writes)
            # Written into a partial file: the states are those before, but for what is in it.
            is_new = not (PARTIAL.search(write.path) and write.is_into_file)
            if number < start or not (is_new or is_last):
                continue
            flushed = disk.flushed_below("out/shards")
            for words, tree in disk.states():
                figures.states += 1
                key = key_of(tree)
                is_known = key in seen
                seen.add(key)
                problems = [] if is_known else self.check(key, tree)
                if is_last and _named(self.ended(tree)) != _named(self.wanted):
                    problems = [*problems, "the command has ended, and not all of it is there"]
                if gone := [name for name in flushed if name not in tree]:
                    problems = [*problems, f"{gone} was flushed before, and is gone"]
                if resume and not problems and not is_known:
                    problems = self.go_on(key, tree)
                where = f"{self.name}: {number} of {len(writes)}, {write.words()}, {words}"
                figures.problems += [f"{where}: {problem}" for problem in problems]
                if problems and first_only:
                    return figures
        figures.trees = len(seen)
        figures.complete = sum(is_complete(dict(key)) for key in seen)
        return figures

    def check(self, key: Key, tree: Tree) -> list[str]:
        """What is promised and not there."""
        if key not in self.checked:
            top = self.folder / "check"
            shutil.rmtree(top, ignore_errors=True)
            put_tree(tree, top)
            self.checked[key] = [*self._gone(tree), *self._problems(top / "out", tree)]
        return self.checked[key]

    def _gone(self, tree: Tree) -> list[str]:
        if not self.scenario.keeps:
            return []
        return [
            f"{name} was there before"
            for name, data in self.start.items()
            if "/shards/" in name and tree.get(name, b"") != data
        ]

    def _problems(self, out: Path, tree: Tree) -> list[str]:
        from deltatok.shards import DeltatokError
        from deltatok.shards.tools.verify import verify_cache

        if not (out / "cache.json").exists():
            return _damaged_checkpoints(out)
        try:
            found = verify_cache(out, deep=True).problems
            if not is_complete(tree):
                return [str(problem) for problem in found if problem.kind == "shard"]
            problems = [str(problem) for problem in found if problem.kind != "leftover"]
            if not problems:
                _read_all(out)
        except DeltatokError as error:
            return [str(error)]
        if _named(compared(tree)) not in (_named(self.wanted), _named(compared(self.start))):
            problems.append("says complete, and is neither the old cache nor the new one")
        return problems

    def ended(self, tree: Tree) -> Tree:
        """What of `tree` must be as after an undisturbed run."""
        return {
            name: data
            for name, data in compared(tree).items()
            if not name.startswith(self.scenario.may_stay)
        }

    def go_on(self, key: Key, tree: Tree) -> list[str]:
        """What is wrong after the same command again."""
        if key not in self.went_on:
            top = self.folder / "disk"  # where it was recorded: a run may note its own folder
            shutil.rmtree(top, ignore_errors=True)
            put_tree(tree, top)
            with mock.patch("os.fsync"):
                code = self.run(top / "out")
            ended = self.ended(get_tree(top))
            problems = [f"run again, it ended with {code}: {self.said}"] if code else []
            if ended != self.wanted:
                names = sorted(name for name, _ in set(ended.items()) ^ set(self.wanted.items()))
                problems.append(f"run again, it ended with other bytes in {names[:4]}")
            self.went_on[key] = problems
        return self.went_on[key]


def compared(tree: Tree) -> Tree:
    """What must be equal: all but partials and what tells the clock."""
    return {
        name: data
        for name, data in tree.items()
        if not PARTIAL.search(name) and not name.endswith(MAY_DIFFER)
    }


def _named(tree: Tree) -> Tree:
    """Without what lies in plan/ and is not in plan.json: parts of a plan that is being written."""
    plan = tree.get("out/plan.json") or b""
    return {
        name: data
        for name, data in tree.items()
        if not name.startswith("out/plan/") or Path(name).name.encode() in plan
    }


def key_of(tree: Tree) -> Key:
    """Equal for trees that differ only in what is in partial files and folders: readers never look
    into them, and writers only remove them."""
    partial = {PARTIAL.split(name)[0] + ".partial" for name in tree if PARTIAL.search(name)}
    return frozenset({*compared(tree).items(), *((name, b"") for name in partial)})


def is_complete(tree: Tree) -> bool:
    """Whether its cache.json says so."""
    data = tree.get("out/cache.json")
    with contextlib.suppress(ValueError):
        return data is not None and json.loads(data)["complete"] is True
    return False


def _read_all(out: Path) -> None:
    """Opens a cache and reads all tokens, hashes first."""
    from deltatok.shards import DELTAS, DeltaShards, PatchShards, read_cache_info

    reader: Any = DeltaShards if read_cache_info(out).format == DELTAS else PatchShards
    opened = reader(out, verify="sha256")
    opened.tokens(range(opened.num_windows))


def _damaged_checkpoints(out: Path) -> list[str]:
    """What is wrong with the checkpoints of a training run."""
    from deltatok.shards import DeltatokError
    from deltatok.train.engine.checkpoints import check_checkpoint, find_checkpoints

    problems = []
    for _, checkpoint in find_checkpoints(out / "checkpoints"):
        try:
            check_checkpoint(checkpoint)
        except DeltatokError as error:
            problems.append(str(error))
    return problems


def kill_names(writes: Sequence[Write]) -> list[str]:
    """The names that a run gives by renames and links, below the top, partial ones excepted."""
    given = (Operation.RENAME, Operation.LINK)
    names = [f"/{write.other}" for write in writes if write.operation in given]
    return [name for name in dict.fromkeys(names) if not PARTIAL.search(name)]


def missed_mutants(
    runner: Runner, writes: list[Write], inodes: dict[str, int], *, resume: bool
) -> tuple[int, list[str]]:
    """How many logs there are in which a file is never flushed, or a folder once not, the last of
    each kind; and the kind of each in which nothing is found, a folder's with what was before."""
    written = {write.inode for write in writes if write.operation == Operation.WRITE}
    made = {write.inode for write in writes if write.operation == Operation.CREATE}
    kinds: dict[str, list[int]] = {}
    for number, write in enumerate(writes):
        # An empty file has nothing to lose.
        if not write.is_flush or write.inode in made - written or write.path.endswith(MAY_DIFFER):
            continue
        same, words = [number], f"{write.path} after {writes[number - 1].words()}"
        if write.inode in written:
            flushes = [(n, w) for n, w in enumerate(writes) if w.is_flush]
            same, words = [n for n, w in flushes if w.inode == write.inode], write.path
        kinds[re.sub(r"[0-9]{6,}", "N", PARTIAL.sub("", words))] = same
    missed = []
    for kind, dropped in kinds.items():
        mutant = [write for number, write in enumerate(writes) if number not in dropped]
        found = runner.replay(mutant, inodes, resume=resume, first_only=True, start=dropped[0])
        missed += [] if found.problems else [kind]
    return len(kinds), missed


def make_scenarios(root: Path) -> dict[str, Scenario]:
    """Little clips, a backbone and a tokenizer in `root`, and what is made of them."""
    from deltatok.pipeline.commands.extract import main as extract
    from deltatok.pipeline.commands.shards import main as shards
    from deltatok.pipeline.commands.train import main as train
    from deltatok.pipeline.little_world.backbone import TinyBackboneConfig, make_tiny_backbone
    from deltatok.pipeline.little_world.files import make_little_world
    from deltatok.pipeline.little_world.simulation import LittleWorldConfig

    make_little_world(
        LittleWorldConfig(
            out=str(root / "world"),
            num_train_clips=3,
            num_head_clips=2,
            num_val_clips=0,
            frame_size=32,
        )
    )
    old, new = root / "world/train", root / "new"
    new.mkdir()
    for path in sorted((root / "world/head").glob("*.mp4")):
        path.rename(new / f"new-{path.name}")
    (old / "broken.mp4").write_bytes(b"this is no video")
    later = root / "later"
    shutil.copytree(old, later)
    (later / "broken.mp4").write_bytes(b"")
    make_tiny_backbone(
        TinyBackboneConfig(
            out=str(root / "backbone"), hidden_size=16, num_hidden_layers=1, num_attention_heads=2
        )
    )

    def extraction(videos: Path, *more: str) -> Callable[[Path], list[str]]:
        words = ["--videos", str(videos), "--backbone", str(root / "backbone")]
        words += ["--frame-size", "32", "--windows", "2", "--num-frames", "3", "--workers", "1"]
        words += ["--frames-per-shard", "12", "--max-quarantined", "1", *more]
        return lambda out: [*words, "--out", str(out)]

    def extracted(videos: Path, *more: str) -> Callable[[Path], None]:
        def before(out: Path) -> None:
            out.parent.mkdir(parents=True, exist_ok=True)
            assert extract(extraction(videos, *more)(out)) == 0

        return before

    patches, tokenizer = root / "patches", root / "tokenizer"
    extracted(old)(patches)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    words = ["tokenizer", "--patches", str(patches), "--batch-size", "4", "--warmup-steps", "1"]
    for name, size in sizes.items():
        words += ["--set", f"model.{name}={size}"]
    assert train([*words, "--steps", "1", "--out", str(tokenizer)]) == 0
    training = [*words, "--steps", "6", "--save-every", "2", "--eval-every", "2"]

    def mend() -> None:
        shutil.copy(new / "new-0000.mp4", later / "broken.mp4")

    mended = root / "mended"
    shutil.copytree(later, root / "again/videos")

    def encoding(cache: Path) -> Callable[[Path], list[str]]:
        words = ["--patches", str(cache), "--tokenizer", str(tokenizer)]
        return lambda out: [*words, "--out", str(out)]

    def encoded(out: Path) -> None:
        extracted(root / "again/videos")(mended)
        out.parent.mkdir(parents=True)
        assert extract(encoding(mended)(out)) == 0

    def mend_patches() -> None:
        shutil.copy(new / "new-0000.mp4", root / "again/videos/broken.mp4")
        extracted(root / "again/videos", "--retry-quarantined")(mended)

    return {
        "extract": Scenario(command=extract, words=extraction(old)),
        "extract int8": Scenario(command=extract, words=extraction(old, "--dtype", "int8")),
        "append": Scenario(
            command=extract,
            words=extraction(new, "--append"),
            before=extracted(old),
            keeps=True,
        ),
        "retry quarantined": Scenario(
            command=extract,
            words=extraction(later, "--retry-quarantined"),
            before=extracted(later),
            between=mend,
        ),
        "encode": Scenario(command=extract, words=encoding(patches)),
        "encode retried": Scenario(
            command=extract, words=encoding(mended), before=encoded, between=mend_patches
        ),
        "fused": Scenario(command=extract, words=extraction(old, "--tokenizer", str(tokenizer))),
        "train": Scenario(
            command=train,
            words=lambda out: [*training, "--out", str(out)],
            may_stay="out/checkpoints/step-00000002",
        ),
        "export": Scenario(
            command=shards, words=lambda out: ["export", str(patches), "--out", str(out)]
        ),
    }


@contextlib.contextmanager
def decoding_once() -> Iterator[None]:
    """Runs within decode a clip once, whichever of them needs it: there are hundreds of runs."""
    from deltatok.extract.decoding.clip import DecodedClip
    from deltatok.extract.decoding.pool import DecodePool

    made: dict[Any, Any] = {}
    decode = DecodePool.decode

    def remembered(self: DecodePool, clips: Any) -> Iterator[Any]:
        for clip in clips:
            known = (self.policy, clip)
            if known not in made:
                (result,) = decode(self, [clip])
                if isinstance(result, DecodedClip):
                    frames = {number: frame.copy() for number, frame in result.frames.items()}
                    result = replace(result, frames=frames)
                made[known] = result
            yield made[known]

    with mock.patch.object(DecodePool, "decode", remembered):
        yield


def save_file(tensors: Any, path: Path) -> None:
    """As safetensors does, which writes past the C library: record_writes.c does not see it."""
    from safetensors.torch import save

    path.write_bytes(save(tensors))


def preload() -> None:
    """Starts this program again with record_writes.c in front, unless it is."""
    if PRELOADED in os.environ:
        return
    library = Path(os.environ.get("TMPDIR", "/tmp")) / f"record-writes-{os.getpid()}.so"
    source = str(HERE / "record_writes.c")
    command = ["cc", "-O1", "-shared", "-fPIC", "-o", str(library), source, "-lpthread"]
    subprocess.run(command, check=True)
    environment = os.environ | {"LD_PRELOAD": str(library), PRELOADED: str(library)}
    os.execve(sys.executable, [sys.executable, *sys.argv], environment)


def main() -> int:
    """Run the scenarios; 0 if nothing was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="new, best in memory")
    parser.add_argument("--json", type=Path, default=None, help="keeps what others found")
    parser.add_argument("--only", nargs="+", default=None, metavar="NAME")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    preload()
    import torch

    Path(os.environ[PRELOADED]).unlink()  # it is loaded; processes that start now do without
    del os.environ["LD_PRELOAD"]
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    folder = arguments.folder.resolve()
    mock.patch("deltatok.train.engine.model_folder.save_file", save_file).start()
    scenarios = make_scenarios(folder / "sources")
    shown: dict[str, Any] = {}
    if arguments.json is not None and arguments.json.exists():
        shown = json.loads(arguments.json.read_text())
    for name in arguments.only or scenarios:
        start_s = time.monotonic()
        runner = Runner(name, scenarios[name], folder / name.replace(" ", "-"))
        logs = [runner.record()]
        kills = [] if arguments.quick else kill_names(logs[0][0])
        logs += [runner.record(last_name=last_name) for last_name in kills]
        with decoding_once():
            total = Figures()
            for writes, inodes in logs:
                figures = runner.replay(writes, inodes)
                for field_name, value in vars(figures).items():
                    setattr(total, field_name, getattr(total, field_name) + value)
            total.trees, num_runs = len(runner.checked), len(runner.went_on)
            mutants, missed = missed_mutants(runner, *logs[0], resume=not arguments.quick)
        shown[name] = {
            **vars(total),
            "problems": total.problems[:20],
            "num_problems": len(total.problems),
            "runs_that_went_on": num_runs,
            "mutants": mutants,
            "mutants_found": mutants - len(missed),
            "mutants_missed": missed,
            "seconds": round(time.monotonic() - start_s, 1),
        }
        if arguments.json is not None:
            arguments.json.write_text(f"{json.dumps(shown, indent=1)}\n")
        print(json.dumps({name: shown[name]}, indent=1), flush=True)
    found = list(shown.values())
    files = [kind for one in found for kind in one["mutants_missed"] if " after " not in kind]
    return int(bool(files) or any(one["problems"] for one in found))


if __name__ == "__main__":
    sys.exit(main())
