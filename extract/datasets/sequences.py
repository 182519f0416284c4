"""Any folders of frames and of their labels: DAVIS, CamVid, 7-Scenes, a user's own.

Two patterns below ROOT, of which the stars stand for the same text in both:

    --images "JPEGImages/480p/*/*.jpg" --labels "Annotations/480p/*/*.png"   sequence, frame
    --images "images/*.png"            --labels "labels/*.png"               frame; one sequence
    --images "rgb/frame-*.color.png"   --labels "depth/frame-*.depth.png"    the same

A sequence is in the order of its frames' names, numbers as numbers. Where all names have numbers
at even steps (the last one in each counts), one that is left out is a missing frame; otherwise the
frames count as they come. Frames without a label are context only; a label without its
frame is a missing frame.
"""

import glob
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

from ...shards.errors import UsageError
from ...shards.evaluation.labels import LabelRule
from .base import Dataset, DatasetConfig, DatasetTarget, need_layout, window_numbers

DEFAULT_STRIDE_S = 0.2
"""As most of the paper's data sets."""

_NUMBER = re.compile(r"([0-9]+)")


def load_sequences(config: DatasetConfig) -> Dataset:
    """The targets that the two patterns give; UsageError where they match nothing in common."""
    root = Path(config.root)
    images, labels, fps = config.images or "", config.labels or "", config.fps or 0.0
    need_layout(root, wanted=f"frames like {images} and labels like {labels}")
    stride = max(1, round((config.stride_s or DEFAULT_STRIDE_S) * fps))
    frames_by_stars, labels_by_stars = _matches(root, images), _matches(root, labels)
    _check_patterns(root, images, labels, frames_by_stars, labels_by_stars)
    sequences: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for stars in (*frames_by_stars, *labels_by_stars):
        sequences[stars[:-1]].add(stars[-1])
    targets, left_out = [], Counter[str]()
    for parents, names in sorted(sequences.items()):
        frames = {name: frames_by_stars.get((*parents, name)) for name in names}
        places = _places(names)
        by_place = {place: name for name, place in places.items()}
        for name, place in places.items():
            label = labels_by_stars.get((*parents, name))
            numbers = window_numbers(place, num_frames=config.frames_a_window, stride=stride)
            if label is None:
                continue
            if (place + 1) % (config.every or 1):
                left_out[f"not every {config.every}th"] += 1
            elif numbers[0] < 0:
                left_out["too near to the start of their sequence"] += 1
            else:
                files = [frames.get(by_place.get(number, "")) for number in numbers]
                targets.append(
                    DatasetTarget(
                        sequence="/".join(parents) or root.resolve().name,
                        name=name,
                        frames=tuple(filter(None, files)),
                        numbers=numbers,
                        label=label,
                        problem=_missing(numbers, files, by_place),
                    )
                )
    return Dataset(
        name=config.name or "sequences",
        fps=fps,
        stride=stride,
        targets=targets,
        kind=config.kind or "segmentation",
        rule=_rule(config),
        left_out=dict(left_out),
    )


def _rule(config: DatasetConfig) -> LabelRule:
    if config.kind == "depth":
        return LabelRule(name="depth", ignore=config.ignore, steps_per_m=config.steps_per_m)
    return LabelRule(name="binary" if config.binary else "stored", ignore=config.ignore)


def _matches(root: Path, pattern: str) -> dict[tuple[str, ...], str]:
    """What the stars stand for -> the path below `root`."""
    parts = pattern.split("/")
    if "*" not in pattern or "**" in pattern or ".." in parts or pattern.startswith("/"):
        raise UsageError(
            f"pattern {pattern!r}: wanted a path below --root with one * for every name that "
            "changes, like images/*/*.png"
        )
    stars = re.compile("([^/]*)".join(map(re.escape, pattern.split("*"))))
    found: dict[tuple[str, ...], str] = {}
    for path in sorted(root.glob("*".join(map(glob.escape, pattern.split("*"))))):
        name = path.relative_to(root).as_posix()
        match = stars.fullmatch(name)
        if match is not None and not path.name.startswith(".") and path.is_file():
            found[match.groups()] = name
    return found


def _check_patterns(
    root: Path,
    images: str,
    labels: str,
    frames_by_stars: Mapping[tuple[str, ...], str],
    labels_by_stars: Mapping[tuple[str, ...], str],
) -> None:
    if images.count("*") != labels.count("*"):
        raise UsageError(
            f"--images {images} has {images.count('*')} stars, --labels {labels} "
            f"{labels.count('*')}: wanted as many, for the same names"
        )
    for flag, pattern, found in (
        ("--images", images, frames_by_stars),
        ("--labels", labels, labels_by_stars),
    ):
        if not found:
            need_layout(root, pattern.split("*")[0].rpartition("/")[0] or ".", wanted=pattern)
            raise UsageError(f"{flag} {pattern}: no file in {root} has such a name")
    if not frames_by_stars.keys() & labels_by_stars.keys():
        raise UsageError(
            f"--images {images} and --labels {labels}: no frame has a label, e.g. "
            f"{next(iter(frames_by_stars.values()))} and {next(iter(labels_by_stars.values()))}: "
            "the stars must stand for the same text in both"
        )


def _places(names: set[str]) -> dict[str, int]:
    """Name -> its number in the sequence, from 0; gaps in evenly numbered names are kept."""
    ordered = sorted(names, key=_natural)
    numbers = [_last_number(name) for name in ordered]
    known = [number for number in numbers if number is not None]
    steps = [after - before for before, after in pairwise(known)]
    step = min(steps, default=0)
    if len(known) < len(ordered) or step < 1 or any(other % step for other in steps):
        return {name: place for place, name in enumerate(ordered)}
    return {name: (number - known[0]) // step for name, number in zip(ordered, known, strict=True)}


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts numbers in names as numbers."""
    parts = _NUMBER.split(name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def _last_number(name: str) -> int | None:
    numbers = _NUMBER.findall(name)
    return int(numbers[-1]) if numbers else None


def _missing(
    numbers: tuple[int, ...], files: list[str | None], by_place: Mapping[int, str]
) -> str | None:
    for number, file in zip(numbers, files, strict=True):
        if file is None:
            name = by_place.get(number)
            what = f"frame {name!r}, which has a label," if name else f"frame number {number}"
            return f"{what} is missing"
    return None
