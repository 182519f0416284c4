"""The per-class part of a report: IoU of every class, mid-term, folded away on the page."""

from collections.abc import Mapping, Sequence
from typing import Any

from .page import table_html
from .rows import ROW_LABELS, show


def class_table(
    per_class: Sequence[Mapping[str, Any]], names: Sequence[str], *, horizon: str
) -> tuple[list[str], list[list[str]]]:
    """Header and body cells: a line for each class that occurs in any row, a column for each row;
    IoU in percent, a dash where a class occurs in neither the labels nor the row."""
    rows = [entry for entry in per_class if entry["horizon"] == horizon]
    header = ["class", *(ROW_LABELS[entry["row"]] for entry in rows)]
    body = []
    for number, ious in enumerate(zip(*(entry["iou"] for entry in rows), strict=True)):
        if any(iou is not None for iou in ious):
            name = names[number] if number < len(names) else f"class {number}"
            body.append([name, *(show(iou, "miou") for iou in ious)])
    return header, body


def classes_html(per_class: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """The section of the page; nothing without mIoU."""
    if not per_class:
        return ""
    header, body = class_table(per_class, names, horizon="mid")
    return f"""<details><summary>IoU % of each class, mid-term</summary>
<div class="wide">{table_html(header, body)}</div></details>"""
