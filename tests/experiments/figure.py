"""The picture of the experiments in docs/experiments.md, from the JSON files beside this script.

    python tests/experiments/figure.py --out docs/little-world.png

Left: mid-term mIoU by candidates (candidates.json), the paper's figure 5 at toy scale. Middle:
validation loss by windows a clip, each seed and their mean (draws.json). Right: z-swap ratio over
the tokenizer's steps (layer_scale.json and layer_scale_002.json).
"""

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

HERE = Path(__file__).parent
BLUE, ORANGE, GREEN, GREY = "#0090d0", "#e08000", "#00a070", "#6e7781"


def main() -> None:
    """Draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the PNG")
    arguments = parser.parse_args()
    figure = Figure(figsize=(10.5, 3.4), dpi=110, layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    _candidates(left)
    _draws(middle)
    _layer_scale(right)
    for axes in (left, middle, right):
        axes.grid(color="#d0d7de", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.legend(fontsize=7.5, frameon=False)
    figure.savefig(arguments.out, facecolor="white", metadata={"Software": None})


def _read(name: str) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((HERE / name).read_text())
    return read


def _candidates(axes: Axes) -> None:
    rows = [row for row in _read("candidates.json")["rows"] if "mid best miou" in row["values"]]
    rows.sort(key=lambda row: int(row["num_samples_train"]))
    counts = [row["num_samples_train"] for row in rows]
    for name, label, colour in (
        ("best", "best of 20 samples", BLUE),
        ("mean", "mean of samples", ORANGE),
    ):
        values = [100 * row["values"][f"mid {name} miou"] for row in rows]
        axes.plot(counts, values, color=colour, marker="o", markersize=3, label=label)
    single = 100 * rows[0]["values"]["mid discriminative miou"]
    axes.axhline(single, color=GREEN, linestyle="--", linewidth=1.2, label="discriminative")
    axes.set_xscale("log", base=4)
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    axes.set(xlabel="candidates in training, K", ylabel="mid-term mIoU, %", ylim=(0, None))
    axes.set_title("How many candidates?", fontsize=10)


def _draws(axes: Axes) -> None:
    rows = _read("draws.json")["rows"]
    losses: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        losses[row["windows_per_clip"]].append(row["validation_best_loss"])
    places = {count: place for place, count in enumerate(sorted(losses))}
    for count, values in losses.items():
        axes.plot([places[count]] * len(values), values, ".", color=GREY, markersize=5)
    means = [statistics.mean(losses[count]) for count in sorted(losses)]
    axes.plot(list(places.values()), means, color=BLUE, label="mean of seeds (dots)")
    fresh = {row["windows_per_clip"] for row in rows if row["fresh"]}
    names = [f"{count}\n(fresh)" if count in fresh else str(count) for count in places]
    axes.set_xticks(list(places.values()), names)
    axes.set(xlabel="cached windows a clip", ylabel="validation loss, best of candidates")
    axes.set_title("How many cached draws?", fontsize=10)


def _layer_scale(axes: Axes) -> None:
    styles = {0.08: "-", 0.02: ":"}
    seen = set()
    for name in ("layer_scale.json", "layer_scale_002.json"):
        result = _read(name)
        width = result["initializer_range"]
        for run in result["runs"]:
            init = run["layer_scale_init"]
            steps, ratios = zip(*run["z_swap_ratio"], strict=True)
            label = None if (width, init) in seen else f"LayerScale {init:g}, std {width:g}"
            seen.add((width, init))
            colour = BLUE if init < 0.01 else ORANGE
            axes.plot(steps, ratios, styles[width], color=colour, linewidth=1.2, label=label)
    axes.axhline(1, color=GREY, linewidth=0.8)
    axes.set(xlabel="tokenizer step", ylabel="z-swap ratio (1: token unused)", ylim=(0, None))
    axes.set_title("Does the decoder use its token?", fontsize=10)


if __name__ == "__main__":
    main()
