"""Every op against torch's own checks of custom ops, its compilers and its exporter."""

import pytest
import torch

from tests.helpers import results
from tests.kernels.cases import calls, mlp_pair, mlp_tensors

served = pytest.mark.usefixtures("served_by")
CALLS = list(calls())
FORWARD = [name for name in CALLS if "backward" not in name]
#: all that opcheck knows but "test_aot_dispatch_static", which is this one without symbolic sizes
UTILS = (
    "test_schema",
    "test_faketensor",
    "test_autograd_registration",
    "test_aot_dispatch_dynamic",
)


@served
@pytest.mark.parametrize("utils", UTILS)
@pytest.mark.parametrize("name", CALLS)
def test_op_is_well_formed(name, utils):
    op, arguments = calls()[name]
    op(*arguments)  # one of the checks only looks at what is registered
    assert torch.library.opcheck(op, arguments, test_utils=utils) == {utils: "SUCCESS"}


@pytest.mark.parametrize("where", ["plain", pytest.param("triton", marks=pytest.mark.interpret)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_meta_tensors_foretell_shapes_and_dtypes(name, dtype, where):
    op, arguments = calls(dtype=dtype)[name]

    def meta(value):
        return value.to("meta") if isinstance(value, torch.Tensor) else value

    found, told = op(*arguments), op(*map(meta, arguments))
    found, told = ([t] if isinstance(t, torch.Tensor) else t for t in (found, told))
    for ours, theirs in zip(found, told, strict=True):
        assert theirs.device.type == "meta"
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert ours.stride() == theirs.stride()


def scaled(op, options):
    """`op` among operations that a compiler may move or fuse."""

    def f(*tensors):
        outputs = op(*(None if t is None else 2 * t for t in tensors), *options)
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
        return tuple(t.sin() for t in outputs)

    return f


def split(arguments):
    tensors = [a for a in arguments if a is None or isinstance(a, torch.Tensor)]
    return tensors, arguments[len(tensors) :]


@served
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", FORWARD)
def test_compiled_whole_it_gives_the_same(name, dynamic):
    op, arguments = calls()[name]
    tensors, options = split(arguments)
    f = scaled(op, options)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    torch.testing.assert_close(results(compiled, tensors), results(f, tensors))


class Called(torch.nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, *tensors):
        return self.f(*tensors)


@served
@pytest.mark.parametrize("name", FORWARD)
def test_exported_it_is_one_node_and_gives_the_same(name):
    op, arguments = calls()[name]
    tensors, options = split(arguments)
    tensors = tuple(None if t is None else t.detach() for t in tensors)
    module = Called(scaled(op, options))
    program = torch.export.export(module, tensors)
    nodes = [n for n in program.graph.nodes if str(n.target).startswith("starlayers.")]
    assert len(nodes) == 1
    torch.testing.assert_close(program.module()(*tensors), module(*tensors))


@served
def test_exported_for_any_number_of_rows():
    tensors = tuple(t.detach() for t in mlp_tensors(9, 17, 40, 24))
    module = Called(mlp_pair("silu", stats=True)[0])
    rows = torch.export.Dim("rows", min=2, max=4096)
    program = torch.export.export(
        module, tensors, dynamic_shapes=(({0: rows}, *[None] * 6, {0: rows}),)
    )
    other = tuple(t.detach() for t in mlp_tensors(130, 17, 40, 24))
    torch.testing.assert_close(program.module()(*other), module(*other))
