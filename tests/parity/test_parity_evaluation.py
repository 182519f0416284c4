"""The protocol's sizes, crops, labels, masks, metrics and frame choices equal the released ones."""

import hashlib
import json

import numpy as np
import torch
from safetensors.torch import load_file

from deltatok.evaluate.forecast.scores import class_counts, confusion_matrix, squared_errors
from deltatok.evaluate.forecast.sequences import values
from deltatok.extract.pixels import resize_bilinear
from deltatok.shards.evaluation.geometry import compute_resize_sizes, cut_of
from deltatok.shards.evaluation.labels import (
    cityscapes_table,
    depth_label,
    garg_mask,
    kb_crop,
    vspw_table,
)
from deltatok.shards.sampling import middle_frame_indices, sample_frame_indices
from deltatok.train.heads.crops import (
    cut_frames,
    cut_labels,
    upsample_predictions,
)


def test_crops_file(crops_file, comparison):
    cases = json.loads(crops_file.read_text())
    inputs = load_file(crops_file.with_name("crops_inputs.safetensors"))
    outputs = load_file(crops_file.with_name("crops_outputs.safetensors"))
    got = {}
    for case in cases["cases"]:
        name, whole = case["name"], {}
        for tensor_name, value in inputs.items():
            if tensor_name.startswith(f"{name}."):
                whole[tensor_name.removeprefix(f"{name}.")] = value
        cut = cut_of(*whole["frames"].shape[-2:])
        if isinstance(case["frame_size"], list):  # a fixed shape: nothing is cut
            cut = cut_of(1, 1)
        result = cases["results"][name]
        assert (cut.overlap, cut.wide) == (result["overlap"], result["is_wide"]), name
        got[f"{name}.frames"] = cut_frames(whole["frames"], cut)
        got[f"{name}.timestamps"] = torch.cat(
            [whole["timestamps"]] * (1 if cut.wide is None else 2)
        )
        got[f"{name}.sample_idx"] = torch.cat(
            [whole["sample_idx"]] * (1 if cut.wide is None else 2)
        )
        if "labels" in whole:
            labels = cut_labels(whole["labels"], cut)
            got[f"{name}.labels"] = labels
            got[f"{name}.upsampled"] = upsample_predictions(
                whole["task_preds"], cut, size=tuple(labels.shape[-2:])
            )
    comparison.add_all(got, outputs, {})
    comparison.check()


def test_resize_sizes_file(resize_sizes_file, comparison):
    for case in json.loads(resize_sizes_file.read_text())["compute_resize_sizes"]:
        size = case["frame_size"]
        got = compute_resize_sizes(
            case["h"],
            case["w"],
            tuple(size) if isinstance(size, list) else size,
            max_aspect_ratio=case["max_aspect_ratio"],
        )
        comparison.add(f"{case['h']}x{case['w']}", torch.tensor(got), torch.tensor(case["result"]))
    comparison.check()


def test_cv2_resize_file(cv2_resize_file, comparison):
    inputs = load_file(cv2_resize_file.with_name("cv2_resize_inputs.safetensors"))
    outputs = load_file(cv2_resize_file.with_name("cv2_resize_outputs.safetensors"))
    got = {}
    for case in json.loads(cv2_resize_file.read_text())["cases"]:
        image = inputs[case["name"]].permute(2, 0, 1)
        resized = resize_bilinear(image, (case["out_h"], case["out_w"]))
        got[case["name"]] = resized.permute(1, 2, 0)
    comparison.add_all(got, outputs, {})
    comparison.check()


