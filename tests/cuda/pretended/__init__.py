"""A pretended CUDA device with real numbers, for a torch without CUDA.

`with pretend_cuda() as device:` makes torch.cuda available. Tensors on it say cuda:0 and are
computed on the CPU; what CUDA would leave to chance, or make slow, is raised or counted:

    tensors.py   tensors and operators: MixedDevices where CUDA refuses
    clocks.py    streams, events, memory: races, and blocks freed while a stream may use them
    counts.py    host waits, copies and launches, by source line
    driver.py    what torch.cuda and torch.Tensor say while it is on

What it cannot see: memory that NumPy holds on to across a copy, kernels that differ from the CPU's,
more than one process, CUDA graphs, torch.compile.
"""

from .clocks import Clocks
from .counts import Counts
from .driver import PretendedDevice, pretend_cuda
from .tensors import CudaTensor, MixedDevices

__all__ = ["Clocks", "Counts", "CudaTensor", "MixedDevices", "PretendedDevice", "pretend_cuda"]
