"""Runs of the quickstart's stages with other settings, for the experiments beside this file.

Each stage goes through its ordinary command, so a run that was finished is not done again, and one
that was killed goes on.
"""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from deltatok.pipeline.commands.pipeline import quickstart_file
from deltatok.pipeline.stages import COMMANDS, read_pipeline
from deltatok.shards.errors import UsageError
from deltatok.shards.files import write_json


class QuickstartRuns:
    """Stages of the quickstart that was made in `quickstart`, run anew into `out`."""

    def __init__(self, quickstart: Path, out: Path) -> None:
        pipeline = read_pipeline(quickstart_file(), out=str(quickstart), settings=[])
        self._stages = {stage.name: stage for stage in pipeline.stages}
        for setting in ("drift_patches", "drift_labels"):  # 10 s a report that no row here needs
            self._stages["report"].settings.pop(setting, None)
        self.out = out

    def run(self, stage: str, name: str, settings: Mapping[str, Any]) -> Path:
        """Run `stage` with its own settings but for `settings` (nested ones are merged; None takes
        a key away) into OUT/name; gives that folder. Raises UsageError if the command fails."""
        merged = merge(copy.deepcopy(self._stages[stage].settings), settings)
        folder = self.out / name
        merged["out"] = str(folder)
        file = self.out / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(merged, sort_keys=False))
        code = COMMANDS[self._stages[stage].command](["--config", str(file)])
        if code:
            raise UsageError(f"{file}: the stage {stage} ended with exit code {code}")
        return folder


def merge(settings: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` with `changes`, nested mappings merged; None takes a key away."""
    for key, value in changes.items():
        if value is None:
            settings.pop(key, None)
        elif isinstance(value, Mapping):
            settings[key] = merge(settings.get(key, {}), value)
        else:
            settings[key] = value
    return settings


def logged(run: Path, name: str) -> list[list[float]]:
    """[step, value] of a logged value, in order of steps, from a run folder's log.jsonl."""
    lines = (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
    found = {line["step"]: line[name] for line in map(json.loads, lines) if name in line}
    return [[step, value] for step, value in sorted(found.items())]


def report_values(report: Path) -> dict[str, float]:
    """ "short best miou" and so on -> value, from a report folder."""
    rows = json.loads((report / "report.json").read_text(encoding="utf-8"))["rows"]
    return {f"{row['horizon']} {row['row']} {row['metric']}": row["value"] for row in rows}


def save(file: Path, result: Mapping[str, Any]) -> None:
    """Print a result and write it as JSON."""
    write_json(file, result)
    print(json.dumps(result, indent=1))
