"""Wheel and sdist: what is in them, and what a user of the installed wheel gets."""

import email
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import starlayers

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]

USER = """\
import torch
from torch import nn

from starlayers import StarMLP, explain, starify

layer = StarMLP(8, 16, act="silu")
x = torch.randn(2, 8)
reveal_type(layer.forward(x))
model = starify(nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)))
reveal_type(model)
reveal_type(explain(model, x)[0].name)
"""


def run(*command: object, cwd: Path, ok: bool = True) -> str:
    """Run a command as a user does, without the paths of this process."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert (done.returncode == 0) is ok, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist of this checkout, and the wheel built from that sdist."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """Python of a new environment with the wheel; what it needs is taken from this one."""
    folder = tmp_path_factory.mktemp("user")
    venv.create(folder / "venv", with_pip=False)
    (python,) = (folder / "venv").glob("[bS][ic]*/python*[n3]") or [None]
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    run(*pip, "--no-deps", "--no-index", built[0], cwd=folder)
    said = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder)
    # a .pth inside the folder that it names is not read: an editable install stays out
    Path(said.strip(), "needed.pth").write_text(sysconfig.get_path("purelib"))
    return python, folder


def test_the_wheel_has_the_package_alone(built):
    wheel = zipfile.ZipFile(built[0])
    names = set(wheel.namelist())
    info = f"starlayers-{starlayers.__version__}.dist-info"
    package = {name for name in names if not name.startswith(f"{info}/")}
    here = {
        p.relative_to(ROOT).as_posix()
        for p in (ROOT / "starlayers").rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    assert package == here
    assert "starlayers/py.typed" in package
    assert f"{info}/licenses/LICENSE" in names
    metadata = email.message_from_bytes(wheel.read(f"{info}/METADATA"))
    assert metadata["Version"] == starlayers.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert (
        "starlayers = starlayers.commands:main" in wheel.read(f"{info}/entry_points.txt").decode()
    )


def test_the_sdist_has_what_tests_and_pages_need(built):
    root = f"starlayers-{starlayers.__version__}"
    with tarfile.open(built[1]) as archive:
        names = {name.removeprefix(f"{root}/") for name in archive.getnames()}
    tracked = run("git", "ls-files", cwd=ROOT).splitlines()
    folders = ("starlayers", "tests", "examples", "notebooks", "docs", "benchmarks")
    wanted = {name for name in tracked if name.startswith(tuple(f"{f}/" for f in folders))}
    wanted |= {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile"}
    wanted |= {"pyproject.toml", "mkdocs.yml", "conftest.py", "hubconf.py", "PKG-INFO"}
    assert wanted <= names, sorted(wanted - names)
    assert {name.split("/")[0] for name in names} <= {*folders, *(n for n in tracked), "PKG-INFO"}
    assert not [name for name in names if re.search(r"__pycache__|\.venv|^(runs|site|dist)/", name)]
    assert built[1].stat().st_size < 30e6


def test_the_installed_wheel_is_imported_and_has_its_version(installed):
    python, folder = installed
    code = (
        "import starlayers, importlib.metadata as m; print(starlayers.__file__); "
        "print(starlayers.__version__, m.version('starlayers'))"
    )
    file, versions = run(python, "-c", code, cwd=folder).splitlines()
    assert Path(file).is_relative_to(folder)
    assert versions.split() == [starlayers.__version__] * 2
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", starlayers.__version__)


def test_a_strict_users_mypy_finds_the_types(installed):
    python, folder = installed
    (folder / "mine.py").write_text(USER)
    mypy = [sys.executable, "-m", "mypy", "--strict", "--python-executable", python]
    said = run(*mypy, "--cache-dir", folder / "cache", "mine.py", cwd=folder)
    revealed = re.findall(r'Revealed type is "(.*)"', said)
    assert revealed == ["torch._tensor.Tensor", "torch.nn.modules.module.Module", "str"], said
    (folder / "mine.py").write_text(USER + 'StarMLP("8", 16)\n')
    said = run(*mypy, "--cache-dir", folder / "cache", "mine.py", cwd=folder, ok=False)
    assert "[arg-type]" in said
