"""The commands, end to end on a tiny world, and what each says to bad input."""

import dataclasses
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deltatok.pipeline.cli import load_name, run_command
from deltatok.pipeline.commands.evaluate import main as evaluate
from deltatok.pipeline.commands.extract import main as extract
from deltatok.pipeline.commands.pipeline import main as pipeline
from deltatok.pipeline.commands.shards import main as shards
from deltatok.pipeline.commands.train import main as train
from deltatok.pipeline.little_world.backbone import TinyBackboneConfig, make_tiny_backbone
from deltatok.shards import DeltaShards, PatchShards

Fails = Callable[..., None]


def test_the_whole_pipeline_writes_a_report(tiny_run: Path) -> None:
    report = json.loads((tiny_run / "report" / "report.json").read_text())
    rows = {row["row"] for row in report["rows"] if row["metric"] == "miou"}
    bounds = {"copy_last", "present", "reconstruction", "reconstruction_open_loop"}
    assert rows == bounds | {"discriminative", "regressor_null", "mean", "best"}
    assert report["probes"]["z_swap_ratio"] > 0
    assert set(report["seconds"]["stages"]) >= {"patches", "tokenizer", "world-model", "report"}
    page = (tiny_run / "report" / "report.html").read_text()
    assert "data:image/png;base64," in page


