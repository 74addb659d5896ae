"""Ctrl-C that ends a training after its step, in all of its processes."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator


def ignore_interrupts(_worker: int) -> None:
    """Ignore Ctrl-C in a process that loads images: only its parent acts on it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Interrupts:
    """Ctrl-C as a request to stop, on which all processes agree."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator, self.requested = accelerator, False

    def agree(self) -> bool:
        """Return True if any process was interrupted; every process calls this at the same step.

        Otherwise one would leave the loop, and the others would wait forever.
        """
        if self.accelerator.num_processes == 1:
            return self.requested
        if self.requested:
            self.accelerator.set_trigger()
        return self.accelerator.check_trigger()  # type: ignore[no-any-return]

    @contextmanager
    def finish_step(self) -> Iterator[None]:
        """Let Ctrl-C only set `requested`, and a second Ctrl-C raise at once."""
        if threading.current_thread() is not threading.main_thread():
            yield  # signal handlers can be set in the main thread only
            return

        def on_interrupt(*_: object) -> None:
            if self.requested:
                raise KeyboardInterrupt  # the second Ctrl-C
            self.requested = True

        before = signal.signal(signal.SIGINT, on_interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
