"""The section of a report on samples held against the one future that came."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from ..tables import Table
from .plots import COLOURS, Plot, draw_plot
from .rows import (
    ENSEMBLE_ROWS,
    HORIZONS,
    MODE_ROW_LABELS,
    SAMPLES_ROW,
    ReportRow,
    find_row,
    show_row,
)


@dataclass(frozen=True, kw_only=True)
class EnsembleSection:
    """What the page shows of it."""

    energy: Table
    """The energy score: a line a row, a column a horizon."""
    spread: Table
    """Spread over skill and the share outside: a line each, what it should be last."""
    plot: Plot
    """The rank histograms."""


def ensemble_section(
    rows: Sequence[ReportRow], ranks: Sequence[Mapping[str, Any]], *, num_samples: int
) -> EnsembleSection | None:
    """None without samples, or with a single one. ranks: `rank_histogram` of the report."""
    if not ranks:
        return None
    energy = [
        [MODE_ROW_LABELS[name], *map(show_row, cells)]
        for name in ENSEMBLE_ROWS
        if any(cells := _cells(rows, name, "energy_score"))
    ]
    spread = [
        [text, *map(show_row, _cells(rows, SAMPLES_ROW, metric)), wanted]
        for metric, text, wanted in (
            ("spread_skill", "spread / skill", "1"),
            (
                "outside_share",
                "truth outside all samples, % of the channels",
                f"{100 * expected_outside(num_samples):.1f}",
            ),
        )
    ]
    return EnsembleSection(
        energy=Table(["row", *(f"energy score ↓ {horizon}" for horizon in HORIZONS)], energy),
        spread=Table(["samples", *HORIZONS, "if the truth could be one of them"], spread),
        plot=_plot(ranks),
    )


def expected_outside(num_samples: int) -> float:
    """Share of the channels whose truth is outside all samples where it could be one of them."""
    return 2 / (num_samples + 1)


def _cells(rows: Sequence[ReportRow], name: str, metric: str) -> list[ReportRow | None]:
    return [find_row(rows, horizon=horizon, row=name, metric=metric) for horizon in HORIZONS]


def _plot(ranks: Sequence[Mapping[str, Any]]) -> Plot:
    by_horizon = {
        horizon: [entry for entry in ranks if entry["horizon"] == horizon] for horizon in HORIZONS
    }
    ends = [
        f"{horizon}: rank 0 {100 * found[0]['share']:.1f} %, rank {found[-1]['rank']} "
        f"{100 * found[-1]['share']:.1f} %, even would be {100 / len(found):.1f} %"
        for horizon, found in by_horizon.items()
    ]

    def draw(figure: Figure, ink: dict[str, str]) -> None:
        panels = figure.subplots(1, len(by_horizon), squeeze=False, sharey=True)[0]
        for axes, (horizon, found) in zip(panels, by_horizon.items(), strict=True):
            numbers = [entry["rank"] for entry in found]
            axes.bar(numbers, [100 * entry["share"] for entry in found], color=COLOURS[0])
            for entry in found:
                if entry["interval_low"] is not None:
                    ends = [100 * entry["interval_low"], 100 * entry["interval_high"]]
                    axes.plot([entry["rank"]] * 2, ends, color=ink["ink"], linewidth=1)
            axes.axhline(100 / len(found), color=COLOURS[1], linewidth=1.2, linestyle="--")
            axes.set(xlabel="samples below the truth", title=horizon)
            axes.grid(visible=False, axis="x")
        panels[0].set_ylabel("% of the channels")

    alt = "Rank of the truth among the samples, over all channels. " + "; ".join(ends) + "."
    return draw_plot(draw, alt=alt)
