"""Which actor makes which shard: what waits, who holds what, and who died over what. Bookkeeping
alone; driver.py asks it."""

from collections import Counter, deque
from collections.abc import Iterable

MAX_DEATHS = 4
"""Actors that may die over a shard; and, for each place, in a row without an answer (a guess)."""

ALONE_AFTER = 2
"""With so many deaths a shard is given to an actor that holds nothing else, so that it is certain
which of an actor's shards it dies of."""


class Assignment:
    """Shards by number, actors by any number that is used once."""

    def __init__(self) -> None:
        self._waiting: deque[int] = deque()
        self._held: dict[int, list[int]] = {}
        self._deaths: Counter[int] = Counter()
        self._num_silent_deaths = 0

    def add(self, shards: Iterable[int]) -> None:
        """More to make, in this order."""
        self._waiting.extend(shards)

    @property
    def is_finished(self) -> bool:
        """Whether every shard is done."""
        return not self._waiting and not any(self._held.values())

    def give(self, actor: int, *, limit: int) -> list[int]:
        """What `actor`, which has answered, is to make beside what it holds, up to `limit`."""
        self._num_silent_deaths = 0
        held = self._held.setdefault(actor, [])
        given: list[int] = []
        while self._waiting and len(held) < limit:
            suspects = [shard for shard in (*held[:1], self._waiting[0]) if self._is_suspect(shard)]
            if held and suspects:
                break
            given.append(self._waiting.popleft())
            held.append(given[-1])
        return given

    def note_done(self, actor: int, shard: int) -> None:
        """`actor` has made it."""
        self._held[actor].remove(shard)

    def lose(self, actor: int) -> int | None:
        """The actor is dead: what it held waits again, before all else. Gives the shard over which
        MAX_DEATHS actors died, if that is so."""
        lost = self._held.pop(actor, [])
        self._waiting.extendleft(reversed(lost))
        self._deaths.update(lost)
        self._num_silent_deaths += 1
        return next((shard for shard in lost if self._deaths[shard] >= MAX_DEATHS), None)

    def is_hopeless(self, num_places: int) -> bool:
        """Whether so many actors died one after the other, without an answer from any, that a shard
        is hardly the cause. num_places: actors at a time."""
        return self._num_silent_deaths >= MAX_DEATHS * num_places

    def _is_suspect(self, shard: int) -> bool:
        return self._deaths[shard] >= ALONE_AFTER
