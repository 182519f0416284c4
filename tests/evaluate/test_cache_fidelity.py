"""cache-fidelity: known errors are measured, other windows refused, the command prints a table."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from deltatok.evaluate.cache_fidelity import CacheFidelityConfig, fidelity_table, run_cache_fidelity
from deltatok.pipeline.commands.evaluate import main
from deltatok.shards import CacheInfo, CacheMismatch, PatchShards, UsageError
from deltatok.shards.cache import finish_cache, open_cache
from deltatok.shards.patches.int8 import channel_scale_of, scale_sha256, write_channel_scale
from deltatok.shards.patches.writer import write_black, write_patch_shard
from deltatok.shards.plan import PlanEntry, write_plan
from deltatok.shards.windows import ShardRows

Copy = Callable[..., str]


@pytest.fixture
def copy(tiny: Any, tmp_path: Path) -> Copy:
    """Stores the windows of the tiny cache again, changed, in one shard; gives the folder."""

    def make(
        name: str,
        *,
        dtype: str = "float16",
        tokens: Callable[[np.ndarray], np.ndarray] = lambda values: values,
        identity: Callable[[dict[str, Any]], None] = lambda identity: None,
        columns: Callable[[dict[str, Any]], None] = lambda columns: None,
    ) -> str:
        source = PatchShards(tiny.path("patches"))
        values = tokens(source.tokens(np.arange(len(source))))
        described = json.loads(json.dumps(source.info.identity)) | {"storage": {"dtype": dtype}}
        scale = channel_scale_of(np.square(values, dtype=np.float64).mean(axis=(0, 1, 2)))
        if dtype == "int8":
            described["storage"]["scale_sha256"] = scale_sha256(scale)
        identity(described)
        folder = tmp_path / name
        shape = source.info.shape
        open_cache(folder, CacheInfo(format=source.info.format, identity=described, shape=shape))
        table = source.table()
        rows = {
            "keys": source.keys,
            "frame_index": table.frame_index.copy(),
            "timestamps_s": table.timestamps_s,
            "crop": table.crop,
            "flipped": table.flipped,
            "clip": table.clip.astype(np.int32),
            "tokens": values,
        }
        columns(rows)
        write_plan(
            folder,
            [PlanEntry(key=key, source=key, size_bytes=1, shard=0) for key in rows["keys"]],
        )
        write_black(folder, source.black)
        if dtype == "int8":
            write_channel_scale(folder, scale)
        write_patch_shard(folder, 0, ShardRows(**rows), dtype=dtype, seed=1)
        finish_cache(folder)
        return str(folder)

    return make


def _config(tiny: Any, patches: str, **changes: Any) -> CacheFidelityConfig:
    settings = {"patches": patches, "reference": tiny.path("patches"), "device": "cpu"}
    return CacheFidelityConfig(**settings | changes)


def test_the_same_tokens_in_other_shards_have_no_error(tiny: Any, copy: Copy) -> None:
    result = run_cache_fidelity(_config(tiny, copy("same")))
    found = result["patches"]
    assert (found["relative_error"], found["error_over_change"]) == (0.0, 0.0)
    assert found["cosine_mean"] == pytest.approx(1.0, abs=1e-6)
    assert (result["windows"], result["frames"]) == (5, 35)


def test_an_error_of_known_size_is_measured(tiny: Any, copy: Copy) -> None:
    """Every token is doubled: the error is the token, the direction stays."""
    folder = copy("double", tokens=lambda values: 2 * values)
    found = run_cache_fidelity(_config(tiny, folder))["patches"]
    reference = PatchShards(tiny.path("patches")).load().astype(np.float64)
    change = np.square(np.diff(reference, axis=1)).sum(axis=(2, 3)).mean()
    size = np.square(reference).sum(axis=(2, 3)).mean()
    assert found["relative_error"] == pytest.approx(1.0, rel=1e-3)
    assert found["error_over_change"] == pytest.approx(np.sqrt(size / change), rel=1e-3)
    assert found["cosine_min"] == pytest.approx(1.0, abs=1e-6)
    flipped = run_cache_fidelity(_config(tiny, copy("flipped", tokens=lambda values: -values)))
    assert flipped["patches"]["cosine_mean"] == pytest.approx(-1.0, abs=1e-6)


def test_int8_and_bfloat16_cost_what_their_bits_allow(tiny: Any, copy: Copy) -> None:
    errors = {}
    for dtype in ("bfloat16", "int8"):
        result = run_cache_fidelity(_config(tiny, copy(dtype, dtype=dtype)))
        assert result["patches"]["dtype"] == dtype
        errors[dtype] = result["patches"]["relative_error"]
    assert 0.0005 < errors["bfloat16"] < 0.003 < errors["int8"] < 0.015


def test_models_and_labels_add_their_metrics(tiny: Any, copy: Copy) -> None:
    names = ("tokenizer", "head", "labels")
    config = _config(tiny, copy("int8", dtype="int8"), **{name: tiny.path(name) for name in names})
    result = run_cache_fidelity(config)
    ours, theirs = result["patches"], result["reference"]
    assert ours["reconstruction_loss"] == pytest.approx(theirs["reconstruction_loss"], rel=0.05)
    assert ours["reconstruction_loss"] != theirs["reconstruction_loss"]
    assert 0 < theirs["miou"] < 1
    assert ours["miou"] == pytest.approx(theirs["miou"], abs=0.1)
    batched = run_cache_fidelity(_config(tiny, config.patches, batch_windows=1))
    assert batched["patches"]["relative_error"] == pytest.approx(ours["relative_error"], rel=1e-12)


def test_max_windows_looks_at_some_only(tiny: Any, copy: Copy) -> None:
    result = run_cache_fidelity(_config(tiny, copy("same"), max_windows=2))
    assert (result["windows"], result["frames"]) == (2, 14)


def _set(*names: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(target: dict[str, Any]) -> None:
        for name in names[:-1]:
            target = target[name]
        target[names[-1]] = value

    return change


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (("sampling", "seed"), 1),
        (("sampling", "fps"), 2.0),
        (("backbone", "weights_sha256"), "bbbb"),
        (("preprocessing", "frame_size"), 64),
        (("autocast_dtype",), "bfloat16"),
    ],
)
def test_caches_of_other_settings_are_refused_by_field(
    tiny: Any, copy: Copy, field: tuple[str, ...], value: Any
) -> None:
    folder = copy("other", identity=_set(*field, value=value))
    with pytest.raises(CacheMismatch, match=rf"{'.'.join(field)} is .*but"):
        run_cache_fidelity(_config(tiny, folder))


def test_caches_of_other_clips_or_frames_are_refused_by_name(tiny: Any, copy: Copy) -> None:
    def rename(columns: dict[str, Any]) -> None:
        columns["keys"] = ["other.mp4", *columns["keys"][1:]]

    def shift(columns: dict[str, Any]) -> None:
        columns["frame_index"][2, 3] += 1

    with pytest.raises(CacheMismatch, match=r"keys: clip '.*' is in .* only \(2 such clips\)"):
        run_cache_fidelity(_config(tiny, copy("clips", columns=rename)))
    with pytest.raises(CacheMismatch, match=r"frame_index of a window of clip"):
        run_cache_fidelity(_config(tiny, copy("frames", columns=shift)))


def test_a_tokenizer_of_another_backbone_is_refused(
    tiny: Any, copy: Copy, make: SimpleNamespace
) -> None:
    make.change_provenance(
        Path(tiny.path("tokenizer")), {"patches": make.identity("uniform", "cccc")}
    )
    with pytest.raises(CacheMismatch, match=r"backbone\.weights_sha256"):
        run_cache_fidelity(_config(tiny, copy("same"), tokenizer=tiny.path("tokenizer")))


def test_a_head_needs_labels() -> None:
    with pytest.raises(UsageError, match="--head without --labels"):
        CacheFidelityConfig(patches="a", reference="b", head="c")


def test_the_command_prints_a_table_and_writes_json(
    tiny: Any, copy: Copy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "fidelity.json"
    folders = ["--patches", copy("int8", dtype="int8"), "--reference", tiny.path("patches")]
    assert main(["cache-fidelity", *folders, "--device", "cpu", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    result = json.loads(out.read_text())
    assert fidelity_table(result) in printed
    assert "| | patches (int8) | reference (float16) |" in printed
    assert f"cache fidelity: {out}" in printed
    assert result["patches"]["bytes_per_frame"] > 0


def test_the_command_ends_with_4_for_other_windows(
    tiny: Any, copy: Copy, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy("other", identity=_set("sampling", "seed", value=1))
    assert main(["cache-fidelity", "--patches", folder, "--reference", tiny.path("patches")]) == 4
    assert "sampling.seed is 1, but 0" in capsys.readouterr().err
