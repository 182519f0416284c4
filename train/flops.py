"""FLOPs of a training step, counted from the step itself: at the first one, and where the work of
a step changes (the number of candidates may follow a schedule). Used by loop.py for its log.

2 per multiply-add, products only, backward as it runs; of best-of-many, the selection too.
"""

import torch
from torch.utils.flop_counter import FlopCounterMode

from .data import Batch
from .logs import Meter
from .stage import Stage

COUNTED_SAMPLES = 2
"""Samples of the pass that is counted: FLOPs grow in proportion, and BatchNorm needs two."""


def flops_per_sample(stage: Stage, batch: Batch, *, step: int, device: torch.device) -> float:
    """FLOPs that one sample of a step takes, forward and backward.

    The pass runs on a second model of zeros, so that neither weights, gradients, running
    statistics nor a compiled or distributed wrapper see it; no random state is drawn from.
    """
    with torch.device("meta"):
        twin = type(stage.model)(stage.model.config)
    twin = twin.to_empty(device=device).train()
    with torch.no_grad():
        for tensor in twin.state_dict().values():
            tensor.zero_()
    count = min(COUNTED_SAMPLES, len(batch.samples))
    meter = Meter(stage.unit, device)
    meter.is_counting = True
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        losses, _ = stage.losses(twin, batch, slice(0, count), step=step, meter=meter)
        losses.sum().backward()  # type: ignore[no-untyped-call]
    total: int = counter.get_total_flops()
    return total / count
