"""Model folders: saved and loaded strictly.

folder/config.json        {"class": "DeltaTok", every field of its config}
folder/model.safetensors  the weights under the released parameter names
folder/provenance.json    what the weights were trained on: whether they belong to a cache, or to
                          another model
folder/checksums.json     size and SHA-256 of these three; written last
"""

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ...shards.cache import CacheInfo, compare
from ...shards.errors import CacheMismatch, DamagedShard, DeltatokError, UsageError
from ...shards.evaluation.geometry import frame_shape, shown_size
from ...shards.files import local_path, partial_path, publish, sha256_file, write_json
from ...shards.records import StoredFile
from ...shards.schema import STORED, Strictness, load, read_json

logger = logging.getLogger(__name__)

MODEL = Strictness(
    UsageError,
    is_typed=False,
    needs_all=True,
    advice=": it was written by another version, or edited; write the model folder again",
)
"""config.json has every field of the model's config, and nothing else."""
CONFIG, WEIGHTS, PROVENANCE = "config.json", "model.safetensors", "provenance.json"
CHECKSUMS, STATE = "checksums.json", "state.json"
FILES = (CONFIG, WEIGHTS, PROVENANCE)
"""Of a model; a checkpoint, which is a model folder too, has more."""


class Pretrained(nn.Module):
    """A module that is built from one frozen config and lives in a model folder."""

    config_class: ClassVar[type[Any]]
    saved_as: ClassVar[str]
    """The class that config.json states; the name of the Python class, unless it says otherwise."""
    config: Any

    def __init_subclass__(cls, **named: Any) -> None:
        super().__init_subclass__(**named)
        if "saved_as" not in cls.__dict__:
            cls.saved_as = cls.__name__

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def save_pretrained(self, folder: Path | str, provenance: Mapping[str, Any]) -> None:
        """Write the model folder, checksums.json last; each file under a partial name first.
        Existing files of a model are replaced, others left alone."""
        folder = local_path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        partial = partial_path(folder / WEIGHTS)
        try:
            save_tensors(self.state_dict(), partial)
            publish(partial, folder / WEIGHTS)
        finally:
            partial.unlink(missing_ok=True)
        write_json(folder / PROVENANCE, dict(provenance))
        write_json(folder / CONFIG, config_json(self))
        write_json(folder / CHECKSUMS, {"files": file_table(folder, FILES)})

    @classmethod
    def from_pretrained(cls, folder: Path | str, *, device: torch.device | str = "cpu") -> Self:
        """The model of a folder, in eval mode. DeltatokError if anything does not fit exactly."""
        folder = local_path(folder)
        advice = (
            f": restore the folder from a copy, or remove {CHECKSUMS} if you changed it yourself"
        )
        check_files(folder, FILES, advice=advice)
        got, fields = read_class(folder), _read_json(folder / CONFIG)
        if got != cls.saved_as:
            raise UsageError(
                f"{folder} holds a {got}, wanted a {cls.saved_as}; pass another folder"
            )
        del fields["class"]
        config = load(cls.config_class, fields, where=str(folder / CONFIG), how=MODEL)
        with torch.device("meta"):
            model = cls(config)
        load_weights(model, read_tensors(folder / WEIGHTS), source=str(folder))
        return model.to(device).eval()


@dataclass(frozen=True, kw_only=True)
class _Checksums:
    """What checksums.json, and state.json of a checkpoint, say of the files beside them."""

    files: dict[str, StoredFile | str] = field(default_factory=dict)
    """By name; the SHA-256 alone in checkpoints of an earlier version."""


