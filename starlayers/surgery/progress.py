"""Progress of a long search for MLPs."""

import os
import sys
from collections.abc import Iterator, Sequence
from time import monotonic
from typing import Any, TypeVar

__all__ = ["shown"]

T = TypeVar("T")

#: seconds after which progress is shown
DELAY = 2.0

WORDS = "starify: verifying MLPs"


def shown(claims: Sequence[T]) -> Iterator[T]:
    """Yield the items, and show how far that is once it has taken longer than `DELAY`.

    The bar is that of transformers if it is imported, so its `disable_progress_bar` switches it
    off, else that of tqdm if it is installed, else plain lines on stderr. TQDM_DISABLE=1 in the
    environment switches off all of them.

    Example:
        >>> list(shown(["fc1", "fc2"]))
        ['fc1', 'fc2']
    """
    if os.environ.get("TQDM_DISABLE", "").lower() not in ("", "0", "false"):
        return iter(claims)
    bar = _bar_class()
    if bar is None:
        return _lines(claims)
    bar_of_claims: Iterator[T] = iter(bar(claims, desc=WORDS, delay=DELAY, leave=False))
    return bar_of_claims


def _bar_class() -> Any:
    """Return what makes progress bars, `None` if nothing does."""
    known = sys.modules.get("transformers.utils.logging")
    if known is not None:
        return getattr(known, "tqdm", None)
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return None
    return tqdm


def _lines(claims: Sequence[T]) -> Iterator[T]:
    """Yield the items, and write a line on stderr every `DELAY` seconds."""
    written = monotonic()
    for number, claim in enumerate(claims, 1):
        if monotonic() - written > DELAY:
            written = monotonic()
            print(f"{WORDS}, {number} of {len(claims)}", file=sys.stderr)
        yield claim
