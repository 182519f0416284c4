"""Released checkpoints: in and out without a bit changed, and refused where they do not fit."""

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from deltatok.shards.errors import DeltatokError, UsageError
from deltatok.train.engine.model_folder import read_provenance, weights_sha256
from deltatok.train.models.configs import DeltaTokConfig, DeltaWorldConfig, DINOWorldConfig
from deltatok.train.models.deltatok import DeltaTok
from deltatok.train.models.deltaworld import DeltaWorldNetwork
from deltatok.train.models.dinoworld import DINOWorld
from deltatok.train.models.heads import (
    DepthHead,
    DepthHeadConfig,
    SegmentationHead,
    SegmentationHeadConfig,
)
from deltatok.train.models.rgb_head import RGBHead, RGBHeadConfig
from deltatok.train.official import export_official, import_official, read_official, rgb_constants

PREDICTOR = {
    "hidden_size": 8,
    "predictor_hidden_size": 64,
    "predictor_num_hidden_layers": 2,
    "predictor_num_heads": 1,
}
RGB = {"feature_weight": (1.0, 2.0, 0.5), "feature_bias": (0.0, 0.1, -0.1)}
TOKENIZER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS = {
    "tokenizer": (lambda: DeltaTok(DeltaTokConfig(intermediate_size=64, **TOKENIZER)), {}),
    "plain tokenizer": (
        lambda: DeltaTok(
            DeltaTokConfig(
                intermediate_size=40,
                use_gated_attn=False,
                use_qk_norm=False,
                use_swiglu=False,
                **TOKENIZER,
            )
        ),
        {"num_attention_heads": 2},
    ),
    "frame tokenizer": (
        lambda: DeltaTok(DeltaTokConfig(intermediate_size=64, use_delta=False, **TOKENIZER)),
        {"use_delta": False},
    ),
    "world": (lambda: DeltaWorldNetwork(DeltaWorldConfig(**PREDICTOR)), {}),
    "discriminative": (lambda: DeltaWorldNetwork(DeltaWorldConfig(use_bom=False, **PREDICTOR)), {}),
    "dinoworld": (lambda: DINOWorld(DINOWorldConfig(**PREDICTOR)), {}),
    "segmentation": (
        lambda: SegmentationHead(SegmentationHeadConfig(in_size=4, num_classes=3)),
        {},
    ),
    "depth": (lambda: DepthHead(DepthHeadConfig(in_size=4)), {}),
    "rgb": (
        lambda: RGBHead(
            RGBHeadConfig(
                in_size=3,
                hidden_size=16,
                depth=2,
                num_heads=2,
                mlp_size=8,
                patch=2,
                img_size=4,
                **RGB,
            )
        ),
        {"num_heads": 2, **RGB},
    ),
}


class Trap:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    """A small released tokenizer."""
    return MODELS["tokenizer"][0]().state_dict()


@pytest.mark.parametrize("name", MODELS)
def test_round_trip_is_bit_identical(name, tmp_path):
    build, overrides = MODELS[name]
    model = build()
    model.save_pretrained(tmp_path / "ours", {})
    export_official(tmp_path / "ours", tmp_path / "last.ckpt")
    imported = import_official(
        tmp_path / "last.ckpt",
        tmp_path / "again",
        class_name="DINOWorld" if name == "dinoworld" else None,
        overrides=overrides,
    )
    assert imported.config == model.config
    assert weights_sha256(type(model).from_pretrained(tmp_path / "again")) == weights_sha256(model)
    export_official(tmp_path / "again", tmp_path / "again.ckpt")
    first, again = read_official(tmp_path / "last.ckpt"), read_official(tmp_path / "again.ckpt")
    assert list(first) == list(again)
    assert all(map(torch.equal, first.values(), again.values()))


@pytest.mark.parametrize("nested", [True, False])
def test_flat_and_nested_dicts_are_read(state, nested, tmp_path):
    file = tmp_path / "pytorch_model.bin"
    torch.save({"state_dict": state, "global_step": 7} if nested else state, file)
    import_official(file, tmp_path / "out")
    assert weights_sha256(DeltaTok.from_pretrained(tmp_path / "out"))


def test_imported_folder_names_its_file(state, tmp_path):
    torch.save(state, tmp_path / "pytorch_model.bin")
    import_official(tmp_path / "pytorch_model.bin", tmp_path / "out")
    origin = read_provenance(tmp_path / "out")["imported_from"]
    assert origin["file"] == "pytorch_model.bin"
    assert len(origin["sha256"]) == 64


def test_half_precision_becomes_float32(state, tmp_path):
    torch.save({name: value.bfloat16() for name, value in state.items()}, tmp_path / "a.bin")
    import_official(tmp_path / "a.bin", tmp_path / "out")
    loaded = DeltaTok.from_pretrained(tmp_path / "out")
    assert {value.dtype for value in loaded.parameters()} == {torch.float32}


