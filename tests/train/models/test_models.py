"""Tokenizer, rotary positions and heads: what they promise beyond the golden numbers."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from deltatok.shards.errors import UsageError
from deltatok.train.models.blocks import LayerScale
from deltatok.train.models.configs import DeltaTokConfig
from deltatok.train.models.deltatok import DeltaTok, draw_rope_rescale
from deltatok.train.models.heads import (
    DepthHead,
    DepthHeadConfig,
    SegmentationHead,
    SegmentationHeadConfig,
    feature_map,
)
from deltatok.train.models.rgb_head import RGBHead, RGBHeadConfig
from deltatok.train.models.rope import Rope, axis_rope, patch_rope, rotate, rotate_axes, with_prefix

GRID = (2, 3)
TOKENIZER = DeltaTokConfig(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=48,
    layer_scale_init=0.5,
    initializer_range=0.2,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


@pytest.fixture
def tokenizer() -> DeltaTok:
    return DeltaTok(TOKENIZER, generator=generator())


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


def test_start_is_what_the_decoder_alone_begins_from(tokenizer):
    x_prev, x_cur, start = (normal(2, 6, 32, seed=seed) for seed in (1, 3, 4))
    wanted = tokenizer.decode(tokenizer.encode(x_prev, x_cur, grid=GRID), start, grid=GRID)
    assert torch.equal(tokenizer(x_prev, x_cur, grid=GRID, start=start), wanted)


def test_some_patches_are_read_and_given_and_the_others_are_not_seen(tokenizer):
    patches, others = torch.tensor([1, 2, 5]), torch.tensor([0, 3, 4])
    x_prev, x_cur = normal(2, 6, 32), normal(2, 6, 32, seed=3)
    rope = patch_rope(GRID, head_dim=16, theta=100.0)
    rope = with_prefix(Rope(rope.cos[patches], rope.sin[patches]), num_frames=2)
    tokens = torch.cat(
        [
            tokenizer.z_embed.weight.expand(2, -1, -1),
            x_prev[:, patches] + tokenizer.xy_embed.weight[0],
            x_cur[:, patches] + tokenizer.xy_embed.weight[1],
        ],
        dim=1,
    )
    for block in tokenizer.encoder_blocks:
        tokens = block(tokens, rope)
    z = tokenizer.encode(x_prev, x_cur, grid=GRID, patches=patches)
    torch.testing.assert_close(z, tokenizer.norm(tokens)[:, 0])
    decoded = tokenizer.decode(z, x_prev, grid=GRID, patches=patches)
    assert decoded.shape == (2, 3, 32)
    assert not torch.allclose(decoded, tokenizer.decode(z, x_prev, grid=GRID)[:, patches])
    x_prev[:, others] += 1
    x_cur[:, others] += 1
    assert torch.equal(tokenizer.encode(x_prev, x_cur, grid=GRID, patches=patches), z)
    assert torch.equal(tokenizer.decode(z, x_prev, grid=GRID, patches=patches), decoded)


def test_all_patches_by_their_numbers_are_all_patches(tokenizer):
    x_prev, x_cur, every = normal(2, 6, 32), normal(2, 6, 32, seed=3), torch.arange(6)
    whole = tokenizer(x_prev, x_cur, grid=GRID)
    named = tokenizer(x_prev, x_cur, grid=GRID, encoder_patches=every, decoder_patches=every)
    assert torch.equal(named, whole)


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


def test_bfloat16_autocast_stays_near_float32(tokenizer):
    x = normal(2, 6, 32)
    with torch.no_grad():
        exact = tokenizer(x, x + 1, grid=GRID)
        with torch.autocast("cpu", torch.bfloat16):
            rough = tokenizer(x, x + 1, grid=GRID)
    assert (rough.float() - exact).abs().max() < 0.05 * exact.abs().max()
