"""`torch.library.opcheck` on every op of the library, in any layout and dtype.

`test_registration` runs all checks on the ops of `tests.kernels.cases.calls`; here are those on the
other ops, and a test that no op is without.
"""

import importlib
import pkgutil
import random

import pytest
import torch

from starlayers import kernels
from starlayers.kernels import star as star_kernels
from starlayers.kernels import star_linear as star_linear_kernels
from starlayers.kernels.star_linear import dgated, product_dgated, star_linear
from starlayers.kernels.star_mlp_wide import star_mlp_wide
from tests.fuzz import laid_out
from tests.helpers import pairwise, randn
from tests.kernels.cases import calls, mlp_tensors

UTILS = (
    "test_schema",
    "test_faketensor",
    "test_autograd_registration",
    pytest.param("test_aot_dispatch_dynamic", marks=pytest.mark.slow),
)
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
LAYOUTS = ["offset", "transposed", "permuted", "columns", "step", "expanded"]


def wide_calls(*, dtype=torch.float32):
    """Return name -> (op, arguments) of the ops of a star MLP that is too wide for one tile."""
    *full, residual = mlp_tensors(21, 16, 40, 24, dtype=dtype)
    dy = residual.detach()
    bare = [None if i in (2, 4, 6) else t for i, t in enumerate(full)]
    x, w1, b1, w2, b2, w3, _ = (t.detach() for t in full)
    h1, h2 = (randn(21, 40, seed=s, dtype=dtype) for s in (7, 8))
    return {
        "star_mlp_wide": (star_mlp_wide, (*full, "silu", 0.5, False, "library")),
        "star_mlp_wide bare, recomputed": (star_mlp_wide, (*bare, "gelu", 1.0, True, "triton")),
        "star_linear": (star_linear, (x, w1, b1, w2, b2, "silu", 0.5, True)),
        "star_linear bare, not saved": (star_linear, (x, w1, None, w2, None, "relu6", 0, False)),
        "dgated": (dgated, (dy, w3, h1, h2, "silu", 0.5)),
        "product_dgated": (product_dgated, (dy, w3, h1, h2, "silu", 0.5)),
    }


def all_calls(*, dtype=torch.float32):
    """Return name -> (op, arguments) of all ops."""
    return {**calls(dtype=dtype), **wide_calls(dtype=dtype)}


@pytest.fixture
def wide(launches, monkeypatch):
    """Record the launches of `star_linear` and `dgated` too."""
    monkeypatch.setattr(star_linear_kernels, "launch", star_kernels.launch)


def registered():
    """Return the names of all ops that the library has registered, once every module is loaded."""
    for module in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}."):
        if not module.ispkg:
            importlib.import_module(module.name)
    names = (name.split(".")[0] for name in torch._C._dispatch_get_all_op_names())
    return sorted({name for name in names if name.startswith("starlayers::")})


def test_every_registered_op_is_checked():
    assert registered() == sorted({op.name().split(".")[0] for op, _ in all_calls().values()})


@pytest.mark.usefixtures("wide", "either")
@pytest.mark.parametrize("utils", UTILS)
@pytest.mark.parametrize("name", list(wide_calls()))
def test_op_is_well_formed(name, utils):
    op, arguments = wide_calls()[name]
    op(*arguments)  # because one of the checks looks at the registration alone
    assert torch.library.opcheck(op, arguments, test_utils=utils) == {utils: "SUCCESS"}


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize(
    ("name", "dtype", "layout"), pairwise(list(all_calls()), DTYPES, LAYOUTS), ids=str
)
def test_any_dtype_and_layout_is_written_to_by_none_and_foretold(name, dtype, layout):
    op, arguments = all_calls(dtype=dtype)[name]
    rng = random.Random(0)

    def moved(t):
        return laid_out(t.detach(), layout, rng).requires_grad_(t.requires_grad)

    arguments = tuple(moved(a) if isinstance(a, torch.Tensor) else a for a in arguments)
    utils = ("test_schema", "test_faketensor")
    checked = torch.library.opcheck(op, arguments, test_utils=utils)
    assert checked == dict.fromkeys(utils, "SUCCESS")
