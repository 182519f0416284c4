"""Principal components: fitted once, the same for all, part of what a cache is."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from deltatok.extract import pca
from deltatok.extract.backbone import Backbone
from deltatok.extract.config import ExtractConfig
from deltatok.extract.run import run_extraction
from deltatok.shards.cache import read_cache_info
from deltatok.shards.errors import CacheMismatch, DamagedShard, UsageError
from deltatok.shards.patches.projection import (
    fit_projection,
    read_agreed_projection,
    read_projection,
)
from deltatok.shards.patches.reader import PatchShards
from deltatok.shards.tools.export import export_cache
from deltatok.shards.tools.verify import verify_cache

ConfigMaker = Callable[..., ExtractConfig]
LAYERS = (1, 3)
WIDTH = 128


@pytest.fixture(scope="module")
def wide(backbone_folder: Path) -> Backbone:
    """Two layers of the tiny backbone side by side: 128 channels."""
    return Backbone.load(str(backbone_folder), layers=LAYERS)


@pytest.fixture
def config(make_config: ConfigMaker) -> ExtractConfig:
    return make_config(layers=LAYERS, pca=10, frame_size=64)


def test_components_are_those_of_the_standardised_features() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(500, 6)) @ rng.normal(size=(6, 6)) * [1, 10, 0.1, 1, 5, 0]
    found = fit_projection(features.mean(0), np.cov(features.T, bias=True), num_components=3)
    deviation = features.std(0)
    standard = (features - features.mean(0)) / np.where(deviation > 0, deviation, 1)
    _, _, rows = np.linalg.svd(standard, full_matrices=False)
    tokens = found.project(features.astype(np.float32))
    np.testing.assert_allclose(np.abs(tokens), np.abs(standard @ rows[:3].T), atol=1e-4)
    restored = (found.restore(tokens) - features.mean(0)) / found.deviation
    np.testing.assert_allclose(restored, standard @ rows[:3].T @ rows[:3], atol=1e-4)
    assert (found.components[range(3), np.abs(found.components).argmax(1)] > 0).all()


def test_a_cache_stores_the_projected_tokens(config: ExtractConfig, wide: Backbone) -> None:
    run_extraction(config, backbone=wide)
    cache = PatchShards(config.out)
    projection = read_projection(config.out)
    assert cache.shape[2] == 10
    assert projection.components.shape == (10, WIDTH)
    np.testing.assert_allclose(
        projection.components @ projection.components.T, np.eye(10), atol=1e-5
    )
    assert cache.info.identity["backbone"]["pca"] == projection.identity()
    assert cache.info.identity["backbone"]["layers"] == [1, 3]
    run_extraction(replace(config, out=f"{config.out}-whole", pca=None), backbone=wide)
    whole = PatchShards(f"{config.out}-whole")
    for window in range(3):
        wanted = projection.project(whole.tokens([window])[0])
        np.testing.assert_allclose(cache.tokens([window])[0], wanted, atol=0.05)
    np.testing.assert_allclose(cache.black, projection.project(whole.black), atol=1e-3)
    # Fitted on these very clips: the first component has the most variance, none a mean.
    tokens = cache.tokens(range(len(cache))).reshape(-1, 10)
    assert np.all(np.diff(tokens.std(0)) < 0.1 * tokens.std(0)[0])
    report = verify_cache(config.out)
    assert not report.problems


def test_a_second_run_and_a_resumed_one_have_the_same_bytes(
    config: ExtractConfig, wide: Backbone, digests: Callable[[Path], dict[str, str]]
) -> None:
    run_extraction(config, backbone=wide)
    again = replace(config, out=f"{config.out}-again")
    Path(again.out).mkdir()
    shutil.copy(Path(config.out, "pca.npy"), again.out)  # another rank was first
    run_extraction(again, backbone=wide)
    fresh = replace(config, out=f"{config.out}-fresh")
    run_extraction(fresh, backbone=wide)
    assert digests(Path(config.out)) == digests(Path(again.out)) == digests(Path(fresh.out))
    (Path(again.out) / "shards" / "000001.json").unlink()
    run_extraction(again, backbone=wide)
    assert digests(Path(config.out)) == digests(Path(again.out))


def test_what_the_first_process_fitted_is_what_all_use(
    config: ExtractConfig, wide: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_extraction(config, backbone=wide)
    first = read_projection(config.out)
    other = replace(first, mean=first.mean + 1)
    monkeypatch.setattr(pca, "fit", lambda *_, **__: other)
    run_extraction(config, backbone=wide)  # resumed: nothing is fitted
    late = replace(config, out=f"{config.out}-late")

    def race(*_: object, **__: object) -> object:
        pca.agree_on_projection(Path(late.out), first)  # while it was fitting
        return other

    Path(late.out).mkdir()
    monkeypatch.setattr(pca, "fit", race)
    run_extraction(late, backbone=wide)
    assert read_projection(late.out).identity() == first.identity()


def test_another_cache_takes_the_components_over(config: ExtractConfig, wide: Backbone) -> None:
    run_extraction(config, backbone=wide)
    other = replace(config, out=f"{config.out}-val", pca=config.out, limit=2, max_quarantined=1.0)
    run_extraction(other, backbone=wide)
    ours, theirs = read_cache_info(config.out), read_cache_info(other.out)
    assert ours.identity["backbone"] == theirs.identity["backbone"]
    assert read_projection(other.out).identity() == read_projection(config.out).identity()


def test_int8_scales_are_fitted_on_what_is_stored(config: ExtractConfig, wide: Backbone) -> None:
    config = replace(config, dtype="int8")
    run_extraction(config, backbone=wide)
    cache = PatchShards(config.out)
    assert cache.channel_scale.shape == (10,)
    assert not verify_cache(config.out).problems


def test_an_export_keeps_the_components(config: ExtractConfig, wide: Backbone) -> None:
    run_extraction(config, backbone=wide)
    export_cache([config.out], f"{config.out}-copy")
    assert (
        read_projection(f"{config.out}-copy").identity() == read_projection(config.out).identity()
    )
    assert not verify_cache(f"{config.out}-copy").problems


def test_a_cache_in_a_store_has_them_and_is_gone_on_with(
    config: ExtractConfig, wide: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with int8 scales, which are agreed on in the same folder, beside the store's address."""
    pytest.importorskip("obstore", reason="pip install 'deltatok[cloud]'")
    monkeypatch.setenv("DELTATOK_CACHE_DIR", str(tmp_path / "mirror"))
    (tmp_path / "store").mkdir()
    stored = replace(config, out=f"file://{tmp_path}/store/cache", dtype="int8")
    run_extraction(stored, backbone=wide)
    assert (tmp_path / "store" / "cache" / "pca.npy").is_file()
    shutil.rmtree(tmp_path / "mirror")  # another machine goes on: all it knows is the store
    (tmp_path / "store" / "cache" / "shards" / "000001.json").unlink()
    (tmp_path / "store" / "cache" / "shards" / "000001.zarr.zip").unlink()
    run_extraction(stored, backbone=wide)
    plain = replace(config, dtype="int8")
    run_extraction(plain, backbone=wide)
    store = PatchShards(tmp_path / "store" / "cache")
    assert store.info.identity == PatchShards(plain.out).info.identity
    assert read_projection(store.folder).identity() == read_projection(plain.out).identity()


