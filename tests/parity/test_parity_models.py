"""Every model case of the golden folders is reproduced: outputs, losses, gradients, rollouts."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from unittest import mock

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from deltatok.evaluate.forecast.rollout import (
    best_sample,
    decode_rollout,
    mean_sample,
    sample_losses,
    step_losses,
)
from deltatok.extract.backbone import Backbone
from deltatok.train.losses import log_cosh, mse, smooth_l1
from deltatok.train.models.deltatok import draw_rope_rescale
from deltatok.train.models.deltaworld import DeltaWorldNetwork
from deltatok.train.models.heads import feature_map
from deltatok.train.models.rgb_head import RGBHead, sine_cosine_table
from deltatok.train.models.rope import patch_rope
from deltatok.train.official import rgb_constants
from deltatok.train.selection import search as best_of_many
from deltatok.train.selection.noise import GivenNoise
from deltatok.train.selection.search import Chunks, select


def test_backbone_case(backbone_case, comparison):
    case, backbone = backbone_case, _backbone(backbone_case)
    got = {}
    for name in ("a", "b"):
        frames = case.inputs[f"frames_{name}"]
        flat = frames.flatten(0, 1)
        pixels = backbone.normalise(flat)
        with torch.no_grad():
            hidden = backbone.model(pixel_values=pixels).last_hidden_state
        grid = _grid(case, frames)
        rope = patch_rope(
            grid,
            head_dim=backbone.config.hidden_size // backbone.config.num_attention_heads,
            theta=backbone.config.rope_theta,
        )
        got |= {
            f"patch_tokens_{name}": _features(backbone, frames),
            f"black_tokens_{name}": _black(backbone, frames)[None, None],
            f"last_hidden_state_{name}": hidden,
            f"rope_cos_{name}": rope.cos,
            f"rope_sin_{name}": rope.sin,
        }
        if f"pixel_values_{name}" in case.outputs:
            got[f"pixel_values_{name}"] = pixels
    comparison.add_all(got, case.outputs, case.noise_floor)
    comparison.check()


def test_deltatok_case(deltatok_case, build_model, comparison):
    case = deltatok_case
    tokenizer = _loaded(case, build_model)
    backbone = _backbone(case)
    inputs, frames = case.inputs, case.inputs["frames"]
    grid, other_grid = _grid(case, frames), _grid(case, inputs["frames_ns"])
    features = _features(backbone, frames)
    other = _features(backbone, inputs["frames_ns"])
    x_prev, x_black, y_seq = inputs["x_prev"], inputs["x_black"], inputs["y_seq"]
    got = {
        "feats": features,
        "black_feats": _black(backbone, frames).expand_as(x_black),
        "ns_feats": other,
    }
    with torch.no_grad():
        z = tokenizer.encode(x_prev, inputs["y"], grid=grid)
        z_seq = tokenizer.encode_sequence(y_seq, x_black[0], grid=grid)
        other_z = tokenizer.encode(other[:, 0], other[:, 1], grid=other_grid)
        got |= {
            "z": z[:, None],
            "z_seq": z_seq[:, :, None],
            "y_hat": tokenizer.decode(z, x_prev, grid=grid),
            "y_hat_cross": tokenizer.decode(z_seq[:, -1], x_black, grid=grid),
            "parallel_preds": decode_rollout(tokenizer, z_seq[:, None], x_black, grid=grid)[:, 0],
            "ns_z": other_z[:, None],
            "ns_y_hat": tokenizer.decode(other_z, other[:, 0], grid=other_grid),
        }
        got |= _tokenizer_closed_loops(case, tokenizer, grid)
    got |= _tokenizer_ropes(case, tokenizer.config, grid, other_grid)
    prediction = tokenizer(features[:, -2], features[:, -1], grid=grid)
    loss = log_cosh(prediction, features[:, -1]).mean()
    loss.backward()
    got |= {"train_y_hat": prediction.detach(), "train_loss": loss.detach()}
    got |= _gradients(case, tokenizer)
    comparison.add_all(got, case.outputs, case.noise_floor)
    comparison.check()


def test_world_case(world_case, build_model, comparison):
    case = world_case
    world, backbone = _loaded(case, build_model), _backbone(case)
    if isinstance(world, DeltaWorldNetwork):
        tokenizer = _loaded(case.sibling(case.config["tokenizer_case"]), build_model)
        got = _deltaworld_outputs(case, world, backbone, tokenizer)
    else:
        got = _dinoworld_outputs(case, world, backbone)
    comparison.add_all(got, case.outputs, case.noise_floor)
    comparison.check()


def test_losses_case(losses_case, comparison):
    case, got = losses_case, {}
    beta = case.config["loss_beta"]
    functions = {
        "mse": mse,
        "log_cosh": log_cosh,
        "smooth_l1": lambda prediction, target: smooth_l1(prediction, target, beta=beta),
    }
    for name, function in functions.items():
        prediction = case.inputs["pred"].clone().requires_grad_()
        loss = function(prediction, case.inputs["tgt"])
        loss.mean().backward()
        got |= {name: loss.detach(), f"{name}_mean": loss.detach().mean()}
        got[f"{name}_grad"] = prediction.grad
    comparison.add_all(got, case.outputs, case.noise_floor)
    comparison.check()


def test_head_case(head_case, build_model, comparison):
    case, got = head_case, {}
    constants = {}
    if case.config["class"] == "RGBHead":
        constants = rgb_constants(case.backbone_folder)
    head = _loaded(case, build_model, constants)
    patch_size = case.config["patch_size"]
    batch, frames, _, height, width = case.config["frame_shapes"]["feats"]
    grid = (height // patch_size, width // patch_size)
    with torch.no_grad():
        for name, features in case.inputs.items():
            if name == "feats":
                out = head(feature_map(features, grid=grid).flatten(0, 1))
                got["applied"] = out.unflatten(0, (batch, frames))
            else:
                got[name.replace("feat_map", "out")] = head(features)
    if isinstance(head, RGBHead):
        side = head.config.img_size // head.config.patch
        got["pos_embed_initial"] = sine_cosine_table(side, head.config.hidden_size)
    comparison.add_all(got, case.outputs, case.noise_floor)
    comparison.check()


def _loaded(case, build_model, constants=None):
    """The case's model with its golden weights, in eval mode."""
    model = build_model(case.config, case.backbone_config, constants or {})
    model.load_state_dict(case.state, strict=True)
    return model.eval().to(case.device)


