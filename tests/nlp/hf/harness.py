"""transformers' own model tests, out of the source archive of the transformers that is installed.

The wheel leaves them out; the archive on PyPI carries the files straight under `tests/`. They are
unpacked into the cache, untouched, and imported as the package `transformers_tests`: all they
import from one another is relative, so the name is free, and `tests` stays this project's own.
What they import and the archive lacks (its subfolders, the ranks of distributed tests) is put in
`sys.modules` here.
"""

import importlib
import os
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath
from types import ModuleType

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
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
    package = _stub("")
    package.__path__ = [str(folder)]
    _stub("exporters.test_export", ExportTesterMixin=ExportTesterMixin)
    _stub("generation.test_utils", GenerationTesterMixin=GenerationTesterMixin)
    _stub("utils.test_configuration_utils", config_common_kwargs=config_common_kwargs)
    _stub("distributed_testing_utils", **DISTRIBUTED)
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


# --- stand-ins for files that transformers' tests import and its source archive lacks

# tests/utils/test_configuration_utils.py: arguments that every config takes
config_common_kwargs = {
    "return_dict": False,
    "output_hidden_states": True,
    "dtype": "float16",
    "is_encoder_decoder": True,
    "chunk_size_feed_forward": 5,
    "architectures": ["AnyModel"],
    "id2label": {0: "no", 1: "yes", 2: "perhaps"},
    "label2id": {"no": 0, "yes": 1, "perhaps": 2},
    "problem_type": "regression",
}


class ExportTesterMixin:
    """tests/exporters/test_export.py"""


class GenerationTesterMixin:
    """tests/generation/test_utils.py"""


# --- ranks of distributed tests


def run_distributed(world_size):
    """Call a function in `world_size` processes as `function(rank, *args)`, in a process group."""

    def decorate(function):
        def run(*args):
            # kept here while the ranks start, so that no one else takes the port
            store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
            start_rank_processes(_in_group, (store.port, world_size, function, args), world_size)

        return run

    return decorate


def start_rank_processes(function, args, nprocs):
    """Call `function(rank, *args)` in `nprocs` new processes and wait for them.

    They are forked: a spawned one would first import torch and transformers for 6 s. That is safe
    without a GPU, as `_in_rank` leaves the threads of this process alone; with one, autograd
    refuses to run in a fork.
    """
    method = "spawn" if torch.cuda.is_available() else "fork"
    arguments = (_named(function), [_named(arg) for arg in args])
    mp.start_processes(_in_rank, arguments, nprocs=nprocs, start_method=method)


def _in_rank(rank, function, args):
    torch.set_num_threads(1)
    _found(function)(rank, *map(_found, args))


def _in_group(rank, port, world_size, function, args):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    store = dist.TCPStore("localhost", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    try:
        function(rank, *args)
    finally:
        dist.destroy_process_group()


class _Name(tuple):
    """Module and name of a function of transformers' tests, which a rank cannot unpickle."""


def _named(value):
    module = getattr(value, "__module__", "")
    if isinstance(value, type) or not callable(value) or not module.startswith(PACKAGE):
        return value
    return _Name((module.rpartition(".")[2], value.__qualname__))


def _found(value):
    return getattr(module(value[0]), value[1]) if isinstance(value, _Name) else value


#: tests/distributed_testing_utils.py: what it offers, on gloo
DISTRIBUTED = {
    "run_distributed": run_distributed,
    "_start_rank_processes": start_rank_processes,
    "_get_distributed_backend": lambda: "gloo",
    "_get_distributed_device_type": lambda: "cpu",
    "_get_rank_device": lambda rank: torch.device("cpu"),
    "_set_rank_device": lambda rank: None,
}
