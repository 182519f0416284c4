"""deltatok-shards export: its flags reach what they name, its refusals have the right exit code."""

from pathlib import Path

import numpy as np
import pytest

from deltatok.pipeline.commands.extract import main as extract
from deltatok.pipeline.commands.shards import main
from deltatok.shards import DeltaShards, PatchShards


def test_the_tiny_world_is_exported_and_verifies(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind in ("patches", "deltas"):
        out = tmp_path / kind
        words = ["export", str(tiny_run / kind), "--out", str(out), "--windows-per-shard", "4"]
        assert main(words) == 0
        assert capsys.readouterr().out.splitlines()[-1] == f"12 windows: {out}"
        assert main(["verify", str(out)]) == 0
        assert main(words) == 0  # done already
    assert PatchShards(tmp_path / "patches").info.counts["shards"] == 3
    old, new = DeltaShards(tiny_run / "deltas"), DeltaShards(tmp_path / "deltas")
    assert new.fingerprint == old.fingerprint
    assert np.sort(new[:], axis=None).tolist() == np.sort(old[:], axis=None).tolist()


def test_clips_come_from_a_file_and_the_dtype_changes(tiny_run: Path, tmp_path: Path) -> None:
    keys = PatchShards(tiny_run / "patches").keys
    (tmp_path / "keys.txt").write_text(f"{keys[1]}\n\n{keys[0]}\n")
    words = ["export", str(tiny_run / "patches"), "--out", str(tmp_path / "out")]
    words += ["--clips", str(tmp_path / "keys.txt"), "--dtype", "int8"]
    assert main(words) == 0
    out = PatchShards(tmp_path / "out")
    assert (sorted(out.keys), out.dtype) == (sorted(keys[:2]), "int8")


def test_an_export_in_another_dtype_is_still_what_the_tokenizer_was_trained_on(
    tiny_run: Path, tmp_path: Path
) -> None:
    """Another fingerprint, the same backbone and preprocessing."""
    words = ["export", str(tiny_run / "patches"), "--dtype", "int8", "--out", str(tmp_path / "a")]
    assert main(words) == 0
    words = ["--patches", str(tmp_path / "a"), "--tokenizer", str(tiny_run / "tokenizer")]
    assert extract([*words, "--out", str(tmp_path / "b")]) == 0
    deltas = DeltaShards(tmp_path / "b")
    assert deltas.info.parent_fingerprint == PatchShards(tmp_path / "a").fingerprint
    assert deltas.info.identity["patches"]["storage"]["converted_from"] == {"dtype": "float16"}


def test_refusals_have_their_exit_codes(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "out")]
    patches, deltas = str(tiny_run / "patches"), str(tiny_run / "deltas")
    (tmp_path / "empty.txt").touch()
    for words, code, said in (
        ([patches, deltas], 4, "format is"),
        ([patches, str(tiny_run / "val-patches")], 4, "identity.sampling"),
        ([patches, "--split", "val"], 2, "has no split 'val'"),
        ([patches, "--clips", str(tmp_path / "empty.txt")], 2, "names no clip"),
        ([patches, "--clips", str(tmp_path / "none.txt")], 2, "cannot be read"),
        ([patches, "--format", "npy"], 2, "--format"),
        ([str(tmp_path)], 4, "not a deltatok cache"),
    ):
        assert main(["export", *words, *out]) == code
        assert said in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