def _tokenizer_ropes(case, config, grid, other_grid) -> dict[str, Tensor]:
    """The rotary tables of both resolutions and of the augmentation."""
    generator = torch.Generator().manual_seed(case.config["rope_aug_seed"])
    rescale = draw_rope_rescale(config, generator)
    got = {"ropeaug_rescale": rescale}
    for name, table_grid, scale in (
        ("rope", grid, None),
        ("ns_rope", other_grid, None),
        ("ropeaug", grid, rescale),
    ):
        tables = patch_rope(
            table_grid, head_dim=config.head_dim, theta=config.rope_theta, rescale=scale
        )
        got |= {f"{name}_cos": tables.cos, f"{name}_sin": tables.sin}
    return got


def _tokenizer_closed_loops(case, tokenizer, grid) -> dict[str, Tensor]:
    got = {}
    x, black = case.inputs["y_seq"], case.inputs["x_black"]
    num_frames = x.shape[1]
    for horizon in case.config["eval_horizons"]:
        first = num_frames - horizon
        start = black if first == 0 else x[:, first - 1]
        predictions = tokenizer.reconstruct(x[:, first:], start, grid=grid)
        got |= {
            f"eval_h{horizon}_preds": predictions,
            f"eval_h{horizon}_losses": log_cosh(predictions, x[:, first:]).mean(dim=(0, 2, 3)),
            f"eval_h{horizon}_tgts_index": torch.arange(first, num_frames),
        }
    return got


def _deltaworld_outputs(case, world, backbone, tokenizer) -> dict[str, Tensor]:
    inputs, times, grid = case.inputs, case.inputs["timestamps"], _grid(case, case.inputs["frames"])
    features = _features(backbone, inputs["frames"])
    black = _black(backbone, inputs["frames"])
    with torch.no_grad():
        z = tokenizer.encode_sequence(features, black, grid=grid)
    got = _predictor_outputs(case, world)
    got |= {"z_seq": z, "train_tgt": z[:, 1:]}
    queries = None
    if world.config.use_bom:
        noise = inputs["train_noise"]
        with collected() as losses:
            found = select(
                world,
                z,
                times,
                GivenNoise(noise),
                num_samples=noise.shape[2],
                chunks=Chunks(windows=len(z), samples=3),
            )
        queries = found.queries[:, :, 0]
        got |= _selection_outputs(found.indices[:, :, 0], torch.cat(losses, dim=2))
    got |= _training_outputs(case, world, world(z, times, queries), z[:, 1:])
    for rollout in case.config["rollouts"]:
        tag, context, horizon = rollout["tag"], rollout["ctx_len"], rollout["horizon"]
        frames = _features(backbone, inputs[f"{tag}_frames"])
        with torch.no_grad():
            z_context = tokenizer.encode_sequence(frames[:, :context], black, grid=grid)
            z_hat = world.rollout(
                z_context,
                inputs[f"{tag}_timestamps"],
                horizon=horizon,
                num_samples=world.config.num_samples_eval,
                noise=inputs.get(f"{tag}_noise"),
            )
        predictions = decode_rollout(tokenizer, z_hat, frames[:, context - 1], grid=grid)
        got |= {f"{tag}_z_ctx": z_context, f"{tag}_z_hat": z_hat}
        got |= _rollout_outputs(tag, predictions, frames[:, context:], world.config.use_bom)
    return got


