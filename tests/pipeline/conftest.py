"""A tiny world taken through every stage once, for the tests of the commands."""

from collections.abc import Callable
from pathlib import Path

import pytest

from deltatok.pipeline.commands.pipeline import main as pipeline_main
from deltatok.pipeline.little_world.backbone import TinyBackboneConfig, make_tiny_backbone
from deltatok.pipeline.little_world.files import make_little_world
from deltatok.pipeline.little_world.simulation import LittleWorldConfig

TINY = """
out: unused
stages:
  - name: patches
    command: deltatok-extract
    settings:
      videos: ["{root}/world/train"]
      out: "${{out}}/patches"
      backbone: "{root}/backbone"
      frame_size: 32
      num_windows: 4
      workers: 1
  - name: val-patches
    command: deltatok-extract
    settings:
      videos: ["{root}/world/val"]
      out: "${{out}}/val-patches"
      backbone: "{root}/backbone"
      frame_size: 32
      sampling: uniform
      num_frames: 7
      fps: 5
      workers: 1
  - name: tokenizer
    command: deltatok-train tokenizer
    settings: {{patches: "${{out}}/patches", out: "${{out}}/tokenizer", deltas: "${{out}}/deltas",
      model: {{num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32}},
      steps: 3, batch_size: 14, warmup_steps: 1}}
  - name: world-model
    command: deltatok-train world
    settings: {{deltas: "${{out}}/deltas", out: "${{out}}/world-model",
      model: {{predictor_hidden_size: 32, predictor_num_hidden_layers: 1, predictor_num_heads: 2,
        rope_axis_sizes: [12], num_samples_train: 4}}, steps: 3, batch_size: 4, warmup_steps: 1}}
  - name: discriminative
    command: deltatok-train world
    settings: {{deltas: "${{out}}/deltas", out: "${{out}}/discriminative",
      model: {{predictor_hidden_size: 32, predictor_num_hidden_layers: 1, predictor_num_heads: 2,
        rope_axis_sizes: [12], use_bom: false}}, steps: 3, batch_size: 4, warmup_steps: 1}}
  - name: head
    command: deltatok-train head
    settings: {{patches: "${{out}}/val-patches", labels: "{root}/world/labels/val", num_classes: 4,
      out: "${{out}}/head", steps: 3, batch_size: 4, warmup_steps: 1}}
  - name: report
    command: deltatok-evaluate forecast
    settings: {{patches: "${{out}}/val-patches", labels: "{root}/world/labels/val",
      tokenizer: "${{out}}/tokenizer", world: "${{out}}/world-model",
      discriminative: "${{out}}/discriminative", head: "${{out}}/head", dataset: tiny,
      out: "${{out}}/report", videos: ["{root}/world/val"], num_pictures: 1, num_samples: 3}}
"""


@pytest.fixture(scope="session")
def tiny_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ROOT/world (clips, labels), ROOT/backbone and ROOT/tiny.yaml, a pipeline over them."""
    root = tmp_path_factory.mktemp("tiny")
    make_little_world(
        LittleWorldConfig(
            out=str(root / "world"),
            num_train_clips=3,
            num_head_clips=0,
            num_val_clips=2,
            frame_size=32,
        )
    )
    make_tiny_backbone(
        TinyBackboneConfig(
            out=str(root / "backbone"), hidden_size=16, num_hidden_layers=1, num_attention_heads=2
        )
    )
    (root / "tiny.yaml").write_text(TINY.format(root=root))
    return root


@pytest.fixture(scope="session")
def tiny_run(tiny_inputs: Path) -> Path:
    """The folder with every stage's result of the tiny pipeline."""
    out = tiny_inputs / "run"
    assert pipeline_main(["run", str(tiny_inputs / "tiny.yaml"), "--out", str(out)]) == 0
    return out


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """fails(main, words, code, text): main(words) exits with `code` and says `text` on stderr."""

    def check(main: Callable[[list[str]], int], words: list[str], code: int, *texts: str) -> None:
        capsys.readouterr()
        assert main(words) == code
        said = capsys.readouterr().err
        assert "Traceback" not in said
        for text in texts:
            assert text in said, said

    return check
