"""What a machine has for this package: one line a part, with what to do where it is missing.

Decoders are not only looked for: each decodes a clip that is made for the purpose.
"""

import importlib.metadata
import importlib.util
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

State = Literal["ok", "missing", "broken"]
CODECS = ("h264", "hevc", "vp9", "av1", "mpeg4")
"""Video codecs of Kinetics, of web video and of old data sets."""
EXTRAS = {"tensorboard": "tensorboard", "wandb": "wandb"}
"""Module -> extra of this package."""
BACKBONE = "facebook/dinov3-vitb16-pretrain-lvd1689m"
SHARED_MEMORY_BYTES = 1 << 30
"""Frames go from decoders to the backbone through /dev/shm; containers often give it 64 MB."""
HUB_TIMEOUT_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One part of the machine."""

    part: str
    state: State
    text: str
    """What was found; for the other states also what to do."""
    needed: bool = False
    """Whether nothing works without it."""


def examine(folder: Path, *, offline: bool = False) -> Iterator[Finding]:
    """Everything, a finding at a time as it is known. folder: where caches would be written.

    offline: leave out the one question that is asked over the network, whether the hub gives this
    account DINOv3's weights.
    """
    yield from _python()
    yield from _devices()
    yield from _decoders()
    yield from _space(folder)
    yield _weights(offline=offline)
    yield from _extras()


def _python() -> Iterator[Finding]:
    version = platform.python_version()
    right = (3, 11) <= sys.version_info[:2] <= (3, 13)
    advice = "" if right else ": wanted 3.11 to 3.13, make PYTHON=python3.12 ..."
    state: State = "ok" if right else "broken"
    yield Finding(part="Python", state=state, text=version + advice, needed=True)
    yield Finding(part="deltatok", state="ok", text=_version("deltatok"))


def _devices() -> Iterator[Finding]:
    import torch

    cuda = "no CUDA" if torch.version.cuda is None else f"CUDA {torch.version.cuda}"
    yield Finding(part="torch", state="ok", text=f"{torch.__version__} ({cuda})")
    if not torch.cuda.is_available():
        yield Finding(
            part="GPU",
            state="missing",
            text="none that torch can use: everything runs on the CPU, which is for small trials; "
            "with an NVIDIA GPU, install a CUDA build of torch (https://pytorch.org)",
        )
    for number in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(number)
        size = f"{device.total_memory / 1e9:.0f} GB"
        kind = f"compute capability {device.major}.{device.minor}"
        yield Finding(part=f"GPU {number}", state="ok", text=f"{device.name}, {size}, {kind}")


PROGRAMS = {
    "PyAV": "import sys, av; print(sum(1 for _ in av.open(sys.argv[1]).decode(video=0)))",
    "decord": "import sys, decord; print(sum(1 for _ in decord.VideoReader(sys.argv[1])))",
    "torchcodec": (
        "import sys, torchcodec.decoders as d; v = d.VideoDecoder(sys.argv[1]); print(len(v[:]))"
    ),
}
"""Decodes the file that is given and prints its number of frames. In a process of its own, because
a decoder that does not fit the machine may end the process or hang."""
NUM_FRAMES = 8
DECODER_TIMEOUT_S = 60.0


def _decoders() -> Iterator[Finding]:
    import av

    there = [name for name in CODECS if name in av.codecs_available]
    codecs = f"{', '.join(there)}"
    if len(there) < len(CODECS):
        codecs += f"; not {', '.join(sorted(set(CODECS) - set(there)))}"
    yield Finding(part="codecs", state="ok", text=codecs)
    with tempfile.TemporaryDirectory() as folder:
        clip = Path(folder) / "clip.mp4"
        frames = np.zeros((NUM_FRAMES, 64, 64, 3), np.uint8)
        with av.open(str(clip), "w") as out:
            stream = out.add_stream("h264", rate=8, width=64, height=64, pix_fmt="yuv420p")
            for frame in frames:
                out.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
            out.mux(stream.encode())
        for name, program in PROGRAMS.items():
            yield _decoder(name, program, clip)


def _decoder(name: str, program: str, clip: Path) -> Finding:
    module = "av" if name == "PyAV" else name
    needed = name == "PyAV"
    if importlib.util.find_spec(module) is None:
        advice = f"pip install {'deltatok[torchcodec]' if name == 'torchcodec' else module}"
        instead = "; PyAV decodes everything without it, slower" if not needed else ""
        return Finding(part=name, state="missing", text=advice + instead, needed=needed)
    version = _version(module)
    command = [sys.executable, "-P", "-c", program, str(clip)]
    try:
        done = subprocess.run(
            command, capture_output=True, timeout=DECODER_TIMEOUT_S, text=True, check=False
        )
    except subprocess.TimeoutExpired:
        why = f"did not decode {NUM_FRAMES} frames within {DECODER_TIMEOUT_S:.0f} s"
    else:
        if done.returncode == 0 and done.stdout.split()[-1:] == [str(NUM_FRAMES)]:
            text = f"{version}, decodes H.264"
            return Finding(part=name, state="ok", text=text, needed=needed)
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        why = lines[-1][:200] if lines else f"gave {done.stdout.strip()[:40]!r}"
        if done.returncode < 0:
            why = f"ended with {signal.Signals(-done.returncode).name}"
        if "libtorchcodec" in done.stderr:
            why = "FFmpeg's shared libraries are not installed (Debian: apt-get install ffmpeg)"
    instead = "" if needed else "; give --decoder pyav, or install another version"
    return Finding(part=name, state="broken", text=f"{version}: {why}{instead}", needed=needed)


def _space(folder: Path) -> Iterator[Finding]:
    place = folder.resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    frames = free / 0.393e6  # float16, 256 pixels: 256 tokens of 768 channels
    text = (
        f"{free / 1e9:,.0f} GB free at {place}: about {frames / 1e6:,.1f} million frames of 256 px"
    )
    yield Finding(part="disk", state="ok", text=text)
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).free
        enough = size >= SHARED_MEMORY_BYTES
        advice = "" if enough else ": decoders may run out; in Docker, give --shm-size 4g"
        yield Finding(
            part="shared memory",
            state="ok" if enough else "broken",
            text=f"{size / 1e9:,.1f} GB free{advice}",
        )


def _weights(*, offline: bool) -> Finding:
    from huggingface_hub import HfApi, get_token, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

    own = "or give --backbone a local folder"
    licence = f"accept the licence at https://huggingface.co/{BACKBONE} and `hf auth login`, {own}"
    if isinstance(try_to_load_from_cache(BACKBONE, "model.safetensors"), str):
        return Finding(part="DINOv3", state="ok", text=f"{BACKBONE} is in the local hub cache")
    if get_token() is None:
        return Finding(part="DINOv3", state="missing", text=f"no token of the hub: {licence}")
    if offline:
        return Finding(part="DINOv3", state="missing", text=f"not in the local hub cache; {own}")
    try:
        HfApi().model_info(BACKBONE, timeout=HUB_TIMEOUT_S, files_metadata=False)
        HfApi().auth_check(BACKBONE)
    except GatedRepoError:
        return Finding(
            part="DINOv3", state="missing", text=f"this account has no access: {licence}"
        )
    except (HfHubHTTPError, OSError, RuntimeError) as error:
        why = str(error).splitlines()[0][:120]
        return Finding(
            part="DINOv3", state="missing", text=f"the hub does not answer ({why}); {own}"
        )
    return Finding(part="DINOv3", state="ok", text=f"this account may download {BACKBONE}")


def _extras() -> Iterator[Finding]:
    for module, extra in EXTRAS.items():
        if importlib.util.find_spec(module) is None:
            text = f"pip install 'deltatok[{extra}]'"
            yield Finding(part=f"extra {extra}", state="missing", text=text)
        else:
            yield Finding(part=f"extra {extra}", state="ok", text=_version(module))


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown version"
