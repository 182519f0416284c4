"""What a machine has for this package: one line a part, with what to do where it is missing.

torch and the decoders are not only looked for: each is tried, in a process of its own.
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

State = Literal["ok", "missing", "broken"]
CODECS = ("h264", "hevc", "vp9", "av1", "mpeg4")
"""Video codecs of Kinetics, of web video and of old data sets."""
EXTRAS = {"tensorboard": "tensorboard", "wandb": "wandb"}
"""Module -> extra of this package."""
BACKBONE = "facebook/dinov3-vitb16-pretrain-lvd1689m"
SHARED_MEMORY_BYTES = 1 << 30
"""Frames go from decoders to the backbone through /dev/shm; containers often give it 64 MB."""
HUB_TIMEOUT_S = 20.0


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
    found, why = _try_out(TORCH, "")
    if found is None:
        text = f"{_version('torch')}: {why}; install it again, as https://pytorch.org says"
        yield Finding(part="torch", state="broken", text=text, needed=True)
        return
    version, cuda, *devices = found.splitlines()
    yield Finding(part="torch", state="ok", text=f"{version} ({cuda})")
    if not devices:
        yield Finding(
            part="GPU",
            state="missing",
            text="none that torch can use: everything runs on the CPU, which is for small trials; "
            "with an NVIDIA GPU, install a CUDA build of torch (https://pytorch.org)",
        )
    for number, device in enumerate(devices):
        yield Finding(part=f"GPU {number}", state="ok", text=device)


TORCH = """
import torch
print(torch.__version__)
print("no CUDA" if torch.version.cuda is None else f"CUDA {torch.version.cuda}")
for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
    device = torch.cuda.get_device_properties(number)
    kind = f"compute capability {device.major}.{device.minor}"
    print(f"{device.name}, {device.total_memory / 1e9:.0f} GB, {kind}")
"""
CLIP = """
import sys, av, numpy
print(*(name for name in av.codecs_available))
with av.open(sys.argv[1], "w") as out:
    stream = out.add_stream("h264", rate=8, width=64, height=64, pix_fmt="yuv420p")
    for _ in range(8):
        frame = av.VideoFrame.from_ndarray(numpy.zeros((64, 64, 3), numpy.uint8))
        out.mux(stream.encode(frame))
    out.mux(stream.encode())
"""
"""Writes a clip of NUM_FRAMES frames and prints all codecs."""
PROGRAMS = {
    "PyAV": "import sys, av; print(sum(1 for _ in av.open(sys.argv[1]).decode(video=0)))",
    "decord": "import sys, decord; print(sum(1 for _ in decord.VideoReader(sys.argv[1])))",
    "torchcodec": (
        "import sys, torchcodec.decoders as d; v = d.VideoDecoder(sys.argv[1]); print(len(v[:]))"
    ),
}
"""Decodes the file that is given and prints its number of frames."""
NUM_FRAMES = 8
TIMEOUT_S = 60.0


def _decoders() -> Iterator[Finding]:
    with tempfile.TemporaryDirectory() as folder:
        clip = f"{folder}/clip.mp4"
        found, why = _try_out(CLIP, clip)
        if found is None:
            text = f"{_version('av')}: {why}; pip install --force-reinstall av"
            yield Finding(part="PyAV", state="broken", text=text, needed=True)
            return  # without it there is no clip to try the others on
        there = [name for name in CODECS if name in found.split()]
        missing = sorted(set(CODECS) - set(there))
        codecs = ", ".join(there) + (f"; not {', '.join(missing)}" if missing else "")
        yield Finding(part="codecs", state="ok", text=codecs)
        for name, program in PROGRAMS.items():
            yield _decoder(name, program, clip)


def _decoder(name: str, program: str, clip: str) -> Finding:
    module, needed = ("av", True) if name == "PyAV" else (name, False)
    if importlib.util.find_spec(module) is None:
        advice = f"pip install {'deltatok[torchcodec]' if name == 'torchcodec' else module}"
        instead = "; PyAV decodes everything without it, slower"
        return Finding(part=name, state="missing", text=advice + instead)
    found, why = _try_out(program, clip)
    if found is not None and found.split()[-1:] == [str(NUM_FRAMES)]:
        text = f"{_version(module)}, decodes H.264"
        return Finding(part=name, state="ok", text=text, needed=needed)
    why = why if found is None else f"gave {found.strip()[:40]!r}"
    instead = "" if needed else "; give --decoder pyav, or install another version"
    text = f"{_version(module)}: {why}{instead}"
    return Finding(part=name, state="broken", text=text, needed=needed)


def _try_out(
    program: str, argument: str, *, timeout_s: float | None = None
) -> tuple[str | None, str]:
    """What a program prints, in a process of its own, because what does not fit the machine may end
    the process or hang; None and why if it fails."""
    command = [sys.executable, "-P", "-c", program, argument]
    limit_s = timeout_s or TIMEOUT_S
    try:
        done = subprocess.run(command, capture_output=True, timeout=limit_s, text=True, check=False)
    except subprocess.TimeoutExpired:
        return None, f"did not end within {limit_s:.3g} s"
    if done.returncode == 0:
        return done.stdout, ""
    if "libtorchcodec" in done.stderr:
        return None, "FFmpeg's shared libraries are not installed (Debian: apt-get install ffmpeg)"
    if done.returncode < 0:
        return None, f"ended with {signal.Signals(-done.returncode).name}"
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return None, lines[-1][:200] if lines else f"ended with exit code {done.returncode}"


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


HUB = """
import sys
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError
try:
    HfApi().auth_check(sys.argv[1])
    print("open")
except GatedRepoError:
    print("gated")
"""


def _weights(*, offline: bool) -> Finding:
    from huggingface_hub import get_token, try_to_load_from_cache

    own = "or give --backbone a local folder"
    licence = f"accept the licence at https://huggingface.co/{BACKBONE} and `hf auth login`, {own}"
    if isinstance(try_to_load_from_cache(BACKBONE, "model.safetensors"), str):
        return Finding(part="DINOv3", state="ok", text=f"{BACKBONE} is in the local hub cache")
    if get_token() is None:
        return Finding(part="DINOv3", state="missing", text=f"no token of the hub: {licence}")
    if offline:
        return Finding(part="DINOv3", state="missing", text=f"not in the local hub cache; {own}")
    found, why = _try_out(HUB, BACKBONE, timeout_s=HUB_TIMEOUT_S)
    if found is None:
        text = f"the hub gives no answer ({why[:120]}): check the network, {own}"
    elif "gated" in found:
        text = f"this account has no access: {licence}"
    else:
        return Finding(part="DINOv3", state="ok", text=f"this account may download {BACKBONE}")
    return Finding(part="DINOv3", state="missing", text=text)


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
