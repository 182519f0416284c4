"""The Ray part of `--engine ray`: actors that run a job, each until it is lost and then replaced.

    check: room for the actors, one folder for all nodes --> a ShardServer a device
    open: until the first has begun the cache  make: shards out, done-records back  close

Frames never travel through Ray: an actor decodes, computes and writes on its own machine. Ray
restarts nothing: calls to an actor that is being restarted fail at once instead of waiting.
"""

import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Self

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ...shards.errors import DeltatokError, UsageError
from ...shards.files import make_folder, partial_path, remove
from ...shards.records import DoneRecord
from ...shards.running.interrupts import StopRequest
from .assignment import MAX_DEATHS, Assignment
from .options import FleetOptions, Share
from .shard_server import Job, Opened, Report, ShardServer, not_shared, sees

TICK_S = 1.0
"""How often a stop is looked for."""

CONNECT_S = 10.0
"""For a cluster to answer at its address; Ray itself waits for minutes (a guess)."""

CLOSE_S = 60.0
"""For an actor to finish what it is writing (a guess)."""

REASON_LENGTH = 300
"""Of what Ray says of a death, in characters: the beginning tells what, the rest where to look."""

OBJECT_STORE_BYTES = 80 * 2**20
"""Of Ray on this machine alone: only shard numbers and done-records go through it."""

_LOGGER = logging.getLogger(__name__)


@contextmanager
def connected(options: FleetOptions) -> Iterator[None]:
    """Within, Ray is there. UsageError for an address without a cluster."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = options.ray_address
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    _check_answers(os.environ.get("RAY_ADDRESS") if address in (None, "auto") else address)
    try:
        try:
            ray.init(address=address or os.environ.get("RAY_ADDRESS") or "auto", **quiet)
        except ConnectionError:
            if address is not None:
                raise
            ray.init(
                address="local",
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                **quiet,
            )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"ray_address: no cluster answers at {address} ({error}): start one with `ray start "
            "--head`, or leave --ray-address out to use this machine alone"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_answers(address: str | None) -> None:
    """UsageError unless somebody listens at HOST:PORT; other kinds of addresses are Ray's to
    judge."""
    host, colon, port = (address or "").rpartition(":")
    if not colon or not port.isdecimal() or "/" in host:
        return
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise UsageError(
            f"ray_address: no cluster answers at {address} ({error}): start one with `ray start "
            f"--head --port {port}` there"
        ) from error


def node_resources() -> list[dict[str, Any]]:
    """What each living node has: Ray's `Resources`, and its `NodeID` and `NodeManagerHostname`."""
    keys = ("NodeID", "NodeManagerHostname")
    return [
        {**node["Resources"], **{key: node[key] for key in keys}}
        for node in ray.nodes()
        if node["Alive"]
    ]


@dataclass(kw_only=True)
class _Actor:
    number: int
    handle: Any
    limit: int = 0
    mark: str = ""
    seconds: Mapping[str, float]


