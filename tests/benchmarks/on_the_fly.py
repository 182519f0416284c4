"""A training window as the released code makes it: nothing cached. Used by training.py.

Backbone on 8 frames and a black one, encoder on 8 pairs, the plain selection (every query rotated,
all candidates at once), the winner's forward and backward, AdamW.
"""

import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from deltatok.extract.backbone import Backbone
from deltatok.pipeline.little_world.backbone import TinyBackboneConfig, make_tiny_backbone
from deltatok.train.losses import smooth_l1
from deltatok.train.models.configs import DeltaTokConfig, DeltaWorldConfig
from deltatok.train.models.deltatok import DeltaTok
from deltatok.train.models.deltaworld import DeltaWorldNetwork

sys.path.append(str(Path(__file__).parents[1] / "train" / "selection"))
from plain_best_of_many import plain_select

NUM_FRAMES = 8


class OnTheFly:
    """Random models of the released size and random pixels."""

    def __init__(self, folder: Path, *, frame_size: int, device: torch.device) -> None:
        made = make_tiny_backbone(
            TinyBackboneConfig(
                out=str(folder / "backbone"),
                hidden_size=768,
                num_hidden_layers=12,
                num_attention_heads=12,
            )
        )
        self._device = device
        self._bfloat16 = device.type == "cuda"
        autocast = "bfloat16" if self._bfloat16 else "float32"
        self._backbone = Backbone.load(str(made), device=device, autocast=autocast)
        self._frame_size = frame_size
        generator = torch.Generator().manual_seed(0)
        self._tokenizer = DeltaTok(DeltaTokConfig(), generator=generator).to(device).eval()
        self._world = DeltaWorldNetwork(DeltaWorldConfig(), generator=generator).to(device)
        self._optimizer = torch.optim.AdamW(self._world.parameters(), lr=1e-4, fused=True)

    def seconds_per_window(self, windows: int) -> float:
        """Seconds of one step of so many windows, over their number."""
        size = self._frame_size
        pixels = torch.randint(
            0, 256, (windows, NUM_FRAMES, 3, size, size), dtype=torch.uint8, device=self._device
        )
        times = torch.arange(NUM_FRAMES, device=self._device) / 5
        self._wait()
        start = time.perf_counter()
        self._step(pixels, times.expand(windows, -1))
        self._wait()
        return (time.perf_counter() - start) / windows

    def _step(self, pixels: Tensor, times: Tensor) -> None:
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._bfloat16):
            z = self._encode(pixels)
            config = self._world.config
            noise = self._world.draw_noise(
                len(z) * (NUM_FRAMES - 1),
                config.num_samples_train,
                generator=torch.Generator(device=self._device).manual_seed(0),
            ).reshape(len(z), NUM_FRAMES - 1, config.num_samples_train, -1)
            with torch.no_grad():
                indices, _ = plain_select(self._world, z, times, noise)
            index = indices[:, :, None, None].expand(-1, -1, 1, noise.shape[-1])
            prediction = self._world(z, times, noise.gather(2, index)[:, :, 0])
            loss = smooth_l1(prediction, z[:, 1:]).mean()
        torch.autograd.backward(loss)
        self._optimizer.step()
        self._optimizer.zero_grad()

    @torch.no_grad()
    def _encode(self, pixels: Tensor) -> Tensor:
        """Delta tokens (B, 8, D), float32, of pixels (B, 8, 3, H, W)."""
        grid = self._backbone.grid(self._frame_size)
        tokens = []
        for window in pixels:
            black = torch.zeros_like(window[:1])
            x = self._backbone.tokens(torch.cat([black, window]))
            tokens.append(self._tokenizer.encode_sequence(x[1:][None], x[0], grid=grid).float())
        return torch.cat(tokens)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
