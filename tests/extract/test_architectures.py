"""Every known model type gives its patch tokens: the right ones, in order, at any frame size.

The models are small and random, of the real config classes, saved and loaded as a user's are.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

from deltatok.extract.architectures import ARCHITECTURES
from deltatok.extract.backbone import Backbone
from deltatok.shards.errors import UsageError

SIZE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 24,
}
MLP = {"intermediate_size": 48}
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "vocab_size": 32,
    "num_attention_heads": 2,
    "max_position_embeddings": 8,
}
MIXING = re.compile(
    r"(self_attn\.out_proj|attention\.output\.dense|attention\.o_proj|depthwise_conv)\.(weight|bias)"
)
"""What takes a patch's numbers to the others: without it a token knows its own patch alone."""


@dataclass(frozen=True)
class Case:
    """A model type as transformers makes it, with the numbers that it should be known by."""

    make: Callable[[], nn.Module]
    num_before: int
    patch: int = 8


def _both_towers(kind: str) -> nn.Module:
    config = getattr(transformers, f"{kind}Config")
    settings = {"text_config": TEXT, "vision_config": SIZE | MLP | {"patch_size": 8}}
    model: nn.Module = getattr(transformers, f"{kind}Model")(config(**settings))
    return model


def _vision(kind: str, **more: object) -> nn.Module:
    config = getattr(transformers, f"{kind}Config")(**{**SIZE, "patch_size": 8, **more})
    model: nn.Module = getattr(transformers, f"{kind}Model")(config)
    return model


CASES = {
    "dinov3_vit": Case(lambda: _vision("DINOv3ViT", num_register_tokens=4, **MLP), 5),
    "dinov3_convnext": Case(
        lambda: transformers.DINOv3ConvNextModel(
            transformers.DINOv3ConvNextConfig(
                hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1], layer_scale_init_value=0.5
            )
        ),
        1,
        32,
    ),
    "dinov2": Case(lambda: _vision("Dinov2", mlp_ratio=2), 1),
    "dinov2_with_registers": Case(
        lambda: _vision("Dinov2WithRegisters", mlp_ratio=2, num_register_tokens=4), 5
    ),
    "clip": Case(lambda: _vision("CLIPVision", **MLP), 1),
    "siglip": Case(lambda: _vision("SiglipVision", **MLP), 0),
    "siglip2": Case(lambda: _siglip2(), 0),
}


def _siglip2() -> nn.Module:
    settings = {key: value for key, value in SIZE.items() if key != "image_size"}
    config = transformers.Siglip2VisionConfig(**settings, **MLP, patch_size=8, num_patches=9)
    return transformers.Siglip2VisionModel(config)


