"""A hub that cannot be reached."""

import socket
import time
from contextlib import contextmanager

import huggingface_hub


@contextmanager
def unreachable_hub(monkeypatch, answers):
    """The address of one that takes the connection or not, and is given up within 5 seconds."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if answers:  # the connection, but never the question
            server.listen()
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        start = time.monotonic()
        yield address
    assert time.monotonic() - start < 5
