"""Little lossless clips and a tiny random backbone, for the tests that extract."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from deltatok.extract.backbone import Backbone
from deltatok.extract.config import ExtractConfig
from deltatok.extract.run import run_extraction

GOLDEN_BACKBONE = Path(__file__).parents[1] / "golden" / "backbone"  # without its weights
FPS = 25
HEIGHT, WIDTH = 48, 80

ClipWriter = Callable[..., np.ndarray]
ConfigMaker = Callable[..., ExtractConfig]


@pytest.fixture(scope="session")
def backbone_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 3-layer DINOv3 of width 64 and patch size 16 with random weights, as a model folder."""
    folder = tmp_path_factory.mktemp("model") / "backbone"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        DINOv3ViTModel(DINOv3ViTConfig.from_pretrained(GOLDEN_BACKBONE)).save_pretrained(folder)
    shutil.copy(GOLDEN_BACKBONE / "preprocessor_config.json", folder)
    return folder


@pytest.fixture(scope="session")
def backbone(backbone_folder: Path) -> Backbone:
    """The model of `backbone_folder`, loaded."""
    return Backbone.load(str(backbone_folder))


@pytest.fixture(scope="session")
def write_clip() -> ClipWriter:
    """Writes a clip without loss; gives its frames uint8 (T, H, W, 3)."""

    def write(path: Path, *, seed: int, num_frames: int = 40) -> np.ndarray:
        rng = np.random.default_rng(seed)
        blocks = rng.integers(0, 256, (num_frames, HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8)
        frames = blocks.repeat(8, axis=1).repeat(8, axis=2)
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264rgb", rate=FPS, options={"qp": "0"})
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "rgb24"
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode(None))
        return frames

    return write


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory, write_clip: ClipWriter) -> Path:
    """Five clips, cN.mp4 written with seed N, and one file that is no video."""
    folder = tmp_path_factory.mktemp("clips")
    for seed in range(5):
        write_clip(folder / f"c{seed}.mp4", seed=seed)
    (folder / "broken.mp4").write_bytes(b"this is no video")
    return folder


def _config(
    clips: Path, backbone_folder: Path, out: Path, changes: dict[str, object]
) -> ExtractConfig:
    settings: dict[str, object] = {
        "videos": (str(clips),),
        "out": str(out),
        "backbone": str(backbone_folder),
        "frame_size": 32,
        "num_windows": 3,
        "num_frames": 4,
        "frames_per_shard": 24,
        "batch_frames": 8,
        "workers": 1,
        "max_quarantined": 0.2,
    }
    return ExtractConfig(**(settings | changes))  # type: ignore[arg-type]


@pytest.fixture
def make_config(clips: Path, backbone_folder: Path, tmp_path: Path) -> ConfigMaker:
    """A config for `clips` that writes to tmp_path/out: three shards of two clips."""
    return lambda **changes: _config(clips, backbone_folder, tmp_path / "out", changes)


@pytest.fixture(scope="session")
def finished(
    tmp_path_factory: pytest.TempPathFactory, clips: Path, backbone_folder: Path, backbone: Backbone
) -> Path:
    """The cache that `make_config()` makes, made in one go; not to be changed."""
    out = tmp_path_factory.mktemp("finished") / "out"
    run_extraction(_config(clips, backbone_folder, out, {}), backbone=backbone)
    return out


@pytest.fixture(scope="session")
def finished_int8(
    tmp_path_factory: pytest.TempPathFactory, clips: Path, backbone_folder: Path, backbone: Backbone
) -> Path:
    """The cache of `finished`, stored as int8; not to be changed."""
    out = tmp_path_factory.mktemp("finished-int8") / "out"
    run_extraction(_config(clips, backbone_folder, out, {"dtype": "int8"}), backbone=backbone)
    return out


@pytest.fixture(scope="session")
def digests() -> Callable[[Path], dict[str, str]]:
    """File -> SHA-256 of all files below a folder, but for what tells of time and process."""

    def digest(folder: Path) -> dict[str, str]:
        return {
            path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != "timings.jsonl"
        }

    return digest
