"""A small next-token model on delta tokens, in plain torch: a start for a model of one's own.

    python train_your_own.py cache/deltas --steps 2000 --batch 256 --out model.pt

Given the delta tokens up to a frame and the time of the next one, predict the next delta token.
Prints the loss on clips that were held out, beside that of always predicting the mean.
"""

import argparse
import hashlib
from pathlib import Path

import numpy as np
import torch
from deltas_numpy import map_blocks, read_windows
from torch import Tensor, nn


def load(cache: str) -> tuple[Tensor, Tensor, np.ndarray]:
    """All tokens float32 (W, T, D), seconds (W, T), and whether the clip is held out, bool (W,)."""
    tars = sorted(Path(cache, "shards").glob("*.tar"))
    tokens = [block for tar in tars for block in map_blocks(tar, "tokens.npy")]
    seconds = [block for tar in tars for block in map_blocks(tar, "timestamps.npy")]
    clips = [window["clip"] for tar in tars for window in read_windows(tar)]
    # A fifth of the clips, not of the windows: those of one clip are alike.
    held_out = [hashlib.sha256(clip.encode()).digest()[0] % 5 == 0 for clip in clips]
    return (
        torch.from_numpy(np.concatenate(tokens)).float(),
        torch.from_numpy(np.concatenate(seconds)),
        np.array(held_out),
    )


class NextToken(nn.Module):
    """tokens (B, T, D), seconds (B, T) -> the predicted tokens 1..T-1, (B, T - 1, D)."""

    def __init__(self, channels: int, *, width: int = 256, layers: int = 2) -> None:
        super().__init__()
        self.into = nn.Linear(channels + 1, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.out = nn.Linear(width, channels)

    def forward(self, tokens: Tensor, seconds: Tensor) -> Tensor:
        gaps = seconds.diff(dim=1)[..., None]  # to the frame that is to be predicted
        seen = self.into(torch.cat([tokens[:, :-1], gaps], dim=-1))
        mask = nn.Transformer.generate_square_subsequent_mask(seen.shape[1], device=seen.device)
        return self.out(self.blocks(seen, mask=mask, is_causal=True))


def main() -> None:
    """Train, then print the loss on held-out clips."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cache")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--out", default="model.pt")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens, seconds, held_out = load(arguments.cache)
    train, test = np.flatnonzero(~held_out), np.flatnonzero(held_out)
    if not len(train) or not len(test):
        raise SystemExit("too few clips to hold some out")
    mean, std = tokens[train].mean(dim=(0, 1)), tokens[train].std(dim=(0, 1)) + 1e-6
    tokens = (tokens - mean) / std  # channels differ by orders of magnitude
    model = NextToken(tokens.shape[-1]).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def loss_of(windows: np.ndarray) -> Tensor:
        batch, times = tokens[windows].to(device), seconds[windows].to(device)
        return nn.functional.smooth_l1_loss(model(batch, times), batch[:, 1:])

    for step in range(arguments.steps):
        windows = np.random.default_rng((0, step)).choice(train, arguments.batch)
        optimizer.zero_grad()
        loss = loss_of(windows)
        loss.backward()
        optimizer.step()
        if step % max(1, arguments.steps // 10) == 0:
            print(f"step {step}: training loss {loss.item():.4f}")
    with torch.no_grad():
        test = test[:4096]
        held, trivial = (
            loss_of(test),
            nn.functional.smooth_l1_loss(
                torch.zeros_like(tokens[test][:, 1:]), tokens[test][:, 1:]
            ),
        )
    print(f"held-out loss {held.item():.4f}, of the mean {trivial.item():.4f}")
    torch.save({"model": model.state_dict(), "mean": mean, "std": std}, arguments.out)


if __name__ == "__main__":
    main()