def save(model: nn.Module, folder: Path) -> str:
    """The model with larger weights than a fresh one's, and its preprocessor, as a model folder."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
    model.save_pretrained(folder)  # type: ignore[operator]
    settings = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return str(folder)


def frames(height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8, generator=generator)


def test_every_known_type_has_a_case() -> None:
    assert CASES.keys() == ARCHITECTURES.keys()


@pytest.mark.parametrize("kind", CASES)
def test_tokens_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    case = CASES[kind]
    model = case.make().eval()
    backbone = Backbone.load(save(model, tmp_path))
    side = 3 * case.patch
    assert (backbone.patch_size, backbone.hidden_size) == (case.patch, 32)
    assert backbone.grid(side) == (3, 3)
    pixels = frames(side, side)
    mean, std = (torch.tensor(v)[:, None, None] for v in ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4]))
    normalised = (pixels.float() * (1 / 255) - mean) / std
    with torch.no_grad():
        if kind == "siglip2":
            patches = [convert_image_to_patches(frame.numpy(), 8) for frame in normalised]
            wanted = model(
                pixel_values=torch.tensor(np.stack(patches)),
                pixel_attention_mask=torch.ones(2, 9, dtype=torch.int64),
                spatial_shapes=torch.tensor([[3, 3], [3, 3]]),
            ).last_hidden_state
        else:
            wanted = model(pixel_values=normalised).last_hidden_state
        if kind == "clip":  # transformers norms its class token alone
            wanted = model.post_layernorm(wanted)
    found = backbone.tokens(pixels)
    assert found.shape == (2, 9, 32)
    torch.testing.assert_close(found, wanted[:, case.num_before :], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", CASES)
def test_a_token_is_its_own_patch_row_by_row(kind: str, tmp_path: Path) -> None:
    """In a model without what mixes patches, also at a frame size that is not its own."""
    case = CASES[kind]
    backbone = Backbone.load(save(case.make(), tmp_path))
    silenced = 0
    for name, value in backbone.model.named_parameters():
        if MIXING.search(name):
            value.zero_()
            silenced += 1
    assert silenced
    rows, columns = 2, 5
    seen = frames(rows * case.patch, columns * case.patch)
    before = backbone.tokens(seen)
    assert before.shape == (2, rows * columns, 32)
    top, left = 1 * case.patch, 3 * case.patch
    seen[:, :, top : top + case.patch, left : left + case.patch] ^= 255
    changed = (backbone.tokens(seen) - before).abs().amax(dim=(0, 2)) > 1e-4
    assert changed.nonzero().flatten().tolist() == [1 * columns + 3]


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_of_two_towers_the_vision_tower_is_loaded(kind: str, tmp_path: Path) -> None:
    both = _both_towers(kind)
    loaded = Backbone.load(save(both, tmp_path / "both"))
    tower = both.vision_model
    tower.save_pretrained(tmp_path / "tower")  # type: ignore[operator]
    (tmp_path / "tower" / "preprocessor_config.json").write_text(
        (tmp_path / "both" / "preprocessor_config.json").read_text()
    )
    alone = Backbone.load(str(tmp_path / "tower"))
    assert torch.equal(loaded.tokens(frames(24, 24)), alone.tokens(frames(24, 24)))
    assert loaded.identity() == alone.identity()
    assert not any("text" in name for name, _ in loaded.model.named_parameters())


@pytest.mark.parametrize("kind", [kind for kind in CASES if kind != "dinov3_convnext"])
def test_layers_are_normed_and_put_side_by_side(kind: str, tmp_path: Path) -> None:
    folder = save(CASES[kind].make(), tmp_path)
    plain, wide = Backbone.load(folder), Backbone.load(folder, layers=(1, 3))
    first, last = Backbone.load(folder, layers=(1,)), Backbone.load(folder, layers=(3,))
    pixels = frames(24, 40)
    assert wide.hidden_size == 64
    found = wide.tokens(pixels)
    assert torch.equal(found, torch.cat([first.tokens(pixels), last.tokens(pixels)], dim=-1))
    assert torch.equal(last.tokens(pixels), plain.tokens(pixels))
    # The final norm: no mean is left over, whatever its weight and bias are.
    norm = hidden_norm(first.model)
    centred = (first.tokens(pixels) - norm.bias) / norm.weight
    torch.testing.assert_close(centred.mean(-1), torch.zeros(2, 15), atol=1e-4, rtol=0)


def hidden_norm(model: nn.Module) -> nn.LayerNorm:
    names = ("norm", "layernorm", "post_layernorm")
    (found,) = [module for name, module in model.named_children() if name in names]
    assert isinstance(found, nn.LayerNorm)
    return found


def test_layers_are_part_of_the_identity_only_where_they_are_chosen(tmp_path: Path) -> None:
    folder = save(CASES["dinov2"].make(), tmp_path)
    plain = Backbone.load(folder).identity()
    assert Backbone.load(folder, layers=(1, 3)).identity() == plain | {"layers": [1, 3]}
    assert "layers" not in plain


@pytest.mark.parametrize("layers", [(4,), (1, 9), (0,)])
def test_layers_that_a_backbone_does_not_have_are_refused(
    layers: tuple[int, ...], tmp_path: Path
) -> None:
    folder = save(CASES["dinov2"].make(), tmp_path)
    with pytest.raises(UsageError, match=r"layers: got .* has blocks 1 to 3"):
        Backbone.load(folder, layers=layers)


def test_layers_of_several_grids_are_refused(tmp_path: Path) -> None:
    folder = save(CASES["dinov3_convnext"].make(), tmp_path)
    with pytest.raises(UsageError, match="grids of several sizes"):
        Backbone.load(folder, layers=(1,))


def test_an_unknown_type_is_refused_with_those_there_are(tmp_path: Path) -> None:
    config = transformers.ResNetConfig(hidden_sizes=[8, 8], depths=[1, 1])
    folder = save(transformers.ResNetModel(config), tmp_path)
    with pytest.raises(UsageError, match=r"'resnet', wanted .*dinov3_vit, .*siglip2"):
        Backbone.load(folder)