def _dinoworld_outputs(case, world, backbone) -> dict[str, Tensor]:
    inputs, times, grid = case.inputs, case.inputs["timestamps"], _grid(case, case.inputs["frames"])
    x = _features(backbone, inputs["frames"])
    got = _predictor_outputs(case, world) | {"train_tgt": x[:, 1:]}
    queries = None
    if world.config.use_bom:
        noise = inputs["train_noise"]
        with collected() as losses:
            found = select(
                world,
                x,
                times,
                GivenNoise(noise),
                grid=grid,
                num_samples=noise.shape[2],
                chunks=Chunks(windows=len(x), samples=4),
            )
        queries = found.queries[:, :, 0]
        got |= _selection_outputs(found.indices[:, :, 0], torch.cat(losses, dim=2))
    got |= _training_outputs(case, world, world(x, times, queries, grid=grid), x[:, 1:])
    for rollout in case.config["rollouts"]:
        tag, context, horizon = rollout["tag"], rollout["ctx_len"], rollout["horizon"]
        frames = _features(backbone, inputs[f"{tag}_frames"])
        with torch.no_grad():
            predictions = world.rollout(
                frames[:, :context],
                inputs[f"{tag}_timestamps"],
                grid=grid,
                horizon=horizon,
                num_samples=world.config.num_samples_eval,
                noise=inputs.get(f"{tag}_noise"),
            )
        got |= _rollout_outputs(tag, predictions, frames[:, context:], world.config.use_bom)
    return got


def _predictor_outputs(case, world) -> dict[str, Tensor]:
    """The predictor alone, on given queries, keys and positions."""
    inputs = case.inputs
    axes = range(len(world.config.rope_axis_sizes))
    q_positions = torch.stack([inputs[f"pred_pos_q{axis}"] for axis in axes], dim=-1)
    k_positions = torch.stack([inputs[f"pred_pos_k{axis}"] for axis in axes], dim=-1)
    visible = inputs["pred_k_index"] < inputs["pred_q_index"][:, None]
    with torch.no_grad():
        memory = world.predictor.keys_values(inputs["pred_kv"], k_positions)
        return {
            "pred_mask_visible": visible,
            "pred_out_nomask": world.predictor(inputs["pred_q"], q_positions, memory),
            "pred_out_masked": world.predictor(
                inputs["pred_q"], q_positions, memory, visible=visible
            ),
        }


@contextmanager
def collected() -> Iterator[list[Tensor]]:
    """The losses (B, P, s) of all chunks that a selection of one portion goes through."""
    losses: list[Tensor] = []
    original = best_of_many.losses_in_chunks

    def losses_in_chunks(*arguments, **keywords) -> Iterator[Tensor]:
        for chunk in original(*arguments, **keywords):
            losses.append(chunk)
            yield chunk

    with mock.patch.object(best_of_many, "losses_in_chunks", losses_in_chunks):
        yield losses


def _selection_outputs(indices: Tensor, losses: Tensor) -> dict[str, Tensor]:
    lowest = losses.topk(2, dim=2, largest=False).values
    margin = (lowest[..., 1] - lowest[..., 0]) / lowest[..., 0]
    return {"bom_idx": indices, "bom_losses": losses, "bom_margin_rel": margin}


def _training_outputs(case, world, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
    loss = smooth_l1(prediction, target, beta=case.config["loss_beta"]).mean()
    loss.backward()
    got = {"train_pred": prediction.detach(), "train_loss": loss.detach()}
    return got | _gradients(case, world)


def _rollout_outputs(
    tag: str, predictions: Tensor, targets: Tensor, use_bom: bool
) -> dict[str, Tensor]:
    mean = mean_sample(predictions)
    got = {
        "preds": predictions,
        "tgts": targets,
        "mean": mean,
        "mean_step_losses": step_losses(mean, targets),
    }
    if use_bom:
        best, index = best_sample(predictions, targets)
        got |= {
            "sample_losses": sample_losses(predictions, targets),
            "best_idx": index,
            "best_step_losses": step_losses(best, targets),
        }
    return {f"{tag}_{name}": value for name, value in got.items()}


def _gradients(case, model) -> dict[str, Tensor]:
    """Full gradients of the case's chosen parameters, and the norm of every one."""
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    got = {f"train.gradnorm.{name}": value.norm() for name, value in gradients.items()}
    got |= {f"train.grad.{name}": gradients[name] for name in case.config["full_grads"]}
    return got | {"train.gradnorm_total": get_total_norm(gradients.values())}


def _backbone(case) -> Backbone:
    return _load_backbone(str(case.backbone_folder), case.device)


@cache
def _load_backbone(folder: str, device: str) -> Backbone:
    return Backbone.load(folder, device=device)


def _grid(case, frames: Tensor) -> tuple[int, int]:
    patch_size = case.backbone_config["patch_size"]
    return frames.shape[-2] // patch_size, frames.shape[-1] // patch_size


def _features(backbone: Backbone, frames: Tensor) -> Tensor:
    """uint8 (B, T, 3, H, W) -> (B, T, N, D), fit for autograd."""
    return backbone.tokens(frames.flatten(0, 1)).clone().unflatten(0, frames.shape[:2])


def _black(backbone: Backbone, frames: Tensor) -> Tensor:
    """(N, D) of a black frame of this shape."""
    return backbone.tokens(torch.zeros_like(frames[:1, 0]))[0].clone()
