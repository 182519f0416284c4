"""Best-of-many selection: the engineered variants beside the plain one.

    python tests/benchmarks/selection.py [--json FILE] [--device cuda] [--compile]
    python tests/benchmarks/selection.py --world DIR --deltas DIR --json FILE

For K = 16, 64, 256 and 1,024 candidates a position, released predictor (768 channels, 12 layers,
8 tokens a window): seconds a window, memory above the model's own, agreement with the float32
argmin and regret, (loss of the pick - lowest loss) / lowest loss. The variants:

    plain       all candidates at once, every query rotated, a dense mask; noise by torch.randn
    exact       folded keys and values, chunks, counter-based noise; the same precision
    bfloat16    exact's algebra with products in bfloat16
    finalists   bfloat16, whose best 8 are compared again in float32
    float8      MLP products in e4m3, on GPUs that have it; with finalists too (float8+8)

Variants take turns within a round; a speed-up is the median over rounds. On a GPU plain and exact
run in bfloat16, as training does there. Memory: on a CPU (Linux) each variant in a process of its
own, the peak of resident memory during a call for 2 windows; on a GPU torch's peak.

At the first weights of training all candidates are alike, and agreement would mean nothing. So
weights and noise are drawn with a standard deviation of 0.05 and LayerScale is 1 (losses of the
candidates of a position then spread by 1 to 2 %), or the model is a trained one (--world, with
windows of --deltas; then without memory).

JSON: selection_speedup (exact over plain, K = 256), selection_agreement and selection_regret
(bfloat16, K = 256), selection_low_speedup (bfloat16), selection_finalists_speedup and _agreement,
and all figures under `variants`. training.py calls measure() and summary().
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltatok.shards.deltas.reader import DeltaShards
from deltatok.train.models.configs import DeltaWorldConfig
from deltatok.train.models.deltaworld import DeltaWorldNetwork
from deltatok.train.selection.folded import ProductsName
from deltatok.train.selection.noise import CounterNoise, GivenNoise
from deltatok.train.selection.search import ChunkLosses, Winners, default_chunks, select

sys.path.append(str(Path(__file__).parents[1] / "train" / "selection"))
from plain_best_of_many import plain_select

COUNTS = (16, 64, 256, 1024)
REPORTED = 256
NUM_FRAMES, FINALISTS = 8, 8
WIDE_STD = 0.05
MEASURED_WINDOWS = 2
"""Windows of which the memory is measured."""


class Problem(NamedTuple):
    """A model and windows to select for."""

    world: DeltaWorldNetwork
    z: Tensor
    timestamps: Tensor

    def first(self, count: int) -> "Problem":
        return Problem(self.world, self.z[:count], self.timestamps[:count])

    @property
    def noise(self) -> CounterNoise:
        config = self.world.config
        return CounterNoise(
            keys=torch.arange(len(self.z), device=self.z.device),
            positions=self.z.shape[1] - 1,
            channels=config.predictor_hidden_size,
            std=config.initializer_range,
        )


def measure(
    *,
    device: torch.device,
    counts: tuple[int, ...] = COUNTS,
    rounds: int = 2,
    world: Path | None = None,
    deltas: Path | None = None,
    config: DeltaWorldConfig | None = None,
    compiled: bool = False,
    memory: bool = True,
) -> dict[str, Any]:
    """All figures: {"variants": {name: {K: {seconds, speedup, memory_mb, agreement, regret}}}}.

    seconds: of one window, the median over rounds; speedup: plain's seconds in the same round over
    these, the median; cpu_speedup: the same by CPU time, which others on the machine change less.
    config: of random weights; None: the released size.
    """
    problem = make_problem(device, world=world, deltas=deltas, config=config)
    runs = variants(device, compiled=compiled)
    found: dict[str, dict[str, Any]] = {name: {} for name in runs}
    for count in counts:
        timed = problem.first(timed_windows(device, count))
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        cpu: dict[str, list[float]] = {name: [] for name in runs}
        # The first turn warms up; on a CPU a later K has nothing left to warm.
        for turn in range(0 if count == counts[0] or device.type == "cuda" else 1, rounds + 1):
            for name, run in runs.items():
                begun = time.process_time()
                taken = seconds_of(partial(run, timed, count), device=device)
                if turn:
                    seconds[name].append(taken / len(timed.z))
                    cpu[name].append(time.process_time() - begun)
        for name in runs:
            found[name][str(count)] = {
                "seconds": statistics.median(seconds[name]),
                "speedup": _ratio(seconds["plain"], seconds[name]),
                "cpu_speedup": _ratio(cpu["plain"], cpu[name]),
            }
        for name, figures in quality(problem, runs, count).items():
            found[name][str(count)] |= figures
    if memory:
        for name in runs:
            for count, used in memory_of(name, counts, device, compiled=compiled).items():
                found[name][str(count)]["memory_mb"] = used
    return {
        "variants": found,
        "noise_share": noise_share(problem.first(1), device),
        "model": str(world) if world else f"random: std {WIDE_STD}, LayerScale 1",
        "threads": torch.get_num_threads(),
        "rounds": rounds,
    }


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """What training.py puts on top, from measure()'s figures."""
    exact, low, decided = (
        result["variants"][name][str(REPORTED)] for name in ("exact", "bfloat16", "finalists")
    )
    return {
        "selection_speedup": exact["speedup"],
        "selection_agreement": low["agreement"],
        "selection_regret": low["regret"],
        "selection_low_speedup": low["speedup"],
        "selection_finalists_speedup": decided["speedup"],
        "selection_finalists_agreement": decided["agreement"],
    }


