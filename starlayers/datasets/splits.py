"""Reproducible divisions of rows into training, validation and test rows."""

import random
from collections import Counter
from collections.abc import Callable, Hashable, Sequence

__all__ = ["divide", "share"]


def share(parts: int) -> Callable[[int], int]:
    """Return a function from the rows of a class to the rows held out of it: one in `parts`.

    At least one of three rows is held out, and none of two, so that a class keeps rows for
    training when two splits are held out.

    Example:
        >>> [share(10)(n) for n in (2, 3, 14, 16, 1000)]
        [0, 1, 1, 2, 100]
    """
    return lambda rows: min(max(1, round(rows / parts)), rows // 3)


def divide(
    strata: Sequence[Hashable],
    held_out: Callable[[int], int],
    names: Sequence[str] = ("validation", "test"),
) -> dict[str, list[int]]:
    """Divide row numbers into "train" and the splits `names`, shuffled but always the same.

    Args:
        strata: class of every row; each class is divided by itself. One value for all rows
            divides them at random.
        held_out: how many of the n rows of a class each split of `names` gets, as a function of n.
        names: splits to hold out.

    Returns:
        Row numbers of every split.

    Raises:
        ValueError: a split would be empty.

    Example:
        >>> parts = divide(["cat"] * 6 + ["dog"] * 3, share(5))
        >>> {name: sorted(rows) for name, rows in parts.items()}
        {'train': [0, 2, 3, 4, 6], 'validation': [5, 7], 'test': [1, 8]}
    """
    order = list(range(len(strata)))
    random.Random(0).shuffle(order)
    wanted = {stratum: dict.fromkeys(names, held_out(n)) for stratum, n in Counter(strata).items()}
    parts: dict[str, list[int]] = {name: [] for name in ("train", *names)}
    for row in order:
        left = wanted[strata[row]]
        split = next((name for name in names if left[name] > 0), "train")
        if split != "train":
            left[split] -= 1
        parts[split].append(row)
    if not all(parts.values()):
        listed = ", ".join(map(repr, names))
        raise ValueError(
            f"{len(strata)} rows are too few to divide off {listed}: pass more rows, or data that "
            "has these splits"
        )
    return parts
