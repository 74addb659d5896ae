"""tests/distributed_testing_utils.py, which transformers' source archive lacks: ranks on gloo."""

import os

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.nlp.hf import harness


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
    if isinstance(value, type) or not callable(value) or not module.startswith(harness.PACKAGE):
        return value
    return _Name((module.rpartition(".")[2], value.__qualname__))


def _found(value):
    return getattr(harness.module(value[0]), value[1]) if isinstance(value, _Name) else value


NAMES = {
    "run_distributed": run_distributed,
    "_start_rank_processes": start_rank_processes,
    "_get_distributed_backend": lambda: "gloo",
    "_get_distributed_device_type": lambda: "cpu",
    "_get_rank_device": lambda rank: torch.device("cpu"),
    "_set_rank_device": lambda rank: None,
}
