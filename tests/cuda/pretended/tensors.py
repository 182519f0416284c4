"""Tensors that say cuda:N, hold the CPU's numbers, and meet others by CUDA's rules.

To torch's C++ such a tensor lies on "xla:N": a device that CPU-only torch knows, whose kernels it
has not, and whose tensors autocast("cuda") takes. In Python it says cuda:N. Below autograd and
autocast every operator comes to `dispatch`, which runs it on the CPU tensors inside.
"""

import ctypes
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

from .clocks import HOST, Block
from .counts import source_line

if TYPE_CHECKING:
    from .driver import PretendedDevice

aten = torch.ops.aten
_INSIDE = "xla"
"""The type of device that C++ sees."""


class MixedDevices(RuntimeError):
    """An operator met tensors of several devices, as CUDA refuses them."""


class CudaTensor(Tensor):
    """A tensor of a pretended device."""

    inner: Tensor
    """Its numbers, on the CPU; never requires a gradient."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor, index: int) -> "CudaTensor":
        self: CudaTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=torch.device(_INSIDE, index),
            _extra_dispatch_keys=torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA),
        )
        self.inner = inner
        return self

    def __init__(self, inner: Tensor, index: int) -> None:
        pass

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return dispatch(func, args, dict(kwargs or {}))

    @property
    def index(self) -> int:
        """Number of its device."""
        return int(Tensor.device.__get__(self).index)  # type: ignore[attr-defined]

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", self.index)

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    def __repr__(self, **_: Any) -> str:
        return f"CudaTensor({tuple(self.shape)}, {self.dtype}, {self.device})"

    def __deepcopy__(self, memo: Any) -> "CudaTensor":
        return CudaTensor(self.inner.clone(), self.index).requires_grad_(self.requires_grad)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a tensor of a pretended device is not pickled")

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def get_device(self) -> int:
        return self.index

    def cuda(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.to(self.device)

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor "
            "to host memory first."
        )

    def pin_memory(self, *args: Any) -> Tensor:
        raise RuntimeError("only dense CPU tensors can be pinned")

    def is_pinned(self, *args: Any) -> bool:
        return False

    def record_stream(self, stream: Any) -> None:
        device = running()
        with device.clocks.lock:
            device.clocks.block(self.untyped_storage()).recorded.add(stream.name)


class DeviceMode(TorchDispatchMode):
    """Brings every operator to `dispatch`, also those that meet no CudaTensor."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return dispatch(func, args, dict(kwargs or {}))


_running: list["PretendedDevice"] = []


def running() -> "PretendedDevice":
    """The device that is pretended now, or was last."""
    return _running[-1]


def run(device: "PretendedDevice") -> None:
    """Make it the one that is pretended."""
    _running[:] = [device]


def allow_autograd() -> None:
    """Autograd asks for the guard of a tensor's device, which switches between devices and streams.

    There is nothing to switch: the CPU's guard, which does nothing, serves. The table of guards is
    an exported symbol of libc10.
    """
    file = next((Path(torch.__file__).parent / "lib").glob("libc10.*"))  # .so, .dylib
    library = ctypes.CDLL(str(file))
    name = "_ZN3c104impl26device_guard_impl_registryE"
    guards = (ctypes.c_void_p * 16).in_dll(library, name)
    guards[9] = guards[0]  # c10::DeviceType: CPU is 0, XLA is 9


def inside(device: Any) -> Any:
    """A device as C++ is to see it: cuda is the current device, if it says no number."""
    if isinstance(device, str | torch.device) and torch.device(device).type == "cuda":
        index = torch.device(device).index
        return torch.device(_INSIDE, torch.cuda.current_device() if index is None else index)
    return device


_INDEXING = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
    aten._unsafe_index_put.default,
}
"""Take indices on the CPU, which are copied."""
_INDICES = (torch.int64, torch.int32, torch.bool, torch.uint8)
_COPIES = {aten._to_copy.default, aten.copy_.default}
_SCALARS = {
    *(*_INDEXING, *_COPIES, aten.fill_.Tensor, aten.fill.Tensor),
    *(aten.masked_fill_.Tensor, aten.masked_fill.Tensor),
}
"""Take 0-d CPU tensors, as every operator does that works element by element."""
_ALLOCATIONS = {
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
}
"""Run no kernel."""
_NAMES_THAT_WAIT = (
    *("nonzero", "masked_select", "_unique2", "unique_consecutive", "unique_dim", "bincount"),
    *("repeat_interleave", "equal", "is_nonzero"),
)
"""Operators whose result's shape, or a decision, the host has to know."""


def dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run one operator, on the pretended device if it is for that."""
    tensors = [t for t in _leaves((args, *kwargs.values())) if isinstance(t, Tensor)]
    there = [t for t in tensors if isinstance(t, CudaTensor)]
    index = there[0].index if there else _wanted_index(kwargs)
    if index is None:
        out = func(*args, **_without_pin(kwargs))
        _note_host(func, args, kwargs, out)
        return out
    if there and func not in _COPIES:
        _refuse_mixed(func, tensors, index)
    line, device = source_line(), running()
    inner_args = _unwrapped(args)
    inner_kwargs = {name: _unwrapped(v) for name, v in _without_pin(kwargs).items()}
    if _wanted_index(kwargs) is not None:
        inner_kwargs["device"] = device.inner
    to = _target(func, args, kwargs, index)
    with device.clocks.lock:
        out = _kernel(func)(*inner_args, **inner_kwargs)
        _note(func, args, kwargs, inner_args, inner_kwargs, out, index, line)
    if to is None:
        return args[0] if func is aten.copy_.default else out
    if not isinstance(out, Tensor | tuple | list):
        return out
    wrapped = _wrapped(out, to)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if there else wrapped


def _wanted_index(kwargs: Mapping[str, Any]) -> int | None:
    """The device that is asked for, if it is a pretended one."""
    wanted = inside(kwargs.get("device"))
    is_there = isinstance(wanted, torch.device) and wanted.type == _INSIDE
    return int(wanted.index or 0) if is_there else None


def _target(func: Any, args: Any, kwargs: Mapping[str, Any], index: int) -> int | None:
    """The device of the result; None: none that is pretended."""
    if func is aten.copy_.default:
        return args[0].index if isinstance(args[0], CudaTensor) else None
    return index if kwargs.get("device") is None else _wanted_index(kwargs)


def _leaves(values: Any) -> Iterator[Any]:
    """What is in lists and tuples, which operators take and give."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from _leaves(value)
        else:
            yield value


def _unwrapped(x: Any) -> Any:
    if isinstance(x, CudaTensor):
        return x.inner
    return type(x)(map(_unwrapped, x)) if type(x) in (list, tuple) else x


def _wrapped(x: Any, index: int) -> Any:
    if isinstance(x, list | tuple):
        return type(x)(_wrapped(item, index) for item in x)
    return CudaTensor(x, index) if isinstance(x, Tensor) else x