def seconds_of(run: Callable[[], Any], *, device: torch.device) -> float:
    """Seconds of one call, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def variants(
    device: torch.device, *, compiled: bool
) -> dict[str, Callable[[Problem, int], Winners | None]]:
    """Name -> run(problem, K)."""
    is_cuda = device.type == "cuda"
    full: ProductsName = "bfloat16" if is_cuda else "float32"
    runs: dict[str, Callable[[Problem, int], Winners | None]] = {
        "plain": partial(run_plain, autocast=is_cuda),
        "exact": partial(run_select, products=full),
        "bfloat16": partial(run_select, products="bfloat16"),
        "finalists": partial(run_finalists, products="bfloat16"),
    }
    if is_cuda and torch.cuda.get_device_capability(device) >= (8, 9):
        runs["float8"] = partial(run_select, products="float8")
        runs["float8+8"] = partial(run_finalists, products="float8")
    if compiled:
        for name in [name for name in runs if name in ("exact", "bfloat16", "float8")]:
            losses = ChunkLosses()
            losses.compile(dynamic=False)
            products = full if name == "exact" else name
            runs[f"{name}, compiled"] = partial(run_select, products=products, chunk_losses=losses)
    return runs


def run_plain(problem: Problem, count: int, *, autocast: bool) -> None:
    """The plain form, its noise drawn as the released code draws it."""
    world, z, times = problem
    generator = torch.Generator(device=z.device).manual_seed(0)
    noise = world.draw_noise(len(z), z.shape[1] - 1, count, generator=generator)
    with torch.no_grad(), torch.autocast(z.device.type, torch.bfloat16, enabled=autocast):
        plain_select(world, z, times, noise)


def run_select(
    problem: Problem,
    count: int,
    *,
    products: ProductsName,
    chunk_losses: ChunkLosses | None = None,
) -> Winners:
    """One engineered variant."""
    return select(
        *problem,
        problem.noise,
        num_samples=count,
        products=products,
        chunk_losses=chunk_losses,
    )


def run_finalists(problem: Problem, count: int, *, products: ProductsName) -> Winners:
    """As the trainer's selection_finalists."""
    low = select(
        *problem, problem.noise, num_samples=count, num_finalists=FINALISTS, products=products
    )
    given = GivenNoise(problem.noise.at(low.finalists))
    last = select(*problem, given, num_samples=low.finalists.shape[2])
    indices = low.finalists.gather(2, last.indices)
    return last._replace(indices=indices)


