"""Splits compared row by row, folders that must not change, and a hub that cannot be reached."""

import socket
import time
from contextlib import contextmanager

import huggingface_hub

SPLITS = ["train", "validation", "test"]


def sizes(data):
    assert list(data.splits) == SPLITS
    return tuple(len(data.splits[s]) for s in SPLITS)


def everything(data, column):
    return [value for s in SPLITS for value in data.splits[s][column]]


def assert_same(a, b):
    assert {s: a.splits[s].to_list() for s in SPLITS} == {s: b.splits[s].to_list() for s in SPLITS}


def snapshot(folder):
    return {
        path.relative_to(folder): (path.stat().st_mtime_ns, path.is_file() and path.read_bytes())
        for path in (folder, *folder.rglob("*"))
    }


@contextmanager
def unchanged(folder):
    """Assert that nothing in `folder` is written, added or removed, even if there is an error."""
    before = snapshot(folder)
    try:
        yield
    finally:
        assert snapshot(folder) == before


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
