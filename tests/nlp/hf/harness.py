"""transformers' own model tests, out of the source archive of the transformers that is installed.

The wheel leaves them out; the archive on PyPI carries the files straight under `tests/`. They are
unpacked into the cache, untouched, and imported as the package `transformers_tests`: all they
import from one another is relative, so the name is free, and `tests` stays this project's own.
What they import and the archive lacks (its subfolders) is put in `sys.modules` here.
"""

import importlib
import os
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath
from types import ModuleType

import transformers

from starlayers.datasets.packages import cache_dir, pypi_source

PACKAGE = "transformers_tests"


def sources() -> Path:
    """The folder with the test files of the installed transformers.

    Raises:
        FileNotFoundError: the archive is not in the cache and cannot be downloaded.
    """
    version = transformers.__version__
    target = cache_dir() / "pypi" / f"transformers-{version}-tests"
    if not target.is_dir():
        archive = pypi_source("transformers", version)
        if archive is None:
            raise FileNotFoundError(
                f"the source archive of transformers {version} cannot be had: these tests need pip "
                "and PyPI once; `pytest --ignore tests/nlp/hf` leaves them out"
            )
        _unpack(archive, target)
    return target


MIXINS = {
    "model": ("test_modeling_common", "ModelTesterMixin"),
    "generation": ("generation.test_utils", "GenerationTesterMixin"),
    "training": ("test_training_mixin", "TrainingTesterMixin"),
    "tensor_parallel": ("test_tensor_parallel_mixin", "TensorParallelTesterMixin"),
    "fsdp": ("test_fsdp_mixin", "FSDPTesterMixin"),
}


def mixins(*names: str) -> list[type]:
    """Mixins by the names above."""
    return [getattr(module(file), mixin) for file, mixin in map(MIXINS.__getitem__, names)]


def module(name: str) -> ModuleType:
    """One of transformers' test files."""
    if PACKAGE not in sys.modules:
        _install(sources())
    return importlib.import_module(f"{PACKAGE}.{name}")


def _unpack(archive: Path, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        files = Path(folder) / "files"
        files.mkdir()
        (files / "__init__.py").touch()  # ConfigTester executes the folder's
        with tarfile.open(archive) as tar:
            for member in tar:
                _, *inner = PurePosixPath(member.name).parts
                if inner[:1] == ["tests"] and len(inner) == 2 and inner[1].endswith(".py"):
                    (files / inner[1]).write_bytes(tar.extractfile(member).read())
        try:
            os.rename(files, target)
        except OSError:  # another process was faster
            if not target.is_dir():
                raise


def _install(folder: Path) -> None:
    from tests.nlp.hf import distributed, stubs

    package = _stub("")
    package.__path__ = [str(folder)]
    _stub("exporters.test_export", ExportTesterMixin=stubs.ExportTesterMixin)
    _stub("generation.test_utils", GenerationTesterMixin=stubs.GenerationTesterMixin)
    _stub("utils.test_configuration_utils", config_common_kwargs=stubs.config_common_kwargs)
    _stub("distributed_testing_utils", **distributed.NAMES)
    # which models are worth the time of these is transformers' own choice of its families
    module("test_tensor_parallel_mixin").TP_DISTRIBUTED_TEST_MODEL_TYPES = None
    module("test_fsdp_mixin").FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None


def _stub(path: str, **names: object) -> ModuleType:
    """The module `path` of the package, with the packages above it, holding `names`."""
    full = PACKAGE
    made = sys.modules.setdefault(full, ModuleType(full))
    for part in filter(None, path.split(".")):
        full = f"{full}.{part}"
        made = sys.modules.setdefault(full, ModuleType(full))
    made.__path__ = []
    vars(made).update(names)
    return made
