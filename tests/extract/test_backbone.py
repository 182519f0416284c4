"""The backbone loads, knows itself again, and refuses what it cannot be.

Its numbers are compared with the released ones in tests/parity.
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError
from safetensors.torch import load, save_file

from deltatok.extract.backbone import Backbone
from deltatok.shards.errors import DeltatokError, UsageError


@pytest.fixture
def folder(backbone_folder: Path, tmp_path: Path) -> Path:
    """A copy of the backbone's folder, free to be damaged."""
    return Path(shutil.copytree(backbone_folder, tmp_path / "backbone"))


def test_sizes_come_from_the_config(backbone: Backbone) -> None:
    assert (backbone.patch_size, backbone.hidden_size) == (16, 64)
    assert backbone.grid(48) == (3, 3)


@pytest.mark.parametrize(("size", "advice"), [(50, "48 or 64"), (5, "use 16"), (0, "use 16")])
def test_frame_size_off_the_patch_grid_names_the_nearest(
    backbone: Backbone, size: int, advice: str
) -> None:
    with pytest.raises(UsageError, match=advice):
        backbone.grid(size)


def test_bfloat16_stays_near_float32(backbone: Backbone, folder: Path) -> None:
    low = Backbone.load(str(folder), autocast="bfloat16")
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (6, 3, 64, 64), dtype=torch.uint8, generator=generator)
    exact, rounded = backbone.tokens(frames), low.tokens(frames)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() <= 0.05 * exact.abs().max()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="compiling for a CPU takes a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of itself
def test_compiled_equals_plain_but_for_rounding(backbone: Backbone, folder: Path) -> None:
    compiled = Backbone.load(str(folder), compile=True)
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8, generator=generator)
    plain = backbone.tokens(frames)
    assert (compiled.tokens(frames) - plain).abs().max() <= 1e-4 * plain.abs().max()
    assert compiled.identity() == backbone.identity()
    assert torch.equal(compiled.black_tokens(64), backbone.black_tokens(64))


def test_a_compiler_that_fails_says_what_to_do(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no compiler found")

    monkeypatch.setattr(torch, "compile", lambda model, **options: fail)
    compiled = Backbone.load(str(folder), compile=True)
    with pytest.raises(DeltatokError, match=r"no compiler found.*leave --compile out"):
        compiled.tokens(torch.zeros((2, 3, 64, 64), dtype=torch.uint8))


def test_identity_is_the_same_under_the_hub_s_tensor_names(
    backbone: Backbone, folder: Path
) -> None:
    path = folder / "model.safetensors"
    tensors = load(path.read_bytes())
    hub = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    longer = {f"model.{n}" if n.startswith("layer.") else n: t for n, t in hub.items()}
    for named in (hub, longer):
        save_file(named, path, metadata={"format": "pt"})
        assert Backbone.load(str(folder)).identity() == backbone.identity()


def test_identity_changes_with_one_weight(backbone: Backbone, folder: Path) -> None:
    weights = load((folder / "model.safetensors").read_bytes())
    weights["norm.weight"][0] += 1e-6
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    other = Backbone.load(str(folder)).identity()
    assert other["config"] == backbone.identity()["config"]
    assert other["weights_sha256"] != backbone.identity()["weights_sha256"]


def test_identity_holds_json_values_that_decide_the_output(backbone: Backbone) -> None:
    identity = json.loads(json.dumps(backbone.identity()))
    assert identity["config"]["rope_theta"] == 100.0
    assert identity["config"]["model_type"] == "dinov3_vit"
    assert "transformers_version" not in identity["config"]


def test_loading_prints_nothing(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Backbone.load(str(folder))
    assert capfd.readouterr() == ("", "")


def test_missing_preprocessor_config_is_named(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(UsageError, match=r"no preprocessor_config\.json"):
        Backbone.load(str(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_mean": [0.5]}, "image_mean"),
        ({"image_std": None}, "image_std"),
        ({"rescale_factor": 1.0}, "rescale_factor"),
        ({"do_normalize": False}, "do_normalize"),
    ],
)
def test_other_preprocessing_is_refused(folder: Path, change: dict, message: str) -> None:
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UsageError, match=message):
        Backbone.load(str(folder))


def test_weights_of_another_config_are_refused(folder: Path) -> None:
    weights = load((folder / "model.safetensors").read_bytes())
    del weights["norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"lack 1 tensors.*norm\.weight"):
        Backbone.load(str(folder))


def test_truncated_weights_are_refused(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match="cannot be loaded"):
        Backbone.load(str(folder))


@pytest.mark.parametrize("name", ["/no/such/folder", "./no-such-folder", "two words/x", "a/b/c"])
def test_a_name_that_is_neither_folder_nor_hub_id_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"no such folder|neither a folder"):
        Backbone.load(name)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no preprocessor_config"):
        Backbone.load(str(tmp_path))


def test_a_gated_hub_id_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, **_: object) -> str:
        raise GatedRepoError("403", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(UsageError, match=r"accept it and log in.*local folder"):
        Backbone.load("facebook/dinov3-vitb16-pretrain-lvd1689m")


def test_a_hub_id_without_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, **_: object) -> str:
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(UsageError, match=r"found on the hub \(no connection\).*local folder"):
        Backbone.load("facebook/dinov3-vitb16-pretrain-lvd1689m")