def test_more_components_than_channels_are_refused(config: ExtractConfig, wide: Backbone) -> None:
    with pytest.raises(UsageError, match=r"pca: got 129 components.* 128 channels"):
        run_extraction(replace(config, pca=129), backbone=wide)
    assert not Path(config.out).exists()


def test_too_few_frames_are_refused(config: ExtractConfig, wide: Backbone) -> None:
    with pytest.raises(UsageError, match=r"fitted on \d+ tokens, wanted at least .* 128"):
        run_extraction(replace(config, limit=1), backbone=wide)
    assert not Path(config.out).exists()


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"pca": 9}, r"backbone\.pca\.components"), ({"pca": None}, r"backbone\.pca")],
)
def test_a_cache_of_other_components_is_refused(
    changes: dict[str, object], field: str, config: ExtractConfig, wide: Backbone
) -> None:
    run_extraction(config, backbone=wide)
    with pytest.raises(CacheMismatch, match=field):
        run_extraction(replace(config, **changes), backbone=wide)  # type: ignore[arg-type]


def test_a_cache_without_components_or_of_other_layers_is_refused(
    config: ExtractConfig, wide: Backbone, finished: Path, backbone: Backbone
) -> None:
    with pytest.raises(CacheMismatch, match=r"backbone\.pca is missing"):
        run_extraction(replace(config, out=str(finished)), backbone=wide)
    with pytest.raises(UsageError, match="no principal components"):
        run_extraction(replace(config, pca=str(finished)), backbone=wide)
    run_extraction(config, backbone=wide)
    with pytest.raises(CacheMismatch, match=r"128 channels, the backbone's have 64.*layers"):
        run_extraction(
            replace(config, pca=config.out, out=f"{config.out}-2", layers=()), backbone=backbone
        )


def test_changed_components_are_refused(config: ExtractConfig, wide: Backbone) -> None:
    run_extraction(config, backbone=wide)
    path = Path(config.out) / "pca.npy"
    rows = np.load(path)
    rows[3, 3] += 1e-6
    np.save(path, rows)
    with pytest.raises(DamagedShard, match=r"pca\.npy: 10 components"):
        run_extraction(config, backbone=wide)
    assert any("pca.npy" in problem for problem in map(str, verify_cache(config.out).problems))


@pytest.mark.parametrize("damage", ["deviation", "shape", "nan"])
def test_a_file_that_is_no_projection_is_refused(damage: str, tmp_path: Path) -> None:
    rows = np.ones((4, 3), dtype=np.float32)
    if damage == "deviation":
        rows[1, 0] = 0
    elif damage == "shape":
        rows = np.ones((6, 3), dtype=np.float32)
    else:
        rows[0, 0] = np.nan
    np.save(tmp_path / "pca.npy", rows)
    with pytest.raises(DamagedShard, match=r"pca\.npy"):
        read_agreed_projection(tmp_path)


def test_the_device_projects_as_the_file_says(wide: Backbone) -> None:
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8, generator=generator)
    features = wide.tokens(frames)
    flat = features.flatten(0, 1).double().numpy()
    found = fit_projection(flat.mean(0), np.cov(flat.T, bias=True), num_components=4)
    projected = replace(wide, projection=found)
    assert projected.hidden_size == 4
    np.testing.assert_allclose(
        projected.tokens(frames).numpy(), found.project(features.numpy()), atol=1e-4
    )
