"""deltatok-shards bench: figures of every contestant, for both kinds of cache."""

import json
import shutil
from pathlib import Path

import pytest

from deltatok.pipeline.commands.shards import main
from deltatok.shards.cache import reopen_cache

QUICK = ("--rounds", "1", "--seconds", "0.02")


def test_patches_are_held_against_the_memory_map(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", str(tiny_run / "patches"), *QUICK, "--json", str(tmp_path / "j")]
    assert main([*words, "--residency", "map", "stream"]) == 0
    found = json.loads((tmp_path / "j").read_text())
    ratio = found["loader_pairs_per_s"] / found["memmap_pairs_per_s"]
    assert found["loader_over_memmap"] == pytest.approx(ratio)
    assert {"memmap", "reader", "disk", "loader:map", "loader:stream"} <= set(found["rates"])
    assert all(rate > 0 for rate in found["rates"].values())
    assert "| loader:map |" in capsys.readouterr().out


def test_deltas_are_held_against_memory(tiny_run: Path, tmp_path: Path) -> None:
    words = ["bench", str(tiny_run / "deltas"), *QUICK, "--cold", "--json", str(tmp_path / "j")]
    assert main([*words, "--residency", "memory", "stream"]) == 0
    found = json.loads((tmp_path / "j").read_text())
    ratio = found["loader_windows_per_s"] / found["in_memory_windows_per_s"]
    assert found["loader_over_memory"] == pytest.approx(ratio)


@pytest.mark.parametrize("words", [("--rounds", "0"), ("--batch-size", "-1"), ("--seconds", "0")])
def test_settings_that_cannot_be_are_refused(
    tiny_run: Path, words: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", str(tiny_run / "deltas"), *words]) == 2
    assert "wanted" in capsys.readouterr().err


def test_a_folder_that_is_no_cache_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", str(tmp_path)]) == 4
    assert "error:" in capsys.readouterr().err


def test_a_cache_that_is_not_finished_is_refused(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_run / "patches", tmp_path / "patches")
    reopen_cache(tmp_path / "patches")
    assert main(["bench", str(tmp_path / "patches")]) == 4
    assert "is not finished" in capsys.readouterr().err