def file_table(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of files, for checksums.json and state.json."""
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)}
        for name in names
    }


def check_files(folder: Path, names: Sequence[str], *, advice: str = "") -> bool:
    """Whether checksums.json, or state.json in a checkpoint, vouches for files of the folder.

    DamagedShard naming the first of `names` that is not what was written. An earlier version wrote
    a folder without checksums, or somebody changed it and took them away: it is loaded as it is.
    """
    teller = next((file for n in (CHECKSUMS, STATE) if (file := folder / n).exists()), None)
    if teller is None:
        return False
    table = load(_Checksums, read_json(teller), where=str(teller), how=STORED).files
    for name in names:
        file, wanted = folder / name, table.get(name)
        if wanted is None:
            continue
        check_regular(file)
        sha256 = wanted if isinstance(wanted, str) else wanted.sha256
        got = sha256_file(file)
        if got != sha256:
            size = "" if isinstance(wanted, str) else f" of {wanted.bytes} bytes"
            raise DamagedShard(
                f"{file}: not what was written: got {file.stat().st_size} bytes of SHA-256 {got}, "
                f"{teller.name} says {sha256}{size}{advice}"
            )
    return bool(table)


def to_host(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], torch.cuda.Event | None]:
    """The tensors on the CPU, and the event after which they are there; None: they are.

    From cuda they are copied into pinned memory, without a wait of the host; what is on the CPU is
    not copied.
    """
    copies: dict[str, Tensor] = {}
    copied = None
    for name, tensor in tensors.items():
        # Elsewhere than from cuda no event would tell when a copy without a wait is over.
        copies[name] = tensor.detach().contiguous().to("cpu", non_blocking=tensor.is_cuda)
        if tensor.is_cuda and copied is None:
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    if copied is not None:
        copied.record()
    return copies, copied


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Writes a .safetensors file; OSError where the disk refuses."""
    copies, copied = to_host(tensors)
    if copied is not None:
        copied.synchronize()
    try:
        save_file(copies, path)
    except SafetensorError as error:  # it wraps what the system said
        raise OSError(str(error)) from error


def config_json(model: Pretrained) -> dict[str, Any]:
    """What config.json says of a model."""
    return {"class": model.saved_as, **asdict(model.config)}


def read_class(folder: Path | str) -> str:
    """The class name that a model folder states, e.g. "DeltaTok"."""
    name = _read_json(Path(folder) / CONFIG).get("class")
    if not isinstance(name, str):
        raise DeltatokError(
            f'{Path(folder) / CONFIG}: no "class"; this is no deltatok model folder'
        )
    return name


def read_provenance(folder: Path | str) -> dict[str, Any]:
    """provenance.json of a model folder."""
    return _read_json(Path(folder) / PROVENANCE)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU. DeltatokError if it is absent or damaged."""
    check_regular(file)
    try:
        return load_file(file)
    except SafetensorError as error:
        raise DeltatokError(
            f"{file}: not readable as safetensors ({error}); copy or train it again"
        ) from error


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], *, source: str) -> None:
    """Put tensors in a module, which may be on the meta device. Names and shapes must be equal.

    Values are converted to the module's dtypes. DeltatokError lists every missing, left-over and
    misshapen tensor at once.
    """
    wanted = model.state_dict()
    problems = compare_tensors(wanted, tensors)
    if problems:
        raise DeltatokError(
            f"{source} does not fit {type(model).__name__}:\n  "
            + "\n  ".join(problems)
            + "\ncheck that its config belongs to these weights"
        )
    converted = {name: tensors[name].to(wanted[name].dtype) for name in wanted}
    model.load_state_dict(converted, assign=True)


def compare_tensors(
    wanted: Mapping[str, Tensor],
    got: Mapping[str, Tensor],
    *,
    optional: Sequence[str] = (),
    dtypes: bool = False,
) -> list[str]:
    """One line for every difference in names, shapes and kinds; empty if there is none.

    dtypes: they must be equal; else whole numbers must not stand for others, or the reverse.
    """
    problems = [f"missing: {n}" for n in wanted if n not in got and n not in optional]
    problems += [f"left over: {n}" for n in sorted(got) if n not in wanted]
    for name in wanted:
        if name not in got:
            continue
        ours, theirs = wanted[name], got[name]
        if ours.shape != theirs.shape:
            problems.append(
                f"misshapen: {name}: got {tuple(theirs.shape)}, wanted {tuple(ours.shape)}"
            )
        elif ours.is_floating_point() != theirs.is_floating_point() or (
            dtypes and ours.dtype != theirs.dtype
        ):
            problems.append(f"mistyped: {name}: got {theirs.dtype}, wanted {ours.dtype}")
    return problems


def weights_sha256(module: nn.Module) -> str:
    """Hex SHA-256 over all parameters and saved buffers: name, dtype, shape and bytes, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        value = tensor.detach().cpu().contiguous()
        dtype = str(value.dtype).removeprefix("torch.")
        digest.update(f"{name} {dtype} {list(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_regular(file: Path) -> None:
    """UsageError where there is no such file, DamagedShard where it is a pipe, a folder or a
    device: opening a pipe would wait for somebody to write to it."""
    if not file.exists():
        raise UsageError(f"{file}: no such file; pass a folder that save_pretrained has written")
    if not file.is_file():
        raise DamagedShard(f"{file}: not readable (no regular file); copy or train it again")


def _read_json(file: Path) -> dict[str, Any]:
    check_regular(file)
    value = read_json(file)
    if not isinstance(value, dict):
        raise DamagedShard(f"{file}: got a {type(value).__name__}, wanted an object")
    return value


SAME_PREPROCESSING = (
    "preprocessing.patch_size",
    "preprocessing.image_mean",
    "preprocessing.image_std",
    "preprocessing.resize",
)
SAME_FEATURES = ("backbone", *SAME_PREPROCESSING)
"""What makes patch tokens alike. Not the frame size: a model trained at 256 px may be used at
512 px, as in the paper. The shape of the frames does, because positions are relative to them."""


def check_trained_on(folder: str, cache: CacheInfo, *, what: str) -> bool:
    """Whether the model's provenance names the patch tokens it was trained on; a warning where not.

    CacheMismatch, naming the field, if those are of another backbone or preprocessing than the
    patch tokens of `cache`. what: the model in messages.
    """
    trained_on = read_provenance(folder).get("patches")
    if not isinstance(trained_on, Mapping):
        warn_unchecked(what, "patches")
        return False
    check_features(cache, trained_on, what=what)
    return True


def check_features(cache: CacheInfo, trained_on: Mapping[str, Any], *, what: str) -> None:
    """CacheMismatch, naming the field, unless the patch tokens of `cache` are of the backbone, the
    preprocessing and the shape of frames of those with the identity `trained_on`."""
    advice = (
        "give one that was trained on features of this backbone, or extract the cache with that "
        "one's"
    )
    compare(
        cache.identity,
        trained_on,
        what_got="the cache",
        what_wanted=f"the provenance of {what}",
        fields=SAME_FEATURES,
        advice=advice,
    )
    ours, theirs = _frame_size(cache.identity), _frame_size(trained_on)
    if ours and theirs and ours[0] * theirs[1] != ours[1] * theirs[0]:
        raise CacheMismatch(
            f"the cache: preprocessing.frame_size is {shown_size(ours)}, but {shown_size(theirs)} "
            f"in the provenance of {what}, which is another shape: {advice}"
        )


def _frame_size(patches: Mapping[str, Any]) -> tuple[int, int] | None:
    """Height and width of the frames of a patch cache of this identity, where it tells them."""
    preprocessing = patches.get("preprocessing")
    size = preprocessing.get("frame_size") if isinstance(preprocessing, Mapping) else None
    return frame_shape(size) if isinstance(size, int | list) else None


def check_made_by(
    weights_sha256: str, deltas: Mapping[str, Any], *, what_got: str, what: str
) -> None:
    """CacheMismatch, with both hashes, unless the tokenizer of these weights made the delta tokens
    that a world model was trained on, whose identity is `deltas`."""
    compare(
        {"tokenizer": {"weights_sha256": weights_sha256}},
        deltas,
        what_got=what_got,
        what_wanted=f"the provenance of {what}",
        fields=["tokenizer.weights_sha256"],
        advice="give the tokenizer that made the delta tokens it was trained on",
    )


def warn_unchecked(what: str, missing: str) -> None:
    """Say that a model does not say what it was trained on."""
    logger.warning(
        "%s does not say what it was trained on: its provenance.json has no %s, so that it belongs "
        "here is not checked",
        what,
        missing,
    )