def quality(
    problem: Problem, runs: dict[str, Callable[[Problem, int], Winners | None]], count: int
) -> dict[str, dict[str, float]]:
    """Agreement and regret of every variant, by the plain form's float32 losses of the same noise;
    of plain, the regret that a blind pick would have on average."""
    few = problem.first(max(1, min(16, (2048 if count <= REPORTED else 1024) // count)))
    candidates = few.noise.chunk(torch.zeros((), dtype=torch.int64, device=few.z.device), count)
    with torch.no_grad():
        best, losses = plain_select(*few, candidates)
    lowest, mean = losses.amin(dim=2), losses.mean(dim=2)
    found = {}
    for name, run in runs.items():
        picked = run(few, count) if name != "plain" else None
        if picked is None:
            continue
        picks = losses.gather(2, picked.indices)[..., 0]
        regret = (picks - lowest) / lowest
        found[name] = {
            "agreement": (picked.indices[..., 0] == best).float().mean().item(),
            "regret": regret.mean().item(),
            "largest_regret": regret.max().item(),
            "positions": best.numel(),
        }
    found["plain"] = {"regret_of_any": (mean / lowest).mean().item() - 1}
    return found


def _ratio(plain: list[float], other: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(plain, other, strict=True))


def noise_share(problem: Problem, device: torch.device) -> dict[str, float]:
    """Seconds of drawing REPORTED candidates, in the chunks of the selection, over its own."""
    shares = {}
    for products in ("float32", "bfloat16"):
        name: ProductsName = products  # type: ignore[assignment]
        size = default_chunks(problem.world, problem.z, num_samples=REPORTED, products=name).samples
        first = torch.zeros((), dtype=torch.int64, device=device)

        def draw(size: int = size, first: Tensor = first) -> None:
            for _ in range(0, REPORTED, size):
                problem.noise.chunk(first, size)

        whole = partial(run_select, problem, REPORTED, products=name)
        pairs = [
            (seconds_of(draw, device=device), seconds_of(whole, device=device)) for _ in range(2)
        ]
        shares[products] = statistics.median(drawn / took for drawn, took in pairs)
    return shares


def timed_windows(device: torch.device, count: int) -> int:
    """Windows that are timed at once."""
    if device.type == "cuda":
        return max(4, 16384 // count)
    return 1 if count > REPORTED else 2


def make_problem(
    device: torch.device,
    *,
    world: Path | None = None,
    deltas: Path | None = None,
    config: DeltaWorldConfig | None = None,
) -> Problem:
    """Enough windows for all figures: of the cache, or random."""
    num_windows = timed_windows(device, min(COUNTS)) if device.type == "cuda" else 16
    generator = torch.Generator().manual_seed(0)
    if world is None:
        if config is None:
            config = DeltaWorldConfig(layer_scale_init=1.0, initializer_range=WIDE_STD)
        model = DeltaWorldNetwork(config, generator=generator)
        z = torch.randn(num_windows, NUM_FRAMES, config.hidden_size, generator=generator)
        times = torch.rand(num_windows, NUM_FRAMES, generator=generator).cumsum(1) / 3
    else:
        if deltas is None:
            raise SystemExit("--world: give the --deltas it was trained on, too")
        model = DeltaWorldNetwork.from_pretrained(world)
        shards = DeltaShards(deltas, verify="size")
        picked = torch.randperm(shards.num_windows, generator=generator)[:num_windows].numpy()
        z = torch.from_numpy(shards.tokens(picked)).float()
        times = torch.from_numpy(shards.timestamps_s(picked)).float()
    return Problem(model.to(device).eval(), z.to(device), times.to(device))


def memory_of(
    name: str, counts: tuple[int, ...], device: torch.device, *, compiled: bool
) -> dict[int, float]:
    """K -> megabytes above what was held before, of MEASURED_WINDOWS windows."""
    if device.type == "cuda":
        problem = make_problem(device).first(MEASURED_WINDOWS)
        run, found = variants(device, compiled=compiled)[name], {}
        for count in counts:
            run(problem, count)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            run(problem, count)
            found[count] = (torch.cuda.max_memory_allocated(device) - before) / 1e6
        return found
    done = subprocess.run(
        [sys.executable, __file__, "--memory", name, *map(str, counts)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | ({"COMPILED": "1"} if compiled else {}),
    )
    return {int(count): used for count, used in json.loads(done.stdout).items()}


def print_memory(name: str, counts: list[int]) -> None:
    """In a process of its own: the peak of each K above what is held before, as a line of JSON."""
    device = torch.device("cpu")
    problem = make_problem(device).first(MEASURED_WINDOWS)
    run = variants(device, compiled="COMPILED" in os.environ)[name]
    found = {}
    for count in counts:
        before = resident_mb("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak
        run(problem, count)
        found[count] = resident_mb("VmHWM") - before
    print(json.dumps(found))


def resident_mb(name: str) -> float:
    """Memory that this process holds now (VmRSS), or has held at most (VmHWM). getrusage would
    begin with what the parent held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return int(line.split()[1]) / 1e3


def table(result: dict[str, Any]) -> str:
    """measure()'s figures as Markdown."""
    lines = [
        "| K | variant | s a window | speed-up | by CPU time | memory, MB | agreement | regret | "
        "largest |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for count in next(iter(result["variants"].values())):
        for name, by_count in result["variants"].items():
            row = by_count[count]
            used = f"{row['memory_mb']:.0f}" if "memory_mb" in row else "-"
            good = " | - | - | - |"
            if "agreement" in row:
                regrets = f"{row['regret']:.2g} | {row['largest_regret']:.2g}"
                good = f" | {row['agreement']:.3f} | {regrets} |"
            lines.append(
                f"| {count} | {name} | {row['seconds']:.3g} | {row['speedup']:.2f} | "
                f"{row['cpu_speedup']:.2f} | {used}{good}"
            )
    return "\n".join(lines)


def main() -> int:
    """Measures, prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--counts", type=int, nargs="+", default=list(COUNTS), metavar="K")
    parser.add_argument("--world", type=Path, default=None, help="model folder of a DeltaWorld")
    parser.add_argument("--deltas", type=Path, default=None, help="windows for it")
    parser.add_argument("--compile", action="store_true", help="compiled variants, too")
    parser.add_argument("--memory", nargs="+", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        print_memory(arguments.memory[0], [int(count) for count in arguments.memory[1:]])
        return 0
    result = measure(
        device=torch.device(arguments.device),
        counts=tuple(arguments.counts),
        rounds=arguments.rounds,
        world=arguments.world,
        deltas=arguments.deltas,
        compiled=arguments.compile,
        memory=arguments.world is None,
    )
    if str(REPORTED) in result["variants"]["exact"]:
        result = summary(result) | result
    print(table(result))
    print(f"noise: {result['noise_share']} of the selection's time at K = {REPORTED}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
