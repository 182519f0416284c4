"""The networks: what their parts promise beyond the golden numbers."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from deltatok.shards.errors import DeltatokError, UsageError
from deltatok.train.models.blocks import LayerScale
from deltatok.train.models.configs import DeltaTokConfig, DeltaWorldConfig, DINOWorldConfig
from deltatok.train.models.deltatok import DeltaTok, draw_rope_rescale
from deltatok.train.models.deltaworld import DeltaWorldNetwork
from deltatok.train.models.dinoworld import DINOWorld
from deltatok.train.models.heads import (
    DepthHead,
    DepthHeadConfig,
    SegmentationHead,
    SegmentationHeadConfig,
    feature_map,
)
from deltatok.train.models.rgb_head import RGBHead, RGBHeadConfig
from deltatok.train.models.rope import axis_rope, patch_rope, rotate, rotate_axes, with_prefix

GRID = (2, 3)
TOKENIZER = DeltaTokConfig(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=48,
    layer_scale_init=0.5,
    initializer_range=0.2,
)
WORLD = DeltaWorldConfig(
    hidden_size=24,
    predictor_hidden_size=32,
    predictor_num_hidden_layers=2,
    predictor_num_heads=2,
    rope_axis_sizes=(12,),
    layer_scale_init=0.5,
    initializer_range=0.2,
)

DINO = DINOWorldConfig(
    hidden_size=24,
    predictor_hidden_size=32,
    predictor_num_hidden_layers=2,
    predictor_num_heads=2,
    rope_axis_sizes=(4, 4, 4),
    layer_scale_init=0.5,
    initializer_range=0.2,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def times(batch: int, frames: int) -> Tensor:
    return torch.rand(batch, frames, generator=generator(2)).cumsum(1)


@pytest.fixture
def tokenizer() -> DeltaTok:
    return DeltaTok(TOKENIZER, generator=generator())


@pytest.fixture
def world() -> DeltaWorldNetwork:
    return DeltaWorldNetwork(WORLD, generator=generator())


@pytest.fixture
def dino_world() -> DINOWorld:
    return DINOWorld(replace(DINO, use_bom=True), generator=generator())


# --- tokenizer ---


def test_encode_equals_all_blocks_on_all_tokens(tokenizer):
    x_prev, x_cur = normal(2, 6, 32), normal(2, 6, 32, seed=3)
    rope = patch_rope(GRID, head_dim=16, theta=100.0)
    tokens = torch.cat(
        [
            tokenizer.z_embed.weight.expand(2, -1, -1),
            x_prev + tokenizer.xy_embed.weight[0],
            x_cur + tokenizer.xy_embed.weight[1],
        ],
        dim=1,
    )
    for block in tokenizer.encoder_blocks:
        tokens = block(tokens, with_prefix(rope, num_frames=2))
    wanted = tokenizer.norm(tokens)[:, 0]
    torch.testing.assert_close(tokenizer.encode(x_prev, x_cur, grid=GRID), wanted)


def test_decoder_starts_as_copy_of_the_previous_frame():
    fresh = DeltaTok(
        replace(TOKENIZER, layer_scale_init=1e-5, initializer_range=0.02), generator=generator()
    )
    x = normal(2, 6, 32)
    torch.testing.assert_close(fresh.decode(normal(2, 32), x, grid=GRID), x, atol=1e-5, rtol=0)


def test_frame_variant_ignores_the_previous_frame():
    frame = DeltaTok(replace(TOKENIZER, use_delta=False), generator=generator())
    one, other = normal(2, 6, 32), normal(2, 6, 32, seed=3)
    z = frame.encode(one, one, grid=GRID)
    assert torch.equal(z, frame.encode(other, one, grid=GRID))
    assert torch.equal(frame.decode(z, one, grid=GRID), frame.decode(z, other, grid=GRID))


def test_sequence_is_encoded_open_loop_from_true_pairs(tokenizer):
    x, black = normal(2, 3, 6, 32), normal(6, 32, seed=3)
    z = tokenizer.encode_sequence(x, black, grid=GRID)
    first = tokenizer.encode(black.expand(2, -1, -1), x[:, 0], grid=GRID)
    last = tokenizer.encode(x[:, 1], x[:, 2], grid=GRID)
    torch.testing.assert_close(z[:, 0], first)
    torch.testing.assert_close(z[:, 2], last)


def test_reconstruction_is_closed_loop(tokenizer):
    x, start = normal(2, 2, 6, 32), normal(2, 6, 32, seed=3)
    got = tokenizer.reconstruct(x, start, grid=GRID)
    first = tokenizer(start, x[:, 0], grid=GRID)
    torch.testing.assert_close(got[:, 0], first)
    torch.testing.assert_close(got[:, 1], tokenizer(first, x[:, 1], grid=GRID))


def test_rescale_changes_positions_only_when_given(tokenizer):
    x = normal(1, 6, 32)
    plain = tokenizer(x, x, grid=GRID)
    assert torch.equal(tokenizer(x, x, grid=GRID, rescale=1.0), plain)
    assert not torch.allclose(tokenizer(x, x, grid=GRID, rescale=1.5), plain)


def test_drawn_rescale_is_in_range_and_reproducible():
    drawn = [draw_rope_rescale(TOKENIZER, generator(seed)) for seed in range(50)]
    assert all(0.5 <= float(value) <= 2.0 for value in drawn)
    assert torch.equal(drawn[7], draw_rope_rescale(TOKENIZER, generator(7)))


def test_no_rescale_is_drawn_without_augmentation():
    assert draw_rope_rescale(replace(TOKENIZER, use_rope_aug=False), generator()) is None


def test_training_gives_every_parameter_a_gradient(tokenizer):
    x = normal(2, 6, 32)
    tokenizer(x, x + 1, grid=GRID).square().mean().backward()
    assert all(value.grad is not None for value in tokenizer.parameters())


# --- rotary positions ---


def test_rotation_keeps_lengths():
    x = normal(1, 2, 6, 16)
    turned = rotate(x, patch_rope(GRID, head_dim=16, theta=100.0))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


def test_prefix_row_leaves_a_token_exactly_as_it_is():
    rope = with_prefix(patch_rope(GRID, head_dim=16, theta=100.0), num_frames=2)
    x = normal(1, 2, 13, 16)
    assert torch.equal(rotate(x, rope)[:, :, 0], x[:, :, 0])


def test_channels_after_the_last_axis_are_not_rotated():
    x, positions = normal(1, 2, 5, 16), normal(1, 5, 1)
    turned = rotate_axes(x, axis_rope(positions, (12,)))
    assert torch.equal(turned[..., 12:], x[..., 12:])
    assert not torch.allclose(turned[..., :12], x[..., :12])


# --- heads ---


def test_feature_map_is_row_major():
    tokens = torch.arange(6.0)[:, None]
    assert feature_map(tokens, grid=GRID).tolist() == [[[0, 1, 2], [3, 4, 5]]]


def test_depth_stays_between_the_first_and_last_bin():
    head = DepthHead(DepthHeadConfig(in_size=8, num_bins=16), generator=generator()).eval()
    depth = head(100 * normal(2, 8, 3, 4))
    assert depth.shape == (2, 1, 3, 4)
    assert depth.min() >= 1e-3
    assert depth.max() <= 80


def test_segmentation_gives_a_logit_for_every_class():
    head = SegmentationHead(SegmentationHeadConfig(in_size=8, num_classes=5)).eval()
    assert head(normal(2, 8, 3, 4)).shape == (2, 5, 3, 4)


def test_rgb_head_draws_patches_side_by_side():
    config = RGBHeadConfig(
        in_size=8,
        hidden_size=16,
        depth=1,
        num_heads=2,
        mlp_size=16,
        patch=4,
        img_size=8,
        feature_weight=(1.0,) * 8,
        feature_bias=(0.0,) * 8,
    )
    head = RGBHead(config, generator=generator()).eval()
    assert head(normal(1, 8, 3, 5)).shape == (1, 3, 12, 20)
    assert not head.decoder_pos_embed.requires_grad


# --- all ---


def test_fresh_weights_follow_the_paper():
    model = DeltaTok(DeltaTokConfig(num_hidden_layers=1), generator=generator())
    for part in model.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            assert part.weight.detach().std().item() == pytest.approx(0.02, rel=0.15)
        if isinstance(part, nn.LayerNorm):
            assert torch.all(part.weight == 1)
        if isinstance(part, LayerScale):
            assert torch.all(part.lambda1 == 1e-5)
        if isinstance(part, nn.Linear | nn.LayerNorm) and part.bias is not None:
            assert torch.all(part.bias == 0)


def test_fresh_weights_come_from_the_generator():
    one, same, other = (DeltaWorldNetwork(WORLD, generator=generator(seed)) for seed in (1, 1, 2))
    assert all(map(torch.equal, one.state_dict().values(), same.state_dict().values()))
    assert not torch.equal(one.predictor.head.weight, other.predictor.head.weight)


@pytest.mark.parametrize(
    "values",
    [
        {"hidden_size": 30},
        {"num_attention_heads": 0},
        {"pos_embed_rescale": 0.5},
    ],
)
def test_tokenizer_config_refuses_impossible_sizes(values):
    with pytest.raises(UsageError):
        replace(TOKENIZER, **values)


def test_bfloat16_autocast_stays_near_float32(tokenizer, world):
    x, z = normal(2, 6, 32), normal(2, 4, 24)
    queries = normal(2, 3, 32, seed=3)
    with torch.no_grad():
        exact = tokenizer(x, x + 1, grid=GRID), world(z, times(2, 4), queries)
        with torch.autocast("cpu", torch.bfloat16):
            rough = tokenizer(x, x + 1, grid=GRID), world(z, times(2, 4), queries)
    for got, wanted in zip(rough, exact, strict=True):
        assert (got.float() - wanted).abs().max() < 0.05 * wanted.abs().max()


# --- world models ---


def test_prediction_sees_only_strictly_earlier_tokens(world):
    z, queries = normal(1, 4, 24), normal(1, 3, 32, seed=3)
    changed = z.clone()
    changed[:, 2:] += 1
    before = world(z, times(1, 4), queries)
    after = world(changed, times(1, 4), queries)
    torch.testing.assert_close(after[:, :2], before[:, :2])
    assert not torch.allclose(after[:, 2], before[:, 2])


def test_candidates_do_not_see_each_other(world):
    z, at, queries = normal(1, 4, 24), times(1, 4), normal(1, 3, 5, 32, seed=3)
    memory = world.memory(z, at)
    together = world.candidates(memory, at, queries)
    alone = world.candidates(memory, at, queries[:, :, 2:3])
    torch.testing.assert_close(together[:, :, 2:3], alone)


def test_only_time_differences_matter(world):
    z, queries = normal(1, 4, 24), normal(1, 3, 32, seed=3)
    shifted = world(z, times(1, 4) + 0.5, queries)
    torch.testing.assert_close(shifted, world(z, times(1, 4), queries), atol=1e-4, rtol=1e-4)


def test_rollout_equals_predicting_again_from_all_tokens(world):
    z, at, noise = normal(2, 3, 24), times(2, 5), normal(2, 2, 4, 1, 32, seed=3)
    got = world.rollout(z, at, horizon=2, num_samples=4, noise=noise)
    assert got.shape == (2, 4, 2, 24)
    for sample in range(4):
        tokens = z
        for step in range(2):
            time = at[:, 3 + step : 4 + step]
            new = world.predict(noise[step, :, sample], time, tokens, at[:, : 3 + step])
            torch.testing.assert_close(got[:, sample, step], new[:, 0])
            tokens = torch.cat([tokens, new], dim=1)


def test_rollout_is_reproducible_from_a_generator(world):
    z, at = normal(1, 2, 24), times(1, 4)
    drawn = [
        world.rollout(z, at, horizon=2, num_samples=3, generator=generator(5)) for _ in range(2)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.allclose(drawn[0][:, 0], drawn[0][:, 1])


def test_discriminative_rollout_has_one_sample():
    world = DeltaWorldNetwork(replace(WORLD, use_bom=False), generator=generator())
    got = world.rollout(normal(1, 2, 24), times(1, 3), horizon=1, num_samples=20)
    assert got.shape == (1, 1, 1, 24)


def test_rollout_without_noise_or_generator_is_refused(world):
    with pytest.raises(DeltatokError, match="needs noise or a generator"):
        world.rollout(normal(1, 2, 24), times(1, 3), horizon=1, num_samples=3)


def test_dino_prediction_sees_only_strictly_earlier_frames(dino_world):
    x, queries = normal(1, 3, 6, 24), normal(1, 2, 32, seed=3)
    changed = x.clone()
    changed[:, 1] += 1
    before = dino_world(x, times(1, 3), queries, grid=GRID)
    after = dino_world(changed, times(1, 3), queries, grid=GRID)
    torch.testing.assert_close(after[:, 0], before[:, 0])
    assert not torch.allclose(after[:, 1], before[:, 1])


def test_dino_rollout_steps_equal_teacher_forcing_on_its_own_frames(dino_world):
    x, at, noise = normal(1, 2, 6, 24), times(1, 4), normal(2, 1, 3, 1, 32, seed=3)
    got = dino_world.rollout(x, at, grid=GRID, horizon=2, num_samples=3, noise=noise)
    assert got.shape == (1, 3, 2, 6, 24)
    frames = torch.cat([x, got[:, 1]], dim=1)  # its last frame is a target only
    queries = torch.cat([normal(1, 1, 32), noise[:, :, 1, 0].transpose(0, 1)], dim=1)
    torch.testing.assert_close(dino_world(frames, at, queries, grid=GRID)[:, 1:], got[:, 1])


@pytest.mark.parametrize(
    "values",
    [
        {"predictor_num_heads": 3},
        {"rope_axis_sizes": (13,)},
        {"rope_axis_sizes": (8,)},
        {"rope_axis_sizes": (6, 6)},
        {"num_samples_train": 0},
    ],
)
def test_world_config_refuses_impossible_sizes(values):
    with pytest.raises(UsageError):
        replace(WORLD, **values)
