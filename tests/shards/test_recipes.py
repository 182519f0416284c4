"""The recipes read what was written, each in a process that never imports deltatok."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import deltatok.shards
from deltatok.shards import DeltaShards, PatchShards
from deltatok.shards.cache import finish_cache, open_cache
from deltatok.shards.deltas.writer import write_delta_shard
from deltatok.shards.plan import make_plan, write_plan

RECIPES = Path(deltatok.shards.__file__).parent / "recipes"

RUN = """
import runpy, sys
import numpy
recipe, cache, wanted = sys.argv[1:]
sys.argv = [recipe, cache]
sys.path.insert(0, recipe.rpartition("/")[0])  # as `python recipe.py` does
runpy.run_path(recipe, run_name="__main__")
got = runpy.run_path(recipe)["main"](cache)
numpy.testing.assert_array_equal(got, numpy.load(wanted), strict=True)
assert not [name for name in sys.modules if name.startswith("deltatok")]
"""


def run(*command: str | Path, cwd: Path) -> str:
    """In a fresh interpreter, warnings as errors, without network or caches; its output."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd / "hf"), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-W", "error", *map(str, command)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | offline,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def check(recipe: str, cache: Path, wanted: np.ndarray, tmp_path: Path) -> str:
    np.save(tmp_path / "wanted.npy", wanted)
    return run(
        "-c",
        RUN,
        RECIPES / f"{recipe}.py",
        cache,
        tmp_path / "wanted.npy",
        cwd=tmp_path,
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
@pytest.mark.parametrize("recipe", ["patches_numpy", "patches_zarr", "patches_tensorstore"])
def test_patch_recipe_reads_every_token(
    little: Any, tmp_path: Path, recipe: str, dtype: str
) -> None:
    if recipe == "patches_tensorstore":
        pytest.importorskip("tensorstore", reason="a recipe's library, not a dependency")
    cache = little.make_patches(tmp_path / "cache", dtype=dtype).folder
    check(recipe, cache, PatchShards(cache)[:], tmp_path)


@pytest.mark.parametrize("recipe", ["patches_zarr", "patches_tensorstore"])
def test_patch_recipe_reads_compressed_shards(little: Any, tmp_path: Path, recipe: str) -> None:
    if recipe == "patches_tensorstore":
        pytest.importorskip("tensorstore", reason="a recipe's library, not a dependency")
    cache = little.make_patches(tmp_path / "cache", compression="zstd").folder
    check(recipe, cache, PatchShards(cache)[:], tmp_path)


@pytest.mark.parametrize(
    "recipe", ["deltas_numpy", "deltas_webdataset", "deltas_datasets", "deltas_torch"]
)
def test_delta_recipe_reads_every_token(little: Any, tmp_path: Path, recipe: str) -> None:
    if recipe == "deltas_datasets" and find_spec("datasets") is None:
        pytest.skip("Hugging Face datasets is not installed (it is in the dev extra)")
    cache = little.make_deltas(tmp_path / "cache").folder
    printed = check(recipe, cache, DeltaShards(cache)[:], tmp_path)
    assert printed


def test_the_numpy_recipes_refuse_a_shard_that_was_cut_off(
    little: Any, patches: Any, deltas: Any, tmp_path: Path
) -> None:
    for recipe, cache, name in (
        ("patches_numpy", patches.folder, "000001.zarr.zip"),
        ("deltas_numpy", deltas.folder, "000001.tar"),
    ):
        path = cache / "shards" / name
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(AssertionError, match="not the file that was written"):
            run(RECIPES / f"{recipe}.py", cache, cwd=tmp_path)


def test_the_torch_recipe_gives_each_window_once_in_an_order_of_the_seed(
    deltas: Any, tmp_path: Path
) -> None:
    orders = run(
        "-c",
        """
import sys
sys.path.insert(0, sys.argv[1])
from deltas_torch import loader
for seed, workers in ((0, 0), (0, 2), (1, 0)):
    batches = loader(sys.argv[2], batch=4, workers=workers, seed=seed)
    print([value for batch in batches for value in batch["tokens"][:, 0, 0].tolist()])
""",
        RECIPES,
        deltas.folder,
        cwd=tmp_path,
    ).splitlines()
    first, workers, other = (json.loads(line) for line in orders)
    assert first == workers != other
    stored = deltas.expected["tokens"][:, 0, 0].tolist()
    assert sorted(first) == sorted(other) == sorted(stored)


def test_the_training_example_learns_from_a_little_cache(tmp_path: Path, little: Any) -> None:
    """Tokens that grow by a fixed step can be foretold; the mean cannot."""
    printed = run(
        RECIPES / "train_your_own.py",
        learnable(little, tmp_path / "cache"),
        "--steps=60",
        "--batch=16",
        f"--out={tmp_path / 'model.pt'}",
        cwd=tmp_path,
    )
    words = printed.splitlines()[-1].replace(",", "").split()
    held_out, mean = float(words[2]), float(words[-1])
    assert held_out < 0.5 * mean
    assert (tmp_path / "model.pt").stat().st_size > 1000


def learnable(little: Any, folder: Path) -> Path:
    """A delta cache of 40 clips, one window each; a token is the one before it, turned."""
    open_cache(folder, little.delta_info())
    clips = [little.Clip(f"clip{index}.mp4", Path(f"/videos/{index}"), 1) for index in range(40)]
    plan = write_plan(folder, make_plan(clips, clips_per_shard=40, seed=0))
    rows = little.delta_rows(40, [entry.key for entry in plan], seed=0)
    tokens = np.stack([np.roll(rows.tokens[:, 0], frame, axis=1) for frame in range(3)], axis=1)
    rows = replace(rows, tokens=tokens, clip=np.arange(40, dtype=np.int32))
    write_delta_shard(folder, 0, rows)
    finish_cache(folder)
    return folder
