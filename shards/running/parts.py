"""Whose a shard is, where several processes make one cache: by number and the launcher's rank."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Part:
    """The shards of one process: of those whose number is `index` modulo `count`, every
    `num_ranks`-th, beginning with the `rank`-th."""

    index: int = 0
    count: int = 1
    """--shard-of index/count."""
    rank: int = 0
    num_ranks: int = 1
    """As the launcher numbers its processes."""

    @classmethod
    def of_this_process(cls, shard_of: str | None) -> "Part":
        """By `shard_of` ("i/n" or None) and the launcher's rank.

        Raises UsageError for a rank that is not below the number of processes.
        """
        index, count = parse_shard_of(shard_of)
        rank, num_ranks = _launched()
        return cls(index=index, count=count, rank=rank, num_ranks=num_ranks)

    def __contains__(self, shard: int) -> bool:
        return shard % self.count == self.index and self._rank_of(shard) == self.rank

    def elsewhere(self, shards: Sequence[int]) -> str:
        """Whose these shards are, as "rank 1 of 2, --shard-of 1/4, 3/4"."""
        makers = []
        ranks = {self._rank_of(shard) for shard in shards if shard % self.count == self.index}
        if ranks:
            makers.append(f"rank {_listed(sorted(ranks))} of {self.num_ranks}")
        parts = {shard % self.count for shard in shards} - {self.index}
        if parts:
            names = _listed([f"{part}/{self.count}" for part in sorted(parts)])
            makers.append(f"--shard-of {names}")
        return " and ".join(makers)

    def _rank_of(self, shard: int) -> int:
        return shard // self.count % self.num_ranks


def _launched() -> tuple[int, int]:
    """(rank, processes) as torchrun and accelerate, else srun, set them; (0, 1) without a launcher.

    A batch script of Slurm has its job's SLURM_NTASKS, too, but is no step of srun.
    """
    pairs = [("RANK", "WORLD_SIZE")]
    if "SLURM_STEP_ID" in os.environ or "SLURM_JOB_ID" not in os.environ:
        pairs.append(("SLURM_PROCID", "SLURM_NTASKS"))
    for names in pairs:
        texts = [os.environ.get(name, "") for name in names]
        if all(texts):
            if not all(map(str.isdecimal, texts)) or int(texts[0]) >= int(texts[1]):
                raise UsageError(
                    f"{names[0]} is {texts[0]!r} and {names[1]} {texts[1]!r} in the environment, "
                    "wanted a number and a larger one: unset both, or start with a launcher"
                )
            return int(texts[0]), int(texts[1])
    return 0, 1


def _listed(names: Sequence[object]) -> str:
    """The first few, for people."""
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(map(str, names[:8])) + more


def parse_shard_of(text: str | None) -> tuple[int, int]:
    """(i, n) of "i/n": the shards of this run are those with number % n == i; all for None.

    Raises UsageError unless 0 <= i < n.
    """
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", "0/1" if text is None else text)
    part, parts = map(int, match.groups()) if match else (0, 0)
    if part >= parts:
        raise UsageError(
            f"shard_of: got {text!r}, wanted i/n with i from 0 to n - 1, like 0/4: change it and "
            "run again"
        )
    return part, parts
