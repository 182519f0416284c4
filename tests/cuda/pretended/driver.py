"""`pretend_cuda`: what torch.cuda, torch.Tensor and threads are while a device is pretended."""

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .clocks import HOST, Clocks, Event, Stream
from .counts import Counts
from .tensors import CudaTensor, DeviceMode, allow_autograd, inside, run, running

aten = torch.ops.aten


class PretendedDevice:
    """The devices of one `pretend_cuda`: their streams, and what has been found."""

    def __init__(
        self,
        *,
        num_devices: int,
        capability: tuple[int, int],
        total_bytes: int,
        has_numbers: bool,
    ) -> None:
        self.inner = torch.device("cpu" if has_numbers else "meta")
        """Where its tensors really lie."""
        self.counts = Counts()
        self.clocks = Clocks(self.counts)
        self.num_devices, self.capability, self.total_bytes = num_devices, capability, total_bytes
        self.current = 0
        """Number of the device that "cuda" means."""
        self._defaults = [
            Stream(self.clocks, torch.device("cuda", index), f"cuda:{index}")
            for index in range(num_devices)
        ]
        self._chosen = threading.local()
        self.numbers = itertools.count(1)
        """Of new streams."""

    @property
    def problems(self) -> list[str]:
        """Races and blocks freed too early."""
        return self.clocks.problems

    def index_of(self, device: Any = None) -> int:
        """Number of a device; None: of the current one."""
        if device is None:
            return self.current
        if isinstance(device, int):
            return device
        index = torch.device(device).index
        return self.current if index is None else int(index)

    def current_stream(self, device: Any = None) -> Stream:
        """This thread's stream of a device."""
        index = self.index_of(device)
        chosen: Stream = getattr(self._chosen, f"of_{index}", self._defaults[index])
        return chosen

    @contextmanager
    def on_stream(self, stream: Stream | None) -> Iterator[None]:
        """torch.cuda.stream(stream)."""
        if stream is None:
            yield
            return
        before = self.current_stream(stream.device)
        setattr(self._chosen, f"of_{stream.device.index}", stream)
        try:
            yield
        finally:
            setattr(self._chosen, f"of_{stream.device.index}", before)

    @contextmanager
    def on_device(self, device: Any) -> Iterator[None]:
        """torch.cuda.device(device)."""
        before, self.current = self.current, self.index_of(device)
        try:
            yield
        finally:
            self.current = before

    def set_device(self, device: Any) -> None:
        """torch.cuda.set_device."""
        self.current = self.index_of(device)

    def synchronize(self, device: Any = None) -> None:
        """torch.cuda.synchronize: the host waits for all streams."""
        with self.clocks.lock:
            everything: dict[str, int] = {}
            for times in list(self.clocks._known.values()):
                for agent, tick in times.items():
                    everything[agent] = max(tick, everything.get(agent, 0))
            self.clocks.wait(everything, "synchronize")

    def properties(self, device: Any = None) -> SimpleNamespace:
        """torch.cuda.get_device_properties."""
        major, minor = self.capability
        return SimpleNamespace(
            name="pretended", total_memory=self.total_bytes, major=major, minor=minor
        )


class _NewStream(Stream):
    """torch.cuda.Stream: a class, since modules that are imported meanwhile annotate with it."""

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        there = running()
        index = there.index_of(device)
        name = f"stream {next(there.numbers)} of cuda:{index}"
        super().__init__(there.clocks, torch.device("cuda", index), name)


class _NewEvent(Event):
    """torch.cuda.Event."""

    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        super().__init__(running().clocks)


@contextmanager
def pretend_cuda(
    *,
    num_devices: int = 1,
    capability: tuple[int, int] = (9, 0),
    total_bytes: int = 80 * 10**9,
    has_numbers: bool = True,
) -> Iterator[PretendedDevice]:
    """torch.cuda is available inside. Look at `problems` and `counts` of what it gives.

    has_numbers false: tensors have shapes only, so that models of any size can be counted; nothing
    can be copied to the host.
    Not for a torch that has CUDA. Two of them are not on at the same time.
    """
    if torch.version.cuda is not None:
        raise AssertionError("a device is pretended for a torch without CUDA only")
    device = PretendedDevice(
        num_devices=num_devices,
        capability=capability,
        total_bytes=total_bytes,
        has_numbers=has_numbers,
    )
    allow_autograd()
    with ExitStack() as stack:
        for place, name, value in _replacements(device):
            stack.enter_context(mock.patch.object(place, name, value))
        stack.enter_context(_swapping_parameters())
        # A backward pass in the caller's thread: else in one that C++ keeps for a GPU it has seen.
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        run(device)
        stack.enter_context(FunctionMode())
        stack.enter_context(DeviceMode())
        yield device


