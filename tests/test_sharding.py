"""Star MLPs divided over two processes: by columns and rows, FSDP2 and DDP."""

import copy

import pytest
import torch
import torch.multiprocessing as mp
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from starlayers import StarBlock, StarMLP
from starlayers.coefficients.modules import RankStarMLP
from tests.helpers import randn

LAYERS = {
    "rank 1": lambda: StarMLP(8, 16, act="gelu", offset=0.5),
    "rank 2": lambda: RankStarMLP(8, 16, rank=2, act="gelu", offset=0.5),
    "rank 3": lambda: RankStarMLP(8, 16, rank=3, act="silu"),
}


def build(name):
    torch.manual_seed(0)
    return LAYERS[name]()


def by_columns_and_rows(mlp, mesh):
    prefix = "star." if isinstance(mlp, RankStarMLP) else ""
    plan = {f"{prefix}f1": ColwiseParallel(), f"{prefix}f2": ColwiseParallel()}
    return parallelize_module(mlp, mesh, plan | {"g": RowwiseParallel()})


def compare(name):
    """Compare a divided layer with the whole one, in values and gradients of the input."""
    mesh = init_device_mesh("cpu", (2,))
    whole, x = build(name), randn(6, 8, grad=True)
    expected = whole(x)
    (grad,) = torch.autograd.grad(expected.square().sum(), x)
    part = by_columns_and_rows(copy.deepcopy(whole), mesh)
    y = part(x)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)
    (found,) = torch.autograd.grad(y.square().sum(), x)
    torch.testing.assert_close(found, grad, rtol=1e-5, atol=1e-5)
    rows = (part.star.f1 if isinstance(part, RankStarMLP) else part.f1).weight
    assert rows.to_local().shape[0] == rows.shape[0] // 2


def data_parallel(wrap):
    """Compare a step on half of the batch in each process with one on the whole batch."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    whole = StarBlock(8, StarMLP(8, 16, act="gelu"), pre=torch.nn.LayerNorm(8))
    x = randn(6, 8)
    model = wrap(copy.deepcopy(whole))
    whole(x).square().mean().backward()
    model(x[3 * rank : 3 * rank + 3]).square().mean().backward()
    for (name, p), q in zip(whole.named_parameters(), model.parameters(), strict=True):
        grad = q.grad.full_tensor() if hasattr(q.grad, "full_tensor") else q.grad
        torch.testing.assert_close(grad, p.grad, rtol=1e-5, atol=1e-6, msg=name)


CHECKS = {
    **{f"columns and rows, {name}": (lambda name=name: compare(name)) for name in LAYERS},
    "FSDP2": lambda: data_parallel(fully_shard),
    "DDP": lambda: data_parallel(DistributedDataParallel),
}


def in_process(rank, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    try:
        for check in CHECKS.values():
            check()
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_divided_layers_equal_the_whole_one(tmp_path):
    mp.spawn(in_process, args=(str(tmp_path / "store"),), nprocs=2)


@pytest.mark.parametrize("name", ["rank 2", "rank 3"])
def test_half_of_the_rows_holds_whole_products(name):
    whole, x = build(name), randn(6, 8)
    half = copy.deepcopy(whole)
    for f in (half.star.f1, half.star.f2):
        f.weight, f.bias = (torch.nn.Parameter(p[: len(p) // 2]) for p in (f.weight, f.bias))
    torch.testing.assert_close(half.products(x), whole.products(x)[:, :8])
