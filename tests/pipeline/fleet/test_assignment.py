"""Who makes what: every shard once, lost ones again, and an end where a shard kills whoever makes
it."""

import random

import pytest

from deltatok.pipeline.fleet.assignment import ALONE_AFTER, MAX_DEATHS, Assignment


def assignment_of(num_shards: int) -> Assignment:
    assignment = Assignment()
    assignment.add(range(num_shards))
    return assignment


def test_an_actor_holds_as_many_as_its_limit() -> None:
    assignment = assignment_of(5)
    assert assignment.give(0, limit=2) == [0, 1]
    assert assignment.give(0, limit=2) == []
    assert assignment.give(1, limit=2) == [2, 3]
    assignment.note_done(0, 0)
    assert assignment.give(0, limit=2) == [4]
    for actor, shard in ((0, 1), (0, 4), (1, 2)):
        assignment.note_done(actor, shard)
        assert not assignment.is_finished
    assignment.note_done(1, 3)
    assert assignment.is_finished


def test_what_a_lost_actor_held_comes_before_all_else() -> None:
    assignment = assignment_of(6)
    assignment.give(0, limit=2)
    assert assignment.lose(0) is None
    assert assignment.give(1, limit=3) == [0, 1, 2]


def test_the_shard_that_kills_is_found_among_those_it_was_held_with() -> None:
    assignment = assignment_of(8)
    made: list[int] = []
    culprit = None
    for actor in range(100):
        held: list[int] = []
        while held := held + assignment.give(actor, limit=3):
            if held[0] == 4:  # whoever begins it dies
                culprit = assignment.lose(actor)
                break
            made.append(held.pop(0))
            assignment.note_done(actor, made[-1])
        if culprit is not None:
            break
    assert culprit == 4
    assert actor == MAX_DEATHS - 1
    assert made == [0, 1, 2, 3]


def test_a_suspect_is_made_alone() -> None:
    assignment = assignment_of(3)
    for actor in range(ALONE_AFTER):
        assert assignment.give(actor, limit=2) == [0, 1]
        assignment.lose(actor)
    assert assignment.give(8, limit=2) == [0]
    assert assignment.give(8, limit=2) == []
    assignment.note_done(8, 0)
    assert assignment.give(8, limit=2) == [1]
    assignment.note_done(8, 1)
    assert assignment.give(8, limit=2) == [2]


@pytest.mark.parametrize("seed", range(20))
def test_every_shard_is_made_once_whoever_dies(seed: int) -> None:
    """At random: actors answer, finish a shard, or die; at most MAX_DEATHS - 1 times in all, so
    that no shard can be to blame."""
    rng = random.Random(seed)
    assignment, deaths, made = assignment_of(30), 0, []
    actors: dict[int, list[int]] = {0: [], 1: [], 2: []}
    next_actor = 3
    while not assignment.is_finished:
        actor = rng.choice(list(actors))
        if actors[actor] and deaths < MAX_DEATHS - 1 and rng.random() < 0.1:
            assert assignment.lose(actor) is None
            del actors[actor]
            actors[next_actor] = []
            next_actor, deaths = next_actor + 1, deaths + 1
        elif actors[actor] and rng.random() < 0.5:
            made.append(actors[actor].pop(rng.randrange(len(actors[actor]))))
            assignment.note_done(actor, made[-1])
        else:
            actors[actor] += assignment.give(actor, limit=2)
    assert deaths
    assert sorted(made) == list(range(30))


def test_actors_that_die_without_a_word_are_given_up() -> None:
    assignment = assignment_of(3)
    for actor in range(2 * MAX_DEATHS):
        assert not assignment.is_hopeless(num_places=2)
        assignment.lose(actor)
    assert assignment.is_hopeless(num_places=2)
    assignment.give(99, limit=2)  # one that answers
    assert not assignment.is_hopeless(num_places=2)
