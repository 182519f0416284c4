"""Drift: how errors build up over rollouts of many steps (the paper's appendix D).

The forecasts of `num_context` frames are scored at each of `drift_steps` steps, of windows that are
long enough. Beside the rows of the report that no truth chose, step by step:

    reconstruction, _open_loop   the tokenizer alone: what of the loss is not the predictor's
    sample                       the first sample: what comes if one is drawn
    best                         the best sample of each step, chosen anew at every step

    report.json  "drift": {"steps", "step_s", "num_windows", "num_clips", "fingerprint": the cache,
                  "rows": [{"row", "step": from 1 on, "metric", "value", "interval_low",
                            "interval_high"}],
                  "growth": [{"row", "value", "interval_low", "interval_high"}]}

growth is what the feature loss rises by in a step: (that of the last step - that of the first) /
(steps - 1). Letters: B windows, S samples, H steps, N patch tokens, D channels.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ...shards.errors import DeltatokError
from ..report.rows import DRIFT_ROWS
from .intervals import Estimate, Resamples
from .rollout import HorizonForecast, encode_windows, feature_loss, forecast_horizon
from .scores import LabelledFrame, label_sums
from .sequences import Score, SequenceScores
from .windows import UniformWindows

if TYPE_CHECKING:
    from .run import ForecastInputs

LOSS, GROWTH = "feature_loss", "growth"


def score_drift(inputs: "ForecastInputs") -> dict[str, Any]:
    """What report.json has under "drift"; inputs: of windows of num_context + drift_steps frames,
    `mid_steps` being `drift_steps`.

    Raises DeltatokError for features that are not finite; names the window.
    """
    config, windows, batches = inputs.config, inputs.arrangement, inputs.batches()
    scores = SequenceScores()
    with tqdm(total=sum(map(len, batches)), desc="drift", unit="window", disable=None) as progress:
        for indices in batches:
            x, times = inputs.windows(indices)
            names = windows.names(indices)
            batch = encode_windows(inputs.models, indices, x, times, names=names)
            forecast = forecast_horizon(config, inputs.models, batch, "mid")
            rows, keys = drift_rows(forecast), [windows.sequence(index) for index in indices]
            scores.windows.update(keys)
            for name, row in rows.items():
                losses = feature_loss(row, forecast.truth).double().cpu().numpy()
                for index, key, of_window in zip(indices, keys, losses, strict=True):
                    if not np.isfinite(of_window).all():
                        raise DeltatokError(
                            f"window {index}: the features of the row {name} are not finite after "
                            f"{len(of_window)} steps; evaluate with --autocast float32, or with "
                            "--drift-steps 0"
                        )
                    ones = np.ones(len(of_window))
                    scores.add(Score(LOSS, name, LOSS), config.seed, key, of_window, ones)
                    if len(of_window) > 1:
                        growth = (of_window[-1] - of_window[0]) / (len(of_window) - 1)
                        scores.add(Score(GROWTH, name, LOSS), config.seed, key, growth, 1)
            _add_labels(inputs, scores, indices, rows)
            progress.update(len(indices))
    scored = [index for indices in batches for index in indices]
    return {
        "steps": config.mid_steps,
        "step_s": inputs.step_s(scored),
        "num_windows": len(scored),
        "num_clips": len(set(inputs.cache.clip_index[scored].tolist())),
        "fingerprint": inputs.cache.info.fingerprint,
        **_estimates(scores, config.mid_steps, seed=config.seed),
    }


def drift_rows(forecast: HorizonForecast) -> dict[str, Tensor]:
    """Row name -> (B, H, N, D), of DRIFT_ROWS."""
    rows = {name: row for name, row in forecast.rows.items() if name in DRIFT_ROWS}
    samples = forecast.samples
    if samples is not None:
        losses = feature_loss(samples, forecast.truth[:, None].expand_as(samples))
        best = losses.argmin(dim=1)  # (B, H)
        window, step = torch.meshgrid(*map(torch.arange, best.shape), indexing="ij")
        rows["best"] = samples[window, best.cpu(), step]
        rows["sample"] = samples[:, 0]
    return rows


def step_labels(
    inputs: "ForecastInputs", indices: list[int]
) -> Iterator[tuple[int, LabelledFrame]]:
    """The labels of a batch, with the step (from 0 on) that each is of; none without labels."""
    config, windows = inputs.config, inputs.arrangement
    if config.labels is not None and isinstance(windows, UniformWindows):
        for step in range(config.mid_steps):
            for frame in windows.labelled(indices, config.num_context + step):
                yield step, frame


def _add_labels(
    inputs: "ForecastInputs", scores: SequenceScores, indices: list[int], rows: dict[str, Tensor]
) -> None:
    head, seed = inputs.models.head, inputs.config.seed
    for step, frame in step_labels(inputs, indices):
        assert head is not None
        for name, row in rows.items():
            tokens = row[list(frame.positions), step]
            found = label_sums(head, tokens, frame, grid=inputs.cache.grid)["miou"]
            scores.add(Score(_step_name(step), name, "miou"), seed, frame.sequence, *found)


def _step_name(step: int) -> str:
    return f"step {step + 1}"


def _estimates(scores: SequenceScores, steps: int, *, seed: int) -> dict[str, Any]:
    resamples = Resamples(len(scores.windows), seed=seed)
    rows: list[dict[str, Any]] = []
    growth: list[dict[str, Any]] = []
    for name in DRIFT_ROWS:
        for sums in scores.by_seed(Score(LOSS, name, LOSS), scores.windows).values():
            for step, found in enumerate(resamples.curve(sums), start=1):
                rows.append({"row": name, "step": step, "metric": LOSS, **_plain(found)})
        for step in range(steps):
            score = Score(_step_name(step), name, "miou")
            if by_seed := scores.by_seed(score, scores.windows):
                found = resamples.estimate("miou", by_seed)
                rows.append({"row": name, "step": step + 1, "metric": "miou", **_plain(found)})
        for sums in scores.by_seed(Score(GROWTH, name, LOSS), scores.windows).values():
            growth += [{"row": name, **_plain(found)} for found in resamples.curve(sums)]
    return {"rows": rows, "growth": growth}


def _plain(found: Estimate) -> dict[str, float | None]:
    return {"value": found.value, "interval_low": found.low, "interval_high": found.high}