def _replacements(device: PretendedDevice) -> Iterator[tuple[Any, str, Any]]:
    """(object, attribute, what it is meanwhile)."""
    state = torch.zeros(16, dtype=torch.uint8)
    of_cuda: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "device_count": lambda: device.num_devices,
        "current_device": lambda: device.current,
        "set_device": device.set_device,
        "device": device.on_device,
        "Stream": _NewStream,
        "Event": _NewEvent,
        "stream": device.on_stream,
        "current_stream": device.current_stream,
        "default_stream": lambda d=None: device._defaults[device.index_of(d)],
        "synchronize": device.synchronize,
        "get_device_capability": lambda d=None: device.capability,
        "get_device_name": lambda d=None: "pretended",
        "get_device_properties": device.properties,
        "is_bf16_supported": lambda including_emulation=True: True,
        "mem_get_info": lambda d=None: (device.total_bytes, device.total_bytes),
        "max_memory_allocated": lambda d=None: device.clocks.peak_bytes,
        "memory_allocated": lambda d=None: device.clocks.live_bytes,
        "reset_peak_memory_stats": lambda d=None: None,
        "empty_cache": lambda: None,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda d=None: state,
        "set_rng_state": lambda s, d=None: None,
    }
    for name, value in of_cuda.items():
        yield torch.cuda, name, value
    yield threading.Thread, "run", _run_thread
    # Tensors made in inference mode cannot be wrapped; without gradient the numbers are the same.
    yield torch.inference_mode, "__enter__", _enter_inference
    yield torch.inference_mode, "__exit__", _exit_inference
    yield torch.nn.utils.clip_grad, "_has_foreach_support", _has_foreach_support


@contextmanager
def _swapping_parameters() -> Iterator[None]:
    """module.to(device) leaves its parameters the objects they are, as on CUDA; torch.tensor(...,
    device) is two operators, as there."""
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    lifts = torch._C._only_lift_cpu_tensors()
    torch.__future__.set_swap_module_params_on_conversion(True)
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swaps)
        torch._C._set_only_lift_cpu_tensors(lifts)


class FunctionMode(TorchFunctionMode):
    """What of torch's functions is another one on a pretended device. A mode and no patch: torch
    and its users keep tables of functions, made once."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _FUNCTIONS:
            return _FUNCTIONS[func](*args, **kwargs)
        if kwargs.get("device") is not None:
            kwargs["device"] = _numbered(kwargs["device"])
        return func(*args, **kwargs)


def _numbered(device: Any) -> Any:
    """cuda:N for cuda: C++ would ask the guard of CUDA for the number."""
    there = inside(device)
    return torch.device("cuda", there.index) if there is not device else device


def _to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return self.to(*map(inside, args), **{name: inside(v) for name, v in kwargs.items()})


def _cuda(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return _to(self, "cuda")


def _numpy(self: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The host looks at this memory, or is about to write to it."""
    _host_touches(self, "numpy")
    return self.numpy(*args, **kwargs)


def _host_touches(tensor: Tensor, what: str) -> None:
    clocks = running().clocks
    block = clocks.find_block(tensor.untyped_storage())
    if block is not None:
        with clocks.lock:
            clocks.access(HOST, what, reads=[block])


def _pin_memory(self: Tensor, *args: Any) -> Tensor:
    _host_touches(self, "pin_memory")
    pinned = torch.empty_like(self, pin_memory=True)
    return pinned.copy_(self)


def _is_pinned(self: Tensor, *args: Any) -> bool:
    block = running().clocks.find_block(self.untyped_storage())
    return block is not None and block.is_pinned


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """One kernel, as on CUDA, and the CPU's own: C++ would choose products and a softmax."""
    shapes_fit = query.dim() == 4 and query.shape[:2] == key.shape[:2]
    if not isinstance(query, CudaTensor) or dropout_p or enable_gqa or not shapes_fit:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        query, key, value = (t.to(dtype) for t in (query, key, value))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        hidden = torch.zeros_like(attn_mask, dtype=query.dtype)
        attn_mask = hidden.masked_fill(~attn_mask, float("-inf"))
    out: Tensor = aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]
    return out


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    Tensor.to: _to,
    Tensor.cuda: _cuda,
    Tensor.numpy: _numpy,
    Tensor.pin_memory: _pin_memory,
    Tensor.is_pinned: _is_pinned,
    F.scaled_dot_product_attention: _attention,
}

_real_run = threading.Thread.run
_real_foreach: Callable[..., bool] = torch.nn.utils.clip_grad._has_foreach_support


def _run_thread(self: threading.Thread) -> None:
    with torch.autograd.set_multithreading_enabled(False), FunctionMode(), DeviceMode():
        _real_run(self)


def _enter_inference(self: Any) -> None:
    if self.mode:
        self._without_gradient = torch.no_grad()
        self._without_gradient.__enter__()


def _exit_inference(self: Any, *error: Any) -> None:
    if self.mode:
        self._without_gradient.__exit__(*error)


def _has_foreach_support(tensors: list[Tensor | None], device: torch.device) -> bool:
    """A gradient's norms are one launch for many parameters."""
    found = [t for t in tensors if t is not None]
    return all(isinstance(t, CudaTensor) for t in found) or _real_foreach(tensors, device)
