"""Would int8 make the search for the best candidate faster on a CPU? One product of its MLP.

    python tests/experiments/int8_products.py

1,792 queries of 768 channels times 768 x 3,072 weights (7 positions, 256 candidates, the released
size) in float32, bfloat16 and int8: the bare product, and with what makes int8 of the activations
and floats of the sums. Prints medians of 15 in milliseconds of CPU time on one thread, and relative
errors.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

QUERIES, CHANNELS, HIDDEN = 1792, 768, 3072


def main() -> None:
    """Runs the experiment."""
    torch.set_num_threads(1)
    x, weight = torch.randn(QUERIES, CHANNELS), torch.randn(CHANNELS, HIDDEN)
    low_x, low_weight = x.bfloat16(), weight.bfloat16()
    codes, scale = quantise(x, dim=1)
    weight_codes, weight_scale = quantise(weight, dim=0)

    def whole() -> Tensor:
        codes, scale = quantise(x, dim=1)
        return torch._int_mm(codes, weight_codes).float() * scale * weight_scale

    runs: dict[str, Callable[[], Tensor]] = {
        "float32": lambda: x @ weight,
        "bfloat16": lambda: low_x @ low_weight,
        "int8, the product alone": lambda: torch._int_mm(codes, weight_codes),
        "int8, activations and sums converted": whole,
    }
    exact = runs["float32"]()
    for name, run in runs.items():
        result = run().float()
        if "alone" in name:
            result = result * scale * weight_scale
        error = float((result - exact).norm() / exact.norm())
        print(f"{name}: {1000 * statistics.median(map(seconds, [run] * 15)):.1f} ms, {error:.2%}")


def quantise(values: Tensor, *, dim: int) -> tuple[Tensor, Tensor]:
    """int8 codes and the float32 scale of every row (dim 1) or column (dim 0)."""
    scale = values.abs().amax(dim, keepdim=True) / 127
    return (values / scale).round().to(torch.int8), scale


def seconds(run: Callable[[], Tensor]) -> float:
    """CPU time of one call: what others on the machine do changes it less."""
    start = time.process_time()
    run()
    return time.process_time() - start


if __name__ == "__main__":
    main()
