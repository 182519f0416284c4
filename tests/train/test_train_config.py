"""Config values that cannot work are refused when the config is made."""

from typing import Any

import pytest

from deltatok.shards import UsageError
from deltatok.train.config import (
    HeadTrainConfig,
    TokenizeConfig,
    TokenizerTrainConfig,
    WorldTrainConfig,
)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("steps", 0, "steps 0: wanted at least 1"),
        ("batch_size", -1, "batch_size -1: wanted at least 1"),
        ("micro_batch_size", 0, "micro_batch_size 0: wanted at least 1"),
        ("lr", 0.0, "lr 0.0: wanted a finite number above 0"),
        ("lr", float("nan"), "lr nan: wanted a finite number above 0"),
        ("clip_grad_norm", 0.0, "clip_grad_norm 0.0: wanted a finite number above 0"),
        ("weight_decay", -0.1, "weight_decay -0.1: wanted at least 0"),
        ("warmup_steps", -1, "warmup_steps -1: wanted at least 0"),
        ("precision", "float16", "precision 'float16': wanted one of auto, float32, bfloat16"),
        ("loss", "l1", "loss 'l1': wanted one of log_cosh, mse"),
        ("residency", "disk", "residency 'disk': wanted one of auto, device, memory, map"),
        ("device", "tpu", "device 'tpu': wanted one of auto, cpu, cuda, mps"),
        ("validation_fraction", 1.0, "validation_fraction 1.0: wanted 0"),
        ("wide_pair_fraction", 1.5, "wide_pair_fraction 1.5: wanted a share between 0 and 1"),
        ("stuck_threshold", -1.0, "stuck_threshold -1.0: wanted a finite number above 0"),
        ("closed_loop_steps", 0, "closed_loop_steps 0: wanted at least 1"),
        ("closed_loop_steps", 3, "batch_size 1024: wanted a multiple of closed_loop_steps, 3"),
        ("closed_loop", "encoder", "closed_loop 'encoder': wanted one of both, decoder"),
        ("encoder_patch_fraction", 0.0, "encoder_patch_fraction 0.0: wanted above 0, at most 1"),
        ("decoder_patch_fraction", 1.5, "decoder_patch_fraction 1.5: wanted above 0, at most 1"),
        ("whole_frames_from", 5, "whole_frames_from 5: wanted encoder_patch_fraction or decoder_"),
        ("closed_loop_gradient", "on", "closed_loop_gradient 'on': wanted one of through, stopped"),
    ],
)
def test_tokenizer_config_refuses(field: str, value: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        TokenizerTrainConfig(patches="p", out="o", **{field: value})


def test_wide_pairs_in_a_closed_loop_are_refused() -> None:
    with pytest.raises(UsageError, match=r"closed_loop_steps 2 with wide_pair_fraction 0\.5"):
        TokenizerTrainConfig(patches="p", out="o", closed_loop_steps=2, wide_pair_fraction=0.5)


def test_chains_of_partly_decoded_frames_are_refused() -> None:
    with pytest.raises(UsageError, match=r"closed_loop_steps 2 with decoder_patch_fraction 0\.5"):
        TokenizerTrainConfig(patches="p", out="o", closed_loop_steps=2, decoder_patch_fraction=0.5)


def test_world_config_refuses_no_memory_for_selection() -> None:
    with pytest.raises(UsageError, match="selection_memory_mb 0"):
        WorldTrainConfig(deltas="d", out="o", selection_memory_mb=0)


@pytest.mark.parametrize("num_classes", [1, 256])
def test_head_config_refuses_class_counts_that_labels_cannot_have(num_classes: int) -> None:
    with pytest.raises(UsageError, match=f"num_classes {num_classes}: wanted 2 to 255"):
        HeadTrainConfig(patches="p", labels="l", out="o", num_classes=num_classes)


def test_tokenize_config_refuses_empty_batches() -> None:
    with pytest.raises(UsageError, match="batch_windows 0"):
        TokenizeConfig(patches="p", tokenizer="t", out="o", batch_windows=0)


def test_defaults_are_the_released_ones() -> None:
    tokenizer = TokenizerTrainConfig(patches="p", out="o")
    world = WorldTrainConfig(deltas="d", out="o")
    assert (tokenizer.lr, tokenizer.weight_decay, tokenizer.clip_grad_norm) == (1e-3, 1e-2, 1e-2)
    assert (world.lr, world.weight_decay, world.clip_grad_norm) == (1e-4, 0.4, None)
    assert tokenizer.batch_size == world.batch_size == 1024
    assert tokenizer.warmup_steps == world.warmup_steps == 5000
    assert (world.steps, world.model.num_samples_train, world.model.use_bom) == (300_000, 256, True)
