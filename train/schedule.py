"""When something is due in a training loop. Used by loop.py."""


def is_time(step: int, *, every: int, last: int) -> bool:
    """Whether what happens every `every` steps happens after `step` steps, or at the `last`."""
    return step % every == 0 or step == last