class Fleet:
    """Actors that make shards of one job; a context manager, which ends them. Ray is there."""

    def __init__(
        self, job: Job, out: Path, share: Share, nodes: Sequence[Mapping[str, Any]]
    ) -> None:
        """out: the cache's folder. UsageError unless all nodes that take actors see it."""
        self._job, self._out, self._share = job, make_folder(out, flag="--out"), share
        self._assignment = Assignment()
        self._shards: Mapping[int, Sequence[Any]] = {}
        self._numbers = count()
        self._calls: dict[Any, _Actor] = {}
        """The call that each actor is at."""
        self._ready: list[_Actor] = []
        self._probe = partial_path(out / "probe")
        self._probe.touch()
        try:
            _check_shared(self._probe, [node for node in nodes if share.fits(node)])
        except BaseException:
            self._probe.unlink(missing_ok=True)
            raise

    def __enter__(self) -> Self:
        for _ in range(self._share.actors):
            self._start()
        return self

    def __exit__(self, *error: object) -> None:
        actors = [*self._calls.values(), *self._ready]
        closing = [actor.handle.close.remote() for actor in actors if actor.limit]
        if closing:
            ray.wait(closing, num_returns=len(closing), timeout=CLOSE_S)
        for actor in actors:
            self._end(actor)
        self._probe.unlink(missing_ok=True)

    def open(self, stop: StopRequest) -> None:
        """Waits until an actor has begun the cache."""
        while not self._ready:
            stop.check()
            for actor, _ in self._answers():
                self._ready.append(actor)

    def make(
        self,
        shards: Mapping[int, Sequence[Any]],
        stop: StopRequest,
        *,
        when_done: Callable[[DoneRecord], None],
        when_spent: Callable[[str, float], None],
        when_actors: Callable[[int], None],
    ) -> None:
        """Makes the shards, number -> items. when_done: told of each. when_spent: told of seconds
        that an actor spent at a stage. when_actors: told how many are at work.

        Raises DeltatokError as the job does, and where actors keep dying.
        """
        self._shards = shards
        self._assignment.add(shards)
        while self._ready:
            self._give(self._ready.pop())
        while not self._assignment.is_finished:
            stop.check()
            for actor, report in self._answers():
                if report is not None:
                    for record in report.done:
                        self._assignment.note_done(actor.number, record.shard)
                        when_done(record)
                    for stage, spent_s in report.seconds.items():
                        when_spent(stage, spent_s - actor.seconds.get(stage, 0.0))
                    actor.seconds = report.seconds
                self._give(actor)
            when_actors(sum(actor.limit > 0 for actor in self._calls.values()))

    def _start(self) -> None:
        actor_class: Any = ray.remote(ShardServer)
        handle = actor_class.options(
            num_gpus=self._share.gpus,
            num_cpus=self._share.cpus,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy="SPREAD",
        ).remote(self._job)
        actor = _Actor(number=next(self._numbers), handle=handle, seconds={})
        self._calls[handle.open.remote(str(Path.cwd()), self._probe)] = actor

    def _give(self, actor: _Actor) -> None:
        given = self._assignment.give(actor.number, limit=actor.limit)
        shards = [(shard, self._shards[shard]) for shard in given]
        self._calls[actor.handle.work.remote(shards)] = actor

    def _answers(self) -> Iterator[tuple[_Actor, Report | None]]:
        """Actors that have answered, within TICK_S; None: it is ready now. Replaces the lost."""
        answered, _ = ray.wait(list(self._calls), timeout=TICK_S)
        for call in answered:
            actor = self._calls.pop(call)
            try:
                answer: Opened | Report = ray.get(call)
            except RayTaskError:  # an error in our own code
                raise
            except RayError as error:
                self._replace(actor, error)
                continue
            if answer.error is not None:
                raise answer.error
            if isinstance(answer, Opened):
                actor.limit, actor.mark = answer.limit, answer.mark
                yield actor, None
            else:
                yield actor, answer

    def _replace(self, actor: _Actor, error: RayError) -> None:
        reason = " ".join(str(error).split())[:REASON_LENGTH]
        _LOGGER.warning("lost actor %d: %s", actor.number, reason)
        self._end(actor)
        shard = self._assignment.lose(actor.number)
        if shard is not None:
            clips = ", ".join(self._job.clip_keys(self._shards[shard]))
            raise DeltatokError(
                f"shard {shard:06d}: {MAX_DEATHS} actors died while they made it, the last so: "
                f"{reason}: leave out what they die of, or make it on its own without --engine ray "
                f"to see it; its clips: {clips}"
            ) from error
        if self._assignment.is_hopeless(self._share.actors):
            raise DeltatokError(
                f"actors keep dying before they have made anything, the last so: {reason}: see "
                "Ray's logs on its machine (/tmp/ray/session_latest/logs)"
            ) from error
        self._start()

    def _end(self, actor: _Actor) -> None:
        """Kills it, if it lives, and removes what it had begun to write."""
        ray.kill(actor.handle)
        if actor.mark:
            for folder in (self._out, self._out / "shards"):
                for path in folder.glob(f"*{actor.mark}*"):
                    remove(path)


def _check_shared(probe: Path, nodes: Sequence[Mapping[str, Any]]) -> None:
    """UsageError, naming them, for nodes that do not see the file `probe`."""
    look: Any = ray.remote(sees)
    looks = {
        look.options(
            num_cpus=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
        ).remote(probe): str(node["NodeManagerHostname"])
        for node in nodes
    }
    blind = []
    for call, name in looks.items():
        try:
            if not ray.get(call):
                blind.append(name)
        except RayTaskError as error:
            raise UsageError(
                f"{name} cannot run deltatok ({error.cause}): install the same version on all nodes"
            ) from error
        except RayError:  # it has gone meanwhile
            _LOGGER.warning("%s: has left the cluster", name)
    if blind:
        raise not_shared(probe.parent, blind)