def test_kitti_file(kitti_file, comparison):
    description = json.loads(kitti_file.read_text())
    results = dict(description["results"])
    inputs = load_file(kitti_file.with_name("kitti_inputs.safetensors"))
    outputs = load_file(kitti_file.with_name("kitti_outputs.safetensors"))
    masks = {}
    for case in description["garg_cases"]:
        mask = garg_mask(inputs[f"{case['name']}.depth"].numpy())
        masks[f"{case['name']}.mask"] = torch.from_numpy(mask)
    comparison.add_all(masks, outputs, {})
    for case in description["kb_cases"]:
        rows, columns = np.indices((case["h"], case["w"]), dtype=np.int32)
        image = kb_crop(rows * 4096 + columns)
        assert results.pop(case["name"]) == {
            "shape": list(image.shape),
            "first": int(image[0, 0]),
            "last": int(image[-1, -1]),
            "sha256_int32_le": _sha256(image, "<i4"),
        }
    for case in description["depth_label_cases"]:
        rows, columns = np.indices((case["h"], case["w"]))
        png = ((rows * case["mr"] + columns * case["mc"]) % 25600).astype(np.uint16)
        depth = depth_label(png)
        assert results.pop(case["name"]) == {
            "shape": list(depth.shape),
            "dtype": str(depth.dtype),
            "num_valid": int((depth > 0).sum()),
            "sum_float64": float(depth.sum(dtype=np.float64)),
            "max": float(depth.max()),
            "sha256_float32_le": _sha256(depth, "<f4"),
        }
    rows, columns = np.nonzero(garg_mask(np.full((352, 1216), 10, dtype=np.float32)))
    assert results.pop("garg_352x1216_constant_10m") == {
        "row_first": rows.min(),
        "row_last": rows.max(),
        "col_first": columns.min(),
        "col_last": columns.max(),
        "count": len(rows),
    }
    assert not results, "not checked"
    comparison.check()


def test_label_tables_file(label_tables_file, comparison):
    wanted = {
        name: torch.tensor(v) for name, v in json.loads(label_tables_file.read_text()).items()
    }
    got = {
        "cityscapes_id_to_train_id": torch.from_numpy(cityscapes_table()),
        "vspw_id_to_train_id": torch.from_numpy(vspw_table()),
    }
    comparison.add_all(got, wanted, {})
    comparison.check()


def test_metrics_file(metrics_file, comparison):
    description = json.loads(metrics_file.read_text())
    inputs = load_file(metrics_file.with_name("metrics_inputs.safetensors"))
    num_classes = description["num_classes"]
    confusion, errors = torch.zeros(num_classes, num_classes, dtype=torch.int64), np.zeros(2)
    for update in range(description["num_updates"]):
        logits, labels = inputs["seg_logits"][update], inputs["seg_labels"][update]
        confusion += confusion_matrix(logits, labels, num_classes=num_classes)
        errors += squared_errors(inputs["depth_pred"][update], inputs["depth_labels"][update])
    results = description["results"]
    miou, rmse = values("miou", *class_counts(confusion)), values("rmse", errors[:1], errors[1:])
    comparison.add("seg_miou", torch.tensor(float(miou)), torch.tensor(results["seg_miou"]))
    comparison.add("depth_rmse", torch.tensor(float(rmse)), torch.tensor(results["depth_rmse"]))
    wanted = torch.tensor(results["seg_confusion_rows_target_cols_pred"])
    comparison.add("confusion", confusion, wanted)
    comparison.check()


def test_middle_frame_indices_file(middle_frame_indices_file, comparison):
    cases = json.loads(middle_frame_indices_file.read_text())["compute_middle_frame_indices"]
    for index, case in enumerate(cases):
        got = middle_frame_indices(
            np.array(case["timestamps"]),
            num_frames=case["num_frames"],
            time_stride_s=case["time_stride_seconds"],
        )
        comparison.add(str(index), torch.from_numpy(got), torch.tensor(case["result"]))
    comparison.check()


def test_sample_frame_indices_file(sample_frame_indices_file, comparison):
    cases = json.loads(sample_frame_indices_file.read_text())["sample_frame_indices"]
    for index, case in enumerate(cases):
        generator = torch.Generator().manual_seed(case["seed"])
        gaps = torch.empty(case["num_frames"] - 1).uniform_(
            *case["time_stride_range"], generator=generator
        )
        times = np.array(case["timestamps"], dtype=np.float32)
        got = sample_frame_indices(
            times,
            gaps_s=gaps.numpy(),
            start_fraction=torch.rand((), generator=generator).item(),
        )
        wanted = case["result"]
        comparison.add(f"{index}.indices", torch.from_numpy(got), torch.tensor(wanted["indices"]))
        comparison.add(
            f"{index}.timestamps", torch.from_numpy(times[got]), torch.tensor(wanted["timestamps"])
        )
    comparison.check()


def _sha256(array: np.ndarray, dtype: str) -> str:
    return hashlib.sha256(np.ascontiguousarray(array, dtype=dtype).tobytes()).hexdigest()