def test_every_tensor_that_does_not_fit_is_listed(state, tmp_path):
    del state["encoder_blocks.1.norm1.bias"]
    state["network.norm.weight"] = state["norm.weight"]
    state["decoder_blocks.0.norm2.weight"] = torch.zeros(17)
    torch.save(state, tmp_path / "a.bin")
    with pytest.raises(DeltatokError) as caught:
        import_official(tmp_path / "a.bin", tmp_path / "out")
    for text in (
        "missing: encoder_blocks.1.norm1.bias",
        "left over: network.norm.weight",
        "misshapen: decoder_blocks.0.norm2.weight: got (17,), wanted (16,)",
    ):
        assert text in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_another_width_is_refused(state, tmp_path):
    torch.save(state, tmp_path / "a.bin")
    with pytest.raises(DeltatokError, match=r"misshapen: z_embed\.weight: got \(1, 16\)"):
        import_official(tmp_path / "a.bin", tmp_path / "out", overrides={"hidden_size": 24})


def test_head_without_running_statistics_is_mean_0_variance_1(tmp_path):
    state = MODELS["segmentation"][0]().state_dict()
    kept = {name: value for name, value in state.items() if "running" not in name}
    del kept["bn.num_batches_tracked"]
    torch.save(kept, tmp_path / "a.bin")
    head = import_official(tmp_path / "a.bin", tmp_path / "out")
    assert torch.all(head.bn.running_mean == 0)
    assert torch.all(head.bn.running_var == 1)


def test_pickle_that_runs_code_is_refused_and_not_run(tmp_path):
    trap = tmp_path / "ran"
    torch.save({"state_dict": {}, "callbacks": Trap(trap)}, tmp_path / "a.ckpt")
    with pytest.raises(DeltatokError, match="refused"):
        import_official(tmp_path / "a.ckpt", tmp_path / "out")
    (tmp_path / "b.ckpt").write_bytes(pickle.dumps(Trap(trap), protocol=2))
    with pytest.raises(DeltatokError, match=r"b\.ckpt"):
        import_official(tmp_path / "b.ckpt", tmp_path / "out")
    assert not trap.exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut off"])
def test_other_files_are_refused(content, tmp_path):
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(DeltatokError, match=r"a\.bin"):
        read_official(tmp_path / "a.bin")


@pytest.mark.parametrize("value", [[1, 2], {"state_dict": [1]}, {"a": "text"}])
def test_values_that_are_no_tensors_are_refused(value, tmp_path):
    torch.save(value, tmp_path / "a.bin")
    with pytest.raises(DeltatokError, match="wanted a dict of tensors"):
        read_official(tmp_path / "a.bin")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"a\.bin: no such file"):
        read_official(tmp_path / "a.bin")


def test_unknown_tensors_are_no_model(tmp_path):
    torch.save({"network.z_embed.weight": torch.zeros(1, 2)}, tmp_path / "a.bin")
    with pytest.raises(DeltatokError, match="must have no prefix"):
        import_official(tmp_path / "a.bin", tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_name": "Unet"}, "wanted one of"),
        ({"class_name": "DepthHead"}, "this is no DepthHead"),
        ({"overrides": {"depth": 3}}, "unknown key 'depth'"),
    ],
)
def test_wrong_requests_are_refused(state, arguments, message, tmp_path):
    torch.save(state, tmp_path / "a.bin")
    with pytest.raises(DeltatokError, match=message):
        import_official(tmp_path / "a.bin", tmp_path / "out", **arguments)


def test_rgb_head_wants_the_constants_of_its_backbone(tmp_path):
    torch.save(MODELS["rgb"][0]().state_dict(), tmp_path / "a.bin")
    with pytest.raises(UsageError, match=r"feature_bias.*rgb_constants"):
        import_official(tmp_path / "a.bin", tmp_path / "out")


def test_rgb_constants_are_read_from_a_backbone_folder(tmp_path):
    save_file(
        {"norm.weight": torch.tensor([1.0, 2.0]), "norm.bias": torch.zeros(2)},
        tmp_path / "model.safetensors",
    )
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_mean": [0.5, 0.5, 0.5], "image_std": [1, 1, 1]}'
    )
    constants = rgb_constants(tmp_path)
    assert constants["feature_weight"] == (1.0, 2.0)
    assert constants["image_mean"] == (0.5, 0.5, 0.5)


def test_export_of_another_class_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"class": "Unet"}')
    with pytest.raises(UsageError, match="holds a Unet"):
        export_official(tmp_path, tmp_path / "a.bin")
