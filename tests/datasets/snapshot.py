"""Check that a folder stays as it is."""

from contextlib import contextmanager


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
