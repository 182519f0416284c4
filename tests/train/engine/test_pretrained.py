"""Model folders come back bit for bit, and anything that does not fit is refused with its name."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltatok.shards.errors import DamagedShard, DeltatokError, UsageError
from deltatok.shards.files import sha256_file
from deltatok.train.engine.model_folder import read_class, read_provenance, weights_sha256
from deltatok.train.models.configs import DeltaTokConfig, DeltaWorldConfig, DINOWorldConfig
from deltatok.train.models.deltatok import DeltaTok
from deltatok.train.models.deltaworld import DeltaWorldNetwork
from deltatok.train.models.dinoworld import DINOWorld
from deltatok.train.models.heads import SegmentationHead, SegmentationHeadConfig
from deltatok.train.models.rgb_head import RGBHead, RGBHeadConfig

TOKENIZER = DeltaTokConfig(
    hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=12
)
PREDICTOR = {
    "hidden_size": 8,
    "predictor_hidden_size": 16,
    "predictor_num_hidden_layers": 1,
    "predictor_num_heads": 1,
}
MODELS = {
    "tokenizer": lambda: DeltaTok(TOKENIZER),
    "world": lambda: DeltaWorldNetwork(DeltaWorldConfig(rope_axis_sizes=(12,), **PREDICTOR)),
    "dinoworld": lambda: DINOWorld(DINOWorldConfig(rope_axis_sizes=(4, 4, 4), **PREDICTOR)),
    "segmentation": lambda: SegmentationHead(SegmentationHeadConfig(in_size=4, num_classes=3)),
    "rgb": lambda: RGBHead(
        RGBHeadConfig(
            in_size=3,
            hidden_size=8,
            depth=1,
            num_heads=1,
            mlp_size=8,
            patch=2,
            img_size=4,
            feature_weight=(0.1, 1 / 3, 2.0),
            feature_bias=(0.0, 0.5, 1.0),
        )
    ),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved tokenizer."""
    DeltaTok(TOKENIZER).save_pretrained(tmp_path / "model", {"patches": {"a": 1}})
    return tmp_path / "model"


def forget_checksums(folder: Path) -> None:
    """As an earlier version wrote it, or as somebody leaves it who changed it."""
    (folder / "checksums.json").unlink()


def edit_config(folder: Path, **changes: object) -> None:
    forget_checksums(folder)
    values = json.loads((folder / "config.json").read_text()) | changes
    kept = {name: value for name, value in values.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))


@pytest.mark.parametrize("name", MODELS)
def test_saved_models_come_back_bit_for_bit(name, tmp_path):
    model = MODELS[name]()
    model.save_pretrained(tmp_path, {})
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert weights_sha256(loaded) == weights_sha256(model)
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert [p.requires_grad for p in loaded.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]


def test_loaded_models_are_in_eval_mode(folder):
    assert not DeltaTok.from_pretrained(folder).training


def test_folder_states_class_and_provenance(folder):
    assert read_class(folder) == "DeltaTok"
    assert read_provenance(folder) == {"patches": {"a": 1}}


def test_saving_twice_gives_the_same_bytes(tmp_path):
    model = DeltaTok(TOKENIZER)
    model.save_pretrained(tmp_path / "a", {})
    model.save_pretrained(tmp_path / "b", {})
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["checksums.json", "config.json", "model.safetensors", "provenance.json"]
    assert all(
        (tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names
    )


def test_every_problem_with_the_weights_is_listed(folder):
    forget_checksums(folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["norm.bias"], tensors["z_embed.weight"]
    tensors["extra"] = torch.zeros(1)
    tensors["norm.weight"] = torch.zeros(9)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(DeltatokError) as caught:
        DeltaTok.from_pretrained(folder)
    for text in (
        "missing: norm.bias",
        "missing: z_embed.weight",
        "left over: extra",
        "misshapen: norm.weight: got (9,), wanted (8,)",
    ):
        assert text in str(caught.value)


def test_half_precision_weights_are_loaded_as_float32(folder):
    forget_checksums(folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({name: value.half() for name, value in tensors.items()}, folder / "model.safetensors")
    loaded = DeltaTok.from_pretrained(folder)
    assert {value.dtype for value in loaded.parameters()} == {torch.float32}


def test_another_class_is_refused(folder):
    with pytest.raises(UsageError, match="holds a DeltaTok, wanted a DeltaWorld"):
        DeltaWorldNetwork.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_moe": True}, "unknown key .use_moe"),
        ({"rope_theta": None}, "no field .rope_theta"),
        ({"hidden_size": "8"}, "hidden_size is '8'"),
        ({"use_delta": 1}, "use_delta is 1, wanted true or false"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True, wanted an integer"),
        ({"hidden_size": 6}, "multiple of 4"),
        ({"class": None}, 'no "class"'),
    ],
)
def test_bad_config_is_refused(folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(DeltatokError, match=message):
        DeltaTok.from_pretrained(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(UsageError, match=f"{name}: no such file"):
        DeltaTok.from_pretrained(folder)


@pytest.mark.parametrize("has_checksums", [True, False])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_truncated_file_is_named(folder, name, has_checksums):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])
    if not has_checksums:
        forget_checksums(folder)
    with pytest.raises(DeltatokError, match=name):
        DeltaTok.from_pretrained(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "provenance.json"])
def test_a_flipped_bit_is_refused_by_the_files_name_and_both_hashes(folder, name):
    wanted = sha256_file(folder / name)
    data = bytearray((folder / name).read_bytes())
    data[-4] ^= 1
    (folder / name).write_bytes(data)
    got = sha256_file(folder / name)
    with pytest.raises(DamagedShard, match=rf"{name}: not what was written.*{got}.*{wanted}"):
        DeltaTok.from_pretrained(folder)


def test_a_folder_without_checksums_is_loaded(folder):
    forget_checksums(folder)
    assert DeltaTok.from_pretrained(folder).config == TOKENIZER


@pytest.mark.parametrize("has_checksums", [True, False])
@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "provenance.json", "checksums.json"]
)
def test_a_pipe_in_place_of_a_file_is_refused_without_waiting(folder, name, has_checksums):
    if not has_checksums:
        forget_checksums(folder)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(DamagedShard, match=f"{name}: .*no regular file"):
        DeltaTok.from_pretrained(folder)
        read_provenance(folder)


def test_hash_changes_with_one_weight_and_with_a_name():
    model = DeltaTok(TOKENIZER)
    before = weights_sha256(model)
    with torch.no_grad():
        model.norm.bias[3] = 1e-30
    assert weights_sha256(model) != before
    other = DeltaTok(replace(TOKENIZER, use_swiglu=False))
    assert weights_sha256(other) != weights_sha256(model)