def test_a_second_run_does_nothing_twice(
    tiny_inputs: Path, tiny_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*") if path.is_file()}
    assert pipeline(["run", str(tiny_inputs / "tiny.yaml"), "--out", str(tiny_run)]) == 0
    assert (
        capsys.readouterr().out.splitlines()[-1] == f"report: file://{tiny_run}/report/report.html"
    )
    after = {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*") if path.is_file()}
    changed = {path.name for path in after if after[path] != before.get(path)}
    assert changed <= {"report.json"}


def test_a_run_says_first_what_it_will_do_and_then_what_came_out(
    tiny_inputs: Path, tiny_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(tiny_run / "report")
    assert pipeline(["run", str(tiny_inputs / "tiny.yaml"), "--out", str(tiny_run)]) == 0
    said = capsys.readouterr()
    assert "1 of 7 stages to run" in said.err.splitlines()[0]
    *_, order, report = said.out.splitlines()
    assert "The tokenizer reconstructs no better than copying" in said.out  # of 3 steps
    assert order.startswith("expected order: ")
    assert report.startswith("report: file:///")
    for line in (order, report):
        assert (said.out + said.err).count(line) == 1


def test_a_stage_of_other_settings_is_named_before_anything_runs(
    tiny_inputs: Path, tiny_run: Path, fails: Fails, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(tiny_inputs / "tiny.yaml"), "--out", str(tiny_run), "--set", "head.lr=0.5"]
    again = f"deltatok-pipeline run {words[0]} --out {tiny_run} --set head.lr=0.5 --again head"
    fails(pipeline, ["run", *words], 4, "stage head", "lr: 0.5", again)
    assert pipeline(["plan", *words]) == 0
    assert "head             deltatok-train head          was run otherwise" in (
        capsys.readouterr().out
    )


def test_patch_and_delta_caches_hold_the_same_windows(tiny_run: Path) -> None:
    patches, deltas = PatchShards(tiny_run / "patches"), DeltaShards(tiny_run / "deltas")
    assert patches.num_windows == deltas.num_windows == 12
    assert [patches.keys[i] for i in patches.clip_index] == [
        deltas.keys[i] for i in deltas.clip_index
    ]


@pytest.mark.parametrize("cache", ["patches", "deltas"])
def test_info_and_verify_accept_a_sound_cache(
    tiny_run: Path, cache: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shards(["info", str(tiny_run / cache)]) == 0
    assert shards(["info", str(tiny_run / cache), "--json"]) == 0
    assert shards(["verify", str(tiny_run / cache)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(": ok")


@pytest.mark.parametrize("damage", ["flipped", "truncated"])
@pytest.mark.parametrize("cache", ["patches", "deltas"])
def test_a_damaged_shard_is_found_and_not_used(
    tiny_run: Path, tmp_path: Path, fails: Fails, cache: str, damage: str
) -> None:
    copy = tmp_path / cache
    shutil.copytree(tiny_run / cache, copy)
    files = [p for p in (copy / "shards").rglob("*") if p.is_file() and p.suffix != ".json"]
    biggest = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(biggest.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 1
    else:
        del data[-1]
    biggest.write_bytes(data)
    fails(shards, ["verify", str(copy)], 1, "000000", "extract again")
    kind, out = ("tokenizer", "t") if cache == "patches" else ("world", "w")
    settings = ["--steps", "1", "--batch-size", "4", "--out", str(tmp_path / out)]
    words = [kind, f"--{cache}", str(copy), *settings, *_model(kind)]
    fails(train, words, 1, "000000")


def _model(kind: str) -> list[str]:
    if kind == "tokenizer":
        model = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    else:
        model = {
            "predictor_hidden_size": 32,
            "predictor_num_hidden_layers": 1,
            "predictor_num_heads": 2,
            "rope_axis_sizes": [12],
            "num_samples_train": 4,
        }
    return [word for key, value in model.items() for word in ("--set", f"model.{key}={value}")]


def test_an_unknown_flag_is_not_buried_in_the_usage(fails: Fails) -> None:
    words = ["--videos", "x", "--out", "o", "--frame-sise", "64"]
    lines = "--frame-sise 64; did you mean --frame-size?\ntry: deltatok-extract --help\n"
    fails(extract, words, 2, lines)


def test_no_such_video_path(tmp_path: Path, fails: Fails) -> None:
    words = ["--videos", str(tmp_path / "nowhere"), "--out", str(tmp_path / "o")]
    fails(extract, words, 2, "nowhere")
    assert not (tmp_path / "o").exists()


def test_a_folder_without_a_video(tmp_path: Path, fails: Fails) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "notes.txt").write_text("")
    words = ["--videos", str(tmp_path / "in"), "--out", str(tmp_path / "o")]
    fails(extract, words, 2, "no video")


def test_every_clip_broken(tiny_inputs: Path, tmp_path: Path, fails: Fails) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / "in" / name).write_bytes(b"this is not a video")
    out = tmp_path / "o"
    words = ["--videos", str(tmp_path / "in"), "--out", str(out), "--frame-size", "32"]
    fails(extract, [*words, "--backbone", str(tiny_inputs / "backbone")], 3, "quarantine")
    assert len((out / "quarantine.jsonl").read_text().splitlines()) == 2
    assert not list(out.rglob("*.partial-*"))
    assert not list(out.rglob("*.zarr.zip"))


def test_an_out_that_cannot_be_written(tiny_inputs: Path, tmp_path: Path, fails: Fails) -> None:
    (tmp_path / "file").write_text("")
    words = ["--videos", str(tiny_inputs / "world" / "train"), "--frame-size", "32"]
    words += ["--backbone", str(tiny_inputs / "backbone"), "--out", str(tmp_path / "file" / "o")]
    fails(extract, words, 2, "file")


def test_an_out_that_holds_another_cache(tiny_inputs: Path, tiny_run: Path, fails: Fails) -> None:
    words = ["--videos", str(tiny_inputs / "world" / "train"), "--seed", "1"]
    words += ["--backbone", str(tiny_inputs / "backbone"), "--frame-size", "32"]
    fails(extract, [*words, "--out", str(tiny_run / "patches")], 4, "sampling.seed")


def test_a_frame_size_off_the_patch_grid(tiny_inputs: Path, tmp_path: Path, fails: Fails) -> None:
    words = ["--videos", str(tiny_inputs / "world" / "train"), "--frame-size", "40"]
    words += ["--backbone", str(tiny_inputs / "backbone"), "--out", str(tmp_path / "o")]
    fails(extract, words, 2, "40", "32", "48")


def test_a_cache_of_another_backbone(
    tiny_inputs: Path, tiny_run: Path, tmp_path: Path, fails: Fails
) -> None:
    other = make_tiny_backbone(
        TinyBackboneConfig(
            out=str(tmp_path / "other"),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            seed=1,
        )
    )
    words = ["--videos", str(tiny_inputs / "world" / "val"), "--frame-size", "32"]
    words += ["--sampling", "uniform", "--fps", "5", "--num-frames", "7", "--workers", "1"]
    made = tmp_path / "patches"
    assert extract([*words, "--backbone", str(other), "--out", str(made)]) == 0
    tokenizer = str(tiny_run / "tokenizer")
    words = ["--patches", str(made), "--tokenizer", tokenizer, "--out", str(tmp_path / "deltas")]
    fails(extract, words, 4, "backbone.weights_sha256")
    words = ["forecast", "--patches", str(made), "--tokenizer", tokenizer]
    fails(evaluate, [*words, "--out", str(tmp_path / "r")], 4, "backbone.weights_sha256")


def test_a_world_model_of_another_tokenizer(tiny_run: Path, tmp_path: Path, fails: Fails) -> None:
    other = tmp_path / "tokenizer"
    words = ["tokenizer", "--patches", str(tiny_run / "patches"), "--out", str(other)]
    words += ["--steps", "2", "--batch-size", "14", "--seed", "1", *_model("tokenizer")]
    assert train(words) == 0
    words = ["forecast", "--patches", str(tiny_run / "val-patches"), "--tokenizer", str(other)]
    words += ["--world", str(tiny_run / "world-model"), "--out", str(tmp_path / "r")]
    fails(evaluate, words, 4, "tokenizer.weights_sha256")


def test_the_wrong_kind_of_cache(tiny_run: Path, tmp_path: Path, fails: Fails) -> None:
    words = ["world", "--deltas", str(tiny_run / "patches"), "--out", str(tmp_path / "w")]
    fails(train, words, 4, "deltatok-patches", "deltatok-deltas")


def test_an_unknown_key_names_the_nearest(tiny_run: Path, tmp_path: Path, fails: Fails) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(f"patches: {tiny_run / 'patches'}\nout: {tmp_path / 't'}\nbach_size: 4\n")
    fails(train, ["tokenizer", "--config", str(config)], 2, "bach_size", "batch_size")


def test_a_config_with_a_lease_timeout_is_refused_by_its_name(tmp_path: Path, fails: Fails) -> None:
    """Of before: processes shared the work by leases."""
    (tmp_path / "old.yaml").write_text("videos: [clips]\nout: cache\nlease_timeout: 60s\n")
    words = ["--config", str(tmp_path / "old.yaml")]
    fails(extract, words, 2, "unknown key 'lease_timeout'; did you mean")


def test_sigterm_ends_a_command_with_75_whatever_it_is_at(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def load() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except Exception:  # as libraries do around the import of another one
            pytest.fail("taken for a package that does not work")

    before = signal.getsignal(signal.SIGTERM)
    assert run_command(load) == 75
    assert "SIGTERM" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("train", ["world", "--deltas", "d", "--out", "o"]),
        ("extract", ["--videos", "v", "--out", "o"]),
        ("evaluate", ["forecast", "--patches", "p", "--tokenizer", "t", "--out", "o"]),
    ],
)
def test_sigterm_while_modules_load_ends_with_75(
    tmp_path: Path, module: str, words: list[str]
) -> None:
    """A torch that never comes to its end of being loaded stands in for a slow disk."""
    (tmp_path / "v").mkdir()
    (tmp_path / "torch.py").write_text(
        "import sys, time\nprint('here', file=sys.stderr, flush=True)\ntime.sleep(60)\n"
    )
    code = f"import sys; from deltatok.pipeline.commands.{module} import main; sys.exit(main())"
    with subprocess.Popen(
        [sys.executable, "-P", "-c", code, *words],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        try:
            first = process.stderr.readline()
            process.terminate()
            said = process.communicate(timeout=30)[1]
        finally:
            process.kill()
    assert first == "here\n"
    assert process.returncode == 75
    assert "SIGTERM" in said


def test_fewer_windows_than_the_batch(tiny_run: Path, tmp_path: Path, fails: Fails) -> None:
    words = ["world", "--deltas", str(tiny_run / "deltas"), "--out", str(tmp_path / "w")]
    fails(train, [*words, "--batch-size", "64", *_model("world")], 2, "64", "windows")


@pytest.mark.parametrize(
    ("main", "words"),
    [(train, ["tokeniser"]), (evaluate, ["forcast"]), (shards, ["inof", "x"]), (pipeline, [])],
)
def test_unknown_subcommands(
    main: Callable[[list[str]], int], words: list[str], fails: Fails
) -> None:
    fails(main, words, 2)


@pytest.mark.parametrize("main", [extract, shards, pipeline])
def test_help_exits_at_once_with_code_0(
    main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert "example" in capsys.readouterr().out


def test_a_released_head_is_imported_and_exported_unchanged(tmp_path: Path, fails: Fails) -> None:
    golden = Path(__file__).parents[2] / "golden" / "07a_seg_head" / "state.safetensors"
    model, file = tmp_path / "head", tmp_path / "pytorch_model.bin"
    assert pipeline(["import-official", str(golden), "--out", str(model)]) == 0
    assert pipeline(["export-official", str(model), "--out", str(file)]) == 0
    exported = torch.load(file, weights_only=True)["state_dict"]
    wanted = load_file(golden)
    assert exported.keys() == wanted.keys()
    assert all(torch.equal(exported[name], wanted[name]) for name in wanted)
    words = ["import-official", str(golden), "--out", str(tmp_path / "other")]
    fails(pipeline, [*words, "--set", "num_classes=9"], 1, "head.weight", "head.bias")


def test_flops_prints_the_tables(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["tokenizer.num_hidden_layers=1", "world.predictor_num_hidden_layers=1"]
    words = [word for setting in small for word in ("--set", setting)]
    assert evaluate(["flops", "--frame-size", "64", "--backbone-layers", "1", *words]) == 0
    out = capsys.readouterr().out
    assert "| backbone, a frame |" in out
    assert "Table B" in out


def test_a_rank_leaves_its_group_before_it_ends(tmp_path: Path) -> None:
    """Else the group's threads abort the process half of the time, and the exit code is lost."""
    group = torch.distributed
    group.init_process_group("gloo", store=group.HashStore(), rank=0, world_size=1)
    try:
        assert train(["world", "--deltas", str(tmp_path / "none"), "--out", str(tmp_path)]) == 2
        assert not group.is_initialized()
    finally:
        if group.is_initialized():
            group.destroy_process_group()


@pytest.mark.parametrize("main", [train, evaluate, shards])
def test_the_nearest_subcommand_is_named(
    main: Callable[[list[str]], int], fails: Fails, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    (name, *_) = re.findall(r"\{([\w-]+),", capsys.readouterr().out)
    fails(main, [f"{name}x"], 2, f"did you mean {name}?")
    fails(main, [], 2, name)


@pytest.mark.parametrize(
    ("code", "unwanted"),
    [
        ("import deltatok.evaluate", {"deltatok.extract", "torch", "av", "matplotlib"}),
        ("from deltatok.pipeline.commands import shards", {"torch", "av", "matplotlib"}),
        ("from deltatok.pipeline.commands import pipeline", {"torch", "av", "matplotlib"}),
        (
            "import deltatok.evaluate.forecast.run",
            {"av", "decord", "deltatok.extract.backbone", "deltatok.extract.decoding"},
        ),
        pytest.param(
            "import deltatok.evaluate.inference.model",
            {"av", "decord", "deltatok.extract.decoding"},
            marks=pytest.mark.slow,
        ),
        ("from deltatok.train import tokenizer, world", {"deltatok.extract", "av", "matplotlib"}),
        (
            "from deltatok.pipeline.commands import extract; extract.main(['--help'])",
            {"torch", "av", "decord", "zarr"},
        ),
    ],
)
def test_no_command_imports_what_it_does_not_use(code: str, unwanted: set[str]) -> None:
    script = (
        f"import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr)); {code}"
    )
    run = subprocess.run(
        [sys.executable, "-P", "-c", f"{script}; {code}"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert not unwanted & set(run.stderr.split())


@pytest.mark.parametrize("module", ["train", "evaluate", "shards", "extract"])
def test_every_command_of_a_table_is_there(module: str) -> None:
    found = importlib.import_module(f"deltatok.pipeline.commands.{module}")
    table = found.SOURCES if module == "extract" else found.COMMANDS
    for command in table.values():
        fields = {field.name for field in dataclasses.fields(load_name(command.config))}
        assert callable(load_name(command.run))
        assert set(re.findall(r"{(\w+)}", command.done)) <= fields
        assert command.positional is None or command.positional in fields