def _without_pin(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """CPU-only torch cannot pin: that it was asked is noted only."""
    return {**kwargs, "pin_memory": None} if kwargs.get("pin_memory") else dict(kwargs)


def _refuse_mixed(func: Any, tensors: list[Tensor], index: int) -> None:
    """MixedDevices for a tensor that CUDA would not take on device `index`."""
    takes_scalars = func in _SCALARS or torch.Tag.pointwise in func.tags

    def is_taken(t: Tensor) -> bool:
        if isinstance(t, CudaTensor):
            return t.index == index
        return (takes_scalars and t.dim() == 0) or (func in _INDEXING and t.dtype in _INDICES)

    wrong = [t for t in tensors if not is_taken(t)]
    if wrong:
        found = ", ".join(f"{t.device} {tuple(t.shape)}" for t in wrong)
        raise MixedDevices(f"{func} on cuda:{index} met {found} at {source_line()}")


@lru_cache(maxsize=4096)
def _arguments(func: Any) -> list[tuple[str, bool]]:
    """Name of each argument, and whether it is written to."""
    return [
        (a.name, a.alias_info is not None and a.alias_info.is_write) for a in func._schema.arguments
    ]


def _touched(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Iterator[tuple[Tensor, bool]]:
    """The CPU tensors of a call, and whether it writes them."""
    for place, (name, is_written) in enumerate(_arguments(func)):
        value = args[place] if place < len(args) else kwargs.get(name)
        for t in _leaves((value,)):
            is_plain = type(t) is Tensor or type(t) is torch.nn.Parameter
            if is_plain and t.layout == torch.strided and t.device.type == "cpu":
                yield t, is_written


@lru_cache(maxsize=4096)
def _is_view(func: Any) -> bool:
    returned = func._schema.returns
    return any(r.alias_info is not None and not r.alias_info.is_write for r in returned)


def _note_host(func: Any, args: Any, kwargs: Mapping[str, Any], out: Any) -> None:
    """The host touches memory that a copy may still be under way to or from."""
    device = running()
    if kwargs.get("pin_memory") and isinstance(out, Tensor):
        with device.clocks.lock:
            device.clocks.block(out.untyped_storage()).is_pinned = True
        return
    if _is_view(func):
        return
    reads, writes = [], []
    for t, is_written in _touched(func, args, kwargs):
        block = device.clocks.find_block(t.untyped_storage())
        if block is not None:
            (writes if is_written else reads).append(block)
    if reads or writes:
        with device.clocks.lock:
            device.clocks.access(HOST, str(func), reads=reads, writes=writes)


def _note(
    func: Any,
    args: Any,
    kwargs: Mapping[str, Any],
    inner_args: Any,
    inner_kwargs: Mapping[str, Any],
    out: Any,
    index: int,
    line: str,
) -> None:
    """What a stream did: launches, accesses, copies, waits."""
    if _is_view(func) or not func.name().startswith(("aten::", "fbgemm::")):
        return
    device = running()
    clocks, stream = device.clocks, device.current_stream(index).name

    def block_of(t: Tensor) -> Block:
        return clocks.block(t.untyped_storage())

    made = [t for t in _leaves((out,)) if isinstance(t, Tensor)]
    if func in _ALLOCATIONS:
        for t in made:
            clocks.allocated(block_of(t), stream, t.untyped_storage().nbytes())
        return
    reads: dict[int, Block] = {}
    writes: dict[int, Block] = {}
    for t, is_written in _touched(func, inner_args, inner_kwargs):
        block = block_of(t)
        (writes if is_written else reads)[id(block)] = block
    clocks.launch(stream, line)
    device.counts.devices[index] += 1
    is_copy = func in _COPIES and _crosses(func, args, kwargs)
    to_host = is_copy and _target(func, args, kwargs, 0) is None
    for t in made:
        block = block_of(t)
        if id(block) not in reads and id(block) not in writes:
            if not to_host:
                clocks.allocated(block, stream, t.untyped_storage().nbytes())
            writes[id(block)] = block
    clocks.access(stream, str(func), reads=reads.values(), writes=writes.values(), line=line)
    why = _why_it_waits(func, args)
    if is_copy:
        why = _note_copy(func, args, kwargs, out, to_host, line)
    for t in _leaves(args) if func in _INDEXING else ():
        if isinstance(t, Tensor) and not isinstance(t, CudaTensor) and t.dim():
            device.counts.copies["index to device, pageable", line] += 1
            why = "index on the CPU"
    if why:
        clocks.wait(clocks.known(stream), why, line)


def _crosses(func: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether it copies between the host and a device."""
    source = args[1] if func is aten.copy_.default else args[0]
    return isinstance(source, CudaTensor) == (_target(func, args, kwargs, 0) is None)


def _note_copy(
    func: Any, args: Any, kwargs: Mapping[str, Any], out: Tensor, to_host: bool, line: str
) -> str | None:
    """Count a copy between host and device; why the host waits for it, if it does."""
    device = running()
    in_place = func is aten.copy_.default
    asks = bool(kwargs.get("non_blocking") or (in_place and len(args) > 2 and args[2]))
    if to_host:
        end = device.clocks.block(_unwrapped(args[0] if in_place else out).untyped_storage())
        # torch takes pinned memory itself for what comes to the host without waiting.
        end.is_pinned = end.is_pinned or (asks and not in_place)
    else:
        end = device.clocks.block(_unwrapped(args[1] if in_place else args[0]).untyped_storage())
    way = "to host" if to_host else "to device"
    waits = not (asks and end.is_pinned)
    kind = f"{way}{'' if end.is_pinned else ', pageable'}{', waits' if waits else ''}"
    device.counts.copies[kind, line] += 1
    return f"copy {way}" if waits else None


def _why_it_waits(func: Any, args: Any) -> str | None:
    if func is aten._local_scalar_dense.default:
        return "item"
    name = func._schema.name.removeprefix("aten::")
    if name in _NAMES_THAT_WAIT:
        return name
    if func in _INDEXING:
        masks = (torch.bool, torch.uint8)
        indices = [t for t in args[1] if isinstance(t, CudaTensor)]
        return "mask as index" if any(t.dtype in masks for t in indices) else None
    return None


def _kernel(func: Any) -> Callable[..., Any]:
    return _scaled_mm if func is aten._scaled_mm.default else func


def _scaled_mm(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None = None,
    scale_result: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
) -> Tensor:
    """Products of float8 with a scale a row and a column, in float32; refuses what CUDA refuses."""
    (rows, size), columns = a.shape, b.shape[1]
    if not a.is_contiguous() or not b.t().is_contiguous():
        raise RuntimeError("_scaled_mm: wanted the first operand in rows, the second in columns")
    if size % 16 or columns % 16:
        raise RuntimeError(f"_scaled_mm: sizes {size} and {columns} are no multiples of 16")
    if scale_a.shape != (rows, 1) or scale_b.shape != (1, columns):
        raise RuntimeError("_scaled_mm: wanted a scale a row and a scale a column")
    if not (scale_a.is_contiguous() and scale_b.is_contiguous()) or out_dtype != torch.bfloat16:
        raise RuntimeError("_scaled_mm: wanted contiguous scales and bfloat16 results")
    product = (a.float() @ b.float()) * scale_a * scale_b
    return (product if bias is None else product + bias.float()).to(out_dtype)
