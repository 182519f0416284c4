"""`deltatok-evaluate forecast`: score world models on a cache of evaluation windows.

Frames 0..C-1 of a window are seen, frame C-1+mid is the target; the short horizon starts later
and ends at the same target, so that both have the same bounds. Everything is computed from the
cached features: no backbone, no network. Cache, models, labels and videos are opened and checked
before any work.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ...shards.cache import compare
from ...shards.errors import UsageError
from ...shards.files import make_folder
from ...shards.patches.reader import PatchShards
from ...shards.running.devices import DEVICES, choose_device, memory_errors, precision_name
from ...shards.running.stopwatch import Stopwatch
from ...train.losses import log_cosh
from ...train.models.heads import DepthHead, SegmentationHead
from ...train.probes import probe_tokenizer
from ..report.animation import moving_panels
from ..report.panels import (
    ShownWindow,
    class_panel,
    depth_panel,
    feature_panel,
    keep_features,
    most_uncertain_first,
    rgb_panel,
)
from ..report.paper_rows import compare_with_paper
from ..report.pictures import Tile
from ..report.plots import Curve, plot_curves, read_curve
from ..report.rows import HORIZONS
from ..report.write import Pictures, Report, write_report
from .config import UNNAMED, ForecastConfig
from .diagnosis import diagnose
from .drift import score_drift, step_labels
from .ensemble import EnsembleScorer
from .models import ForecastModels, load_models
from .modes import ModeScorer
from .rollout import HorizonForecast, encode_windows, forecast_horizon, more_seeds, seeds_of
from .scores import Scorer, check_labels, with_intervals
from .windows import WindowArrangement, is_evaluation, open_windows

if TYPE_CHECKING:
    from ...extract.sources.clip import Clip
    from .predictions import PredictionRows

logger = logging.getLogger(__name__)

PROBE_WINDOWS = 64
"""Windows the tokenizer is probed on, at most: 1.4 GB of features at 512 px (a guess)."""


@dataclass(frozen=True, kw_only=True)
class ForecastInputs:
    """Everything that is read, on the device where it is computed with."""

    config: ForecastConfig
    cache: PatchShards
    models: ForecastModels
    arrangement: WindowArrangement
    """What belongs together, and its labels."""
    videos: "dict[str, Clip]"
    """Clip key -> clip; empty without videos."""
    curves: list[Curve]
    device: torch.device
    predictions: "PredictionRows | None" = None
    """Another model's frames; None without any."""
    drift: "ForecastInputs | None" = None
    """The same of the windows of long rollouts; None without any."""

    def batches(self) -> list[list[int]]:
        """The windows that are scored: all, or those that have predictions."""
        batches = self.arrangement.batches()
        if self.predictions is None or not self.config.predictions_subset:
            return batches
        kept = set(self.predictions.folder.windows())
        rest = [[window for window in batch if window in kept] for batch in batches]
        return [batch for batch in rest if batch]

    def windows(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Features (B, T, N, D) and times (B, T) of the frames that take part, T = C + mid.

        Times are seconds from the window's first frame, float32.
        """
        num_frames = self.config.num_frames
        x = torch.from_numpy(self.cache.tokens(indices)[:, :num_frames]).to(self.device)
        times = self.cache.timestamps_s(indices)[:, :num_frames]
        return x, torch.from_numpy(times - times[:, :1]).to(self.device)

    def step_s(self, indices: list[int]) -> float:
        """Seconds of a step after the frames seen: the median over these windows."""
        config, times = self.config, self.cache.timestamps_s(indices).astype(np.float64)
        ahead = times[:, config.num_frames - 1] - times[:, config.num_context - 1]
        return float(np.median(ahead)) / config.mid_steps

    def shown_window(
        self, index: int, forecast: HorizonForecast, position: int, truth: Tensor
    ) -> ShownWindow:
        """What the panels of window `index` need: it is number `position` in the mid `forecast`,
        and its true features are `truth` (T, N, D)."""
        config, key = self.config, self.cache.keys[int(self.cache.clip_index[index])]
        frame_index = self.cache.frame_index([index])[0, : config.num_frames].tolist()
        times = self.cache.timestamps_s([index])[0, : config.num_frames]
        _, _, height, width = self.cache.crop[index].tolist()
        kept = keep_features(forecast, position, grid=self.cache.grid)
        rows, samples, numbers, spread = kept
        return ShownWindow(
            title=f"{key}, window {index}",
            times_s=tuple((times - times[config.num_context - 1]).tolist()),
            aspect=width / height,
            grid=self.cache.grid,
            truth=truth.float().cpu().numpy(),
            rows=rows,
            samples=samples,
            sample_numbers=numbers,
            spread=spread,
            labels=self.arrangement.shown_labels(index),
            frames=self.arrangement.shown_frames(index) or self._frames(key, frame_index),
        )

    def _frames(self, key: str, frame_index: list[int]) -> tuple[Tile, ...]:
        if not self.videos:
            return ()
        if key not in self.videos:
            logger.warning("clip %s is not among --videos: its pictures have no frames", key)
            return ()
        from ..report.frames import read_frames

        return tuple(read_frames(self.videos[key], frame_index) or ())


def open_inputs(config: ForecastConfig, device: torch.device) -> ForecastInputs:
    """Open and check everything.

    Raises:
        CacheMismatch: the cache holds training windows, or a model does not belong to it; names
            the field.
        UsageError: too few frames or no windows; models, labels, videos or curves of no use.
    """
    cache = PatchShards(config.patches)
    if is_evaluation(cache.info):
        name = cache.info.identity["sampling"].get("dataset")
        if name and config.dataset == UNNAMED:
            config = replace(config, dataset=name)
    else:
        compare(
            cache.info.identity,
            {"sampling": {"policy": "uniform"}},
            what_got=f"--patches {config.patches}",
            what_wanted="a cache of policy evaluation, or of windows to evaluate on",
            fields=["sampling.policy"],
            advice="extract one with --dataset, or with --sampling uniform",
        )
    if cache.shape[0] < config.num_frames:
        raise UsageError(
            f"--patches {config.patches}: {cache.shape[0]} frames a window, wanted at least "
            f"num_context + mid_steps = {config.num_frames}; extract with --num-frames "
            f"{config.num_frames}"
        )
    if not cache.num_windows:
        raise UsageError(f"--patches {config.patches}: no windows; see its quarantine.jsonl")
    models = load_models(config, cache, device)
    arrangement = open_windows(config, cache, models.head)
    videos: dict[str, Clip] = {}
    if config.videos:
        from ..report.frames import clips_by_key  # with decoders, which take a while to import

        videos = clips_by_key(config.videos)
    curves = [read_curve(path) for path in config.curves]
    predictions = None
    if config.predictions:
        from .predictions import PredictionRows  # with decoders and a backbone

        predictions = PredictionRows(config, cache, device)
    inputs = ForecastInputs(
        config=config,
        cache=cache,
        models=models,
        arrangement=arrangement,
        videos=videos,
        curves=curves,
        device=device,
        predictions=predictions,
    )
    return replace(inputs, drift=open_drift(inputs))


def open_drift(inputs: ForecastInputs) -> ForecastInputs | None:
    """The same models, and the windows they are rolled out on for `drift_steps` steps; None where
    that is 0, and where the windows of `patches` are too short or end at a target.

    Raises:
        CacheMismatch: --drift-patches is of another backbone or preprocessing; names the field.
        UsageError: its windows are too short, or end at a target; labels of no use.
    """
    config, folder = inputs.config, inputs.config.drift_patches
    if not config.drift_steps:
        return None
    cache = inputs.cache if folder is None else PatchShards(folder)
    labels = config.labels if folder is None else config.drift_labels
    wanted = config.num_context + config.drift_steps
    if is_evaluation(cache.info) or cache.shape[0] < wanted or not cache.num_windows:
        if folder is None:
            return None
        raise UsageError(
            f"--drift-patches {folder}: {cache.num_windows} windows of {cache.shape[0]} frames, "
            f"sampling policy {cache.info.identity['sampling']['policy']}; wanted uniform windows "
            f"of num_context + drift_steps = {wanted} frames or more: extract with --sampling "
            f"uniform --num-frames {wanted}"
        )
    compare(
        cache.info.identity,
        inputs.cache.info.identity,
        what_got=f"--drift-patches {folder}",
        what_wanted=f"--patches {config.patches}",
        fields=["backbone", "preprocessing"],
        advice="extract both with the same backbone and frame size",
    )
    of_drift = replace(
        config,
        patches=config.patches if folder is None else folder,
        labels=labels,
        head=config.head if labels else None,
        mid_steps=config.drift_steps,
        short_steps=1,
        num_seeds=1,
        regressor_null=False,
        depth_range_m=None,
        futures=None,
        predictions=None,
        predictions_subset=False,
        backbone=None,
        drift_patches=None,
        drift_labels=None,
    )
    windows = open_windows(of_drift, cache, inputs.models.head if labels else None)
    return replace(inputs, config=of_drift, cache=cache, arrangement=windows, predictions=None)


def windows_to_show(clip_index: NDArray[np.int64], count: int) -> list[int]:
    """Up to `count` window numbers, spread evenly: first over clips, then over their windows."""
    # Rank of each window within its clip: windows of equal rank are one round through the clips.
    order = np.argsort(clip_index, kind="stable")
    clips = clip_index[order]
    starts = np.searchsorted(clips, clips)
    rank = np.arange(len(clips)) - starts
    rounds = order[np.lexsort((clips, rank))]
    num_clips = len(np.unique(clip_index))
    if count < num_clips:
        picked = rounds[np.linspace(0, num_clips, count, endpoint=False).astype(int)]
    else:
        picked = rounds[:count]
    return sorted(picked.tolist())


def run_forecast(config: ForecastConfig) -> Report:
    """Evaluate, and write report.json, report.html and pictures into `config.out`.

    Raises:
        CacheMismatch: the cache holds training windows, or a model does not belong to it.
        UsageError: too few frames a window; labels, videos or curves that cannot be used.
        DeltatokError: features that are not finite; names the window. Out of the device's memory.
    """
    device = choose_device(config.device, automatic=DEVICES)
    on_cuda = device.type == "cuda"
    watch = Stopwatch(wait=partial(torch.cuda.synchronize, device) if on_cuda else None)
    precision = precision_name(config.autocast, device)
    with (
        memory_errors("forecast", lambda: f"lower batch_windows, now {config.batch_windows}"),
        torch.no_grad(),
        torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"),
    ):
        with watch.at("load"):
            out = make_folder(config.out, flag="--out")
            inputs = open_inputs(config, device)
            config = inputs.config
            if inputs.models.head is not None:
                labelled = map(inputs.arrangement.labelled, inputs.batches())
                check_labels(chain.from_iterable(labelled), inputs.models.head)
                if (drift := inputs.drift) is not None and drift.config.labels is not None:
                    by_batch = (step_labels(drift, batch) for batch in drift.batches())
                    frames = (frame for _, frame in chain.from_iterable(by_batch))
                    check_labels(frames, inputs.models.head)
        scorer, modes, ensemble, shown = score_windows(inputs, watch)
        with watch.at("probes"):
            probes = probe(inputs) | scorer.probes() | ({} if modes is None else modes.probes())
        with watch.at("drift"):
            drifted = None if inputs.drift is None else score_drift(inputs.drift)
        with watch.at("intervals"):
            rows = with_intervals(config, scorer.rows(), scorer.sequences)
        diagnosis = diagnose(config, rows, probes)
        with watch.at("pictures"):
            pictures = draw_pictures(inputs, shown)
    cache, scored = inputs.cache, list(chain.from_iterable(inputs.batches()))
    provenance = inputs.models.provenance
    if inputs.predictions is not None:
        provenance = provenance | {"predictions": inputs.predictions.provenance()}
    report = Report(
        rows=rows,
        probes=probes,
        best_of_k=scorer.best_of_k(),
        drift=drifted,
        rank_histogram=ensemble.rank_histogram(scorer.sequences),
        per_class_iou=scorer.per_class_iou(),
        provenance=provenance,
        seconds=watch.seconds,
        config=asdict(config) | {"device": str(device), "autocast": precision},
        num_windows=len(scored),
        num_clips=len(set(cache.clip_index[scored].tolist())),
        step_s=inputs.step_s(scored),
        paper=compare_with_paper(config, cache.info.identity, head=inputs.models.head),
        diagnosis=diagnosis,
    )
    write_report(out, report, pictures, scorer.sequences)
    return report


def score_windows(
    inputs: ForecastInputs, watch: Stopwatch
) -> tuple[Scorer, ModeScorer | None, EnsembleScorer, list[ShownWindow]]:
    """Forecast every window of the cache at both horizons; keep the windows that will be shown."""
    config, cache, models = inputs.config, inputs.cache, inputs.models
    keys = [inputs.arrangement.sequence(index) for index in range(len(cache))]
    scorers = {
        seed: Scorer(replace(config, seed=seed), head=models.head, grid=cache.grid, keys=keys)
        for seed in seeds_of(config)
    }
    scorer, modes = scorers[config.seed], open_modes(inputs)
    ensemble = EnsembleScorer(config, inputs.arrangement)
    to_show = set(windows_to_show(cache.clip_index, config.num_pictures))
    shown: list[ShownWindow] = []
    batches = inputs.batches()
    with tqdm(
        total=sum(map(len, batches)), desc="forecast", unit="window", disable=None
    ) as progress:
        for indices in batches:
            with watch.at("read"):
                x, times = inputs.windows(indices)
                labels = inputs.arrangement.labelled(indices)
            with watch.at("encode"):
                names = inputs.arrangement.names(indices)
                batch = encode_windows(models, indices, x, times, names=names)
                scorer.add_tokens(batch)
            for horizon in HORIZONS:
                with watch.at("forecast"):
                    forecast = forecast_horizon(config, models, batch, horizon)
                if inputs.predictions is not None:
                    with watch.at("predictions"):
                        rows = inputs.predictions.rows(indices, horizon, forecast.truth)
                        forecast.rows.update(rows)
                more = more_seeds(config, models, batch, horizon)
                for seed, found in chain([(config.seed, forecast)], watch.each("seeds", more)):
                    with watch.at("score"):
                        scorers[seed].add(horizon, found, batch)
                        scorers[seed].add_labels(horizon, found, labels)
                        parts = scorers[seed].sequences
                        ensemble.add(horizon, found, batch, seed=seed, scores=parts)
                        if modes is not None:
                            modes.add(horizon, found, batch, seed=seed, scores=parts)
            with watch.at("pictures"):  # of the mid horizon, the last of the loop above
                for position, index in enumerate(indices):
                    if index in to_show:
                        shown.append(inputs.shown_window(index, forecast, position, x[position]))
            progress.update(len(indices))
    for seed in seeds_of(config)[1:]:
        scorer.sequences.merge(scorers[seed].sequences)
    return scorer, modes, ensemble, shown


def open_modes(inputs: ForecastInputs) -> ModeScorer | None:
    """What scores modes, where futures are given."""
    head = inputs.models.head
    if inputs.config.futures is None:
        return None
    if not isinstance(head, SegmentationHead):
        raise UsageError("--futures: known futures are class maps; give a segmentation --head")
    return ModeScorer(inputs.config, inputs.cache, head, inputs.arrangement)


def probe(inputs: ForecastInputs) -> dict[str, float | None]:
    """The tokenizer's z_swap_ratio, zero_z_ratio and copy_last_ratio on PROBE_WINDOWS windows,
    spread evenly over the cache, in log-cosh (the released tokenizer loss); None where there is
    nothing to divide by."""
    count = min(PROBE_WINDOWS, len(inputs.cache))
    indices = np.linspace(0, len(inputs.cache), count, endpoint=False).astype(int)
    frames, _ = inputs.windows(indices.tolist())
    found = probe_tokenizer(
        inputs.models.tokenizer,
        frames,
        grid=inputs.cache.grid,
        loss=log_cosh,
        windows_at_once=inputs.config.batch_windows,
    )
    ratios = {
        "z_swap_ratio": found.z_swap_ratio,
        "zero_z_ratio": found.zero_z_ratio,
        "copy_last_ratio": found.copy_last_ratio,
    }
    return {name: ratio if np.isfinite(ratio) else None for name, ratio in ratios.items()}


def draw_pictures(inputs: ForecastInputs, shown: Sequence[ShownWindow]) -> Pictures:
    """Panels of the windows that were kept, and the training curves."""
    head, rgb_head = inputs.models.head, inputs.models.rgb_head
    classes, depth, rgb = [], [], []
    shown = most_uncertain_first(shown)
    if isinstance(head, SegmentationHead):
        names = inputs.config.class_names
        classes = [class_panel(window, head, class_names=names) for window in shown]
    if isinstance(head, DepthHead):
        depth = [depth_panel(window, head) for window in shown]
    if rgb_head is not None:
        rgb = [rgb_panel(window, rgb_head) for window in shown]
    features = [feature_panel(window) for window in shown]
    return Pictures(
        moving=moving_panels((rgb, classes, depth, features), [w.times_s for w in shown]),
        features=features,
        classes=classes,
        depth=depth,
        rgb=rgb,
        curves=plot_curves(inputs.curves),
    )
