"""The queue gives shards in order, and their items ahead of them, also while it grows."""

import threading

from deltatok.extract.shard_queue import ShardQueue


def test_items_are_given_ahead_and_shards_all_the_same() -> None:
    read: list[int] = []

    def source():  # type: ignore[no-untyped-def]
        for shard in range(3):
            read.append(shard)
            yield shard, [f"{shard}a", f"{shard}b"]

    queue = ShardQueue(source())
    items = queue.items_ahead()
    assert read == []
    assert [next(items) for _ in range(3)] == ["0a", "0b", "1a"]
    assert read == [0, 1]
    assert list(queue.shards()) == [(shard, [f"{shard}a", f"{shard}b"]) for shard in range(3)]
    assert [next(items) for _ in range(5)] == ["1b", "2a", "2b", None, None]


def test_items_end_for_now_and_go_on_with_the_next_shard() -> None:
    queue = ShardQueue[str](is_open=True)
    shards, items = queue.shards(), queue.items_ahead()
    queue.put(7, ["a"])
    assert next(shards) == (7, ["a"])
    assert [next(items), next(items)] == ["a", None]
    queue.put(8, [])
    queue.put(9, ["b"])
    assert [next(items), next(items)] == ["b", None]
    queue.close()
    assert list(shards) == [(8, []), (9, ["b"])]


def test_an_open_queue_waits_for_the_next_shard_and_says_how_long() -> None:
    queue = ShardQueue[str](is_open=True)
    shards = queue.shards()
    threading.Timer(0.2, queue.put, (3, ["a"])).start()
    assert next(shards) == (3, ["a"])
    assert queue.waited_s > 0.1
    threading.Timer(0.05, queue.close).start()
    assert list(shards) == []
