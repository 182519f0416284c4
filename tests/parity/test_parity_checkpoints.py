"""Full-size names and shapes, parameter groups, counts and warm-up equal the released ones."""

import json

import pytest
import torch
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from deltatok.train.engine.loop import parameter_groups, warmup_factor
from deltatok.train.models.configs import DeltaTokConfig, DeltaWorldConfig, DINOWorldConfig
from deltatok.train.models.deltatok import DeltaTok
from deltatok.train.models.deltaworld import DeltaWorldNetwork
from deltatok.train.models.dinoworld import DINOWorld
from deltatok.train.official import CLASSES, guess_class, infer_config


def test_full_size_keys_file(full_size_keys_file, comparison):
    for name, wanted in json.loads(full_size_keys_file.read_text()).items():
        tensors = _meta_tensors(wanted["keys"])
        class_name = "DINOWorld" if name.startswith("dinoworld") else guess_class(tensors)
        model = _on_meta(class_name, infer_config(class_name, tensors, {}))
        assert _keys(model) == [key[:3] for key in wanted["keys"]], name
        assert sum(value.numel() for value in model.parameters()) == wanted["num_elements"]
        comparison.add(name, torch.tensor(len(_keys(model))), torch.tensor(wanted["num_tensors"]))
    comparison.check()


def test_full_size_head_keys_file(full_size_head_keys_file, comparison):
    for name, wanted in json.loads(full_size_head_keys_file.read_text()).items():
        tensors = _meta_tensors(wanted["keys"])
        overrides = {}
        if guess_class(tensors) == "RGBHead":
            size = tensors["decoder_embed.weight"].shape[1]
            overrides = {"feature_weight": (1.0,) * size, "feature_bias": (0.0,) * size}
        config = infer_config(guess_class(tensors), tensors, overrides)
        model = _on_meta(guess_class(tensors), config)
        assert _keys(model) == [key[:3] for key in wanted["keys"]], name
        num_elements = sum(value.numel() for value in model.state_dict().values())
        comparison.add(name, torch.tensor(num_elements), torch.tensor(wanted["num_elements"]))
    comparison.check()


def test_groups_full_size_file(groups_full_size_file, comparison):
    for name, wanted in json.loads(groups_full_size_file.read_text()).items():
        _compare_groups(comparison, name, _full_size(name), wanted)
    comparison.check()


def test_groups_of_the_cases_file(groups_of_the_cases_file, build_model, comparison):
    described = json.loads((groups_of_the_cases_file.parents[1] / "configs.json").read_text())
    for name, wanted in json.loads(groups_of_the_cases_file.read_text()).items():
        model = build_model(described["cases"][name], described["backbone"])
        _compare_groups(comparison, name, model, wanted)
    comparison.check()


def test_parameter_counts_file(parameter_counts_file, comparison):
    wanted = json.loads(parameter_counts_file.read_text())
    tokenizer, world = _full_size("deltatok_default"), _full_size("deltaworld_default")
    backbone = _count(_backbone())
    components = {
        "backbone(DINOv3 ViT-B/16, incl. mask token)": backbone,
        "deltatok.encoder_one_block": _count(tokenizer.encoder_blocks[0]),
        "deltatok.total_trainable": _count(tokenizer),
        "deltaworld.predictor.one_block": _count(world.predictor.blocks[0]),
        "deltaworld.predictor.norm": _count(world.predictor.norm),
        "deltaworld.predictor.head": _count(world.predictor.head),
        "deltaworld.predictor": _count(world),
        "deltatok_paper.total_trainable": _count(_full_size("deltatok_paper")),
        "deltaworld_disc.total_trainable": _count(_full_size("deltaworld_disc")),
        "dinoworld.total_trainable": _count(_full_size("dinoworld_default")),
    }
    for child, module in tokenizer.named_children():
        components[f"deltatok.{child}"] = _count(module)
    comparison.add_all(_numbers(components), _numbers(wanted["components"]), {})
    for name, counts in wanted["models"].items():
        model = _full_size(name)
        frozen = backbone + (_count(tokenizer) if isinstance(model, DeltaWorldNetwork) else 0)
        got = {
            "total_trainable": _count(model),
            "total_unique_including_frozen": _count(model) + frozen,
        }
        for child, module in model.named_children():
            got[f"child:{child}"] = {"trainable": _count(module), "all": _count(module)}
        # The released networks hold the frozen ones; ours do not. Rotary tables are no module here.
        got["child:backbone"] = {"trainable": 0, "all": backbone}
        if isinstance(model, DeltaWorldNetwork):
            got["child:tokenizer"] = {"trainable": 0, "all": frozen}
        if isinstance(model, DeltaTok):
            got["child:rope_embeddings"] = {"trainable": 0, "all": 0}
        assert got == counts, name
    comparison.check()


def test_lr_schedule_file(lr_schedule_file, comparison):
    schedule = json.loads(lr_schedule_file.read_text())
    for step, wanted in schedule["factor_at_global_step"].items():
        got = warmup_factor(int(step), warmup_steps=schedule["lr_warmup_steps"])
        assert got == pytest.approx(wanted, abs=1e-12)
        comparison.add(step, torch.tensor(got), torch.tensor(wanted))
    comparison.check()


FULL_SIZE = {
    "deltatok_default": lambda: DeltaTok(DeltaTokConfig()),
    "deltatok_paper": lambda: DeltaTok(
        DeltaTokConfig(use_qk_norm=False, use_gated_attn=False, use_swiglu=False)
    ),
    "deltatok_frame": lambda: DeltaTok(DeltaTokConfig(use_delta=False)),
    "deltaworld_default": lambda: DeltaWorldNetwork(DeltaWorldConfig()),
    "deltaworld_disc": lambda: DeltaWorldNetwork(DeltaWorldConfig(use_bom=False)),
    "dinoworld_default": lambda: DINOWorld(DINOWorldConfig()),
    "dinoworld_bom": lambda: DINOWorld(DINOWorldConfig(use_bom=True)),
}
"""By the golden name without its remark in brackets."""


def _full_size(name):
    with torch.device("meta"):
        return FULL_SIZE[name.split("(")[0]]()


def _on_meta(class_name, config):
    with torch.device("meta"):
        return CLASSES[class_name](config)


def _backbone():
    with torch.device("meta"):
        return DINOv3ViTModel(
            DINOv3ViTConfig(
                hidden_size=768,
                num_hidden_layers=12,
                num_attention_heads=12,
                intermediate_size=3072,
                num_register_tokens=4,
            )
        )


def _meta_tensors(keys):
    return {
        name: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        for name, shape, dtype, *_ in keys
    }


def _keys(model):
    return [
        [name, list(value.shape), str(value.dtype).removeprefix("torch.")]
        for name, value in model.state_dict().items()
    ]


def _compare_groups(comparison, name, model, wanted):
    groups = parameter_groups(model, wanted["weight_decay"][0])
    assert [sorted(group["names"]) for group in groups] == [
        sorted(wanted["decay"]),
        sorted(wanted["no_decay"]),
    ], name
    assert [group["weight_decay"] for group in groups] == wanted["weight_decay"], name
    numbers = [sum(value.numel() for value in group["params"]) for group in groups]
    comparison.add(
        name, torch.tensor(numbers), torch.tensor([wanted["decay_numel"], wanted["no_decay_numel"]])
    )


def _count(module):
    return sum(value.numel() for value in module.parameters())


def _numbers(counts):
    return {name: torch.tensor(value) for name, value in counts.items()}
