"""Every op against torch's checks of custom ops, its compilers and its exporter.

Helpers of `starlayers.kernels.registration` are tested at the end."""

import contextlib
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._subclasses.fake_tensor import FakeTensorMode

from starlayers import ACTIVATIONS
from starlayers.kernels import registration
from starlayers.kernels.registration import (
    cast,
    ceil_div,
    library_gradients,
    no_autocast,
    pointer,
    tap_rows,
    unit_stride,
)
from tests.helpers import randn, results
from tests.kernels.cases import EITHER, calls, mlp_pair, mlp_tensors

in_either = pytest.mark.usefixtures("either")
CALLS = list(calls())
FORWARD = [name for name in CALLS if "backward" not in name]
#: all checks of opcheck but "test_aot_dispatch_static", which the dynamic one includes
UTILS = (
    "test_schema",
    "test_faketensor",
    "test_autograd_registration",
    pytest.param("test_aot_dispatch_dynamic", marks=pytest.mark.slow),
)


@in_either
@pytest.mark.parametrize("utils", UTILS)
@pytest.mark.parametrize("name", CALLS)
def test_op_is_well_formed(name, utils):
    op, arguments = calls()[name]
    op(*arguments)  # because one of the checks looks at the registration alone
    assert torch.library.opcheck(op, arguments, test_utils=utils) == {utils: "SUCCESS"}


@pytest.mark.parametrize("where", EITHER)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_meta_tensors_foretell_shapes_and_dtypes(name, dtype, where):
    op, arguments = calls(dtype=dtype)[name]

    def meta(value):
        return value.to("meta") if isinstance(value, torch.Tensor) else value

    outputs, fakes = op(*arguments), op(*map(meta, arguments))
    outputs, fakes = ([t] if isinstance(t, torch.Tensor) else t for t in (outputs, fakes))
    for output, fake in zip(outputs, fakes, strict=True):
        assert fake.device.type == "meta"
        assert (output.shape, output.dtype) == (fake.shape, fake.dtype)
        assert output.stride() == fake.stride()


def scaled(op, options):
    """Return `op` between operations that a compiler may move or fuse."""

    def f(*tensors):
        outputs = op(*(None if t is None else 2 * t for t in tensors), *options)
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
        return tuple(t.sin() for t in outputs)

    return f


def split(arguments):
    tensors = [a for a in arguments if a is None or isinstance(a, torch.Tensor)]
    return tensors, arguments[len(tensors) :]


#: calls that the quick tier compiles; the slow tier compiles all others
QUICK = [("star packed, clamped", False), ("star_mlp", True)]
COMPILED = [
    pytest.param(name, dynamic, marks=() if (name, dynamic) in QUICK else pytest.mark.slow)
    for name in FORWARD
    for dynamic in (False, True)
]


@in_either
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("name", "dynamic"), COMPILED)
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


@in_either
@pytest.mark.export
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


@in_either
@pytest.mark.export
def test_exported_for_any_number_of_rows():
    tensors = tuple(t.detach() for t in mlp_tensors(9, 17, 40, 24))
    module = Called(mlp_pair("silu", stats=True)[0])
    rows = torch.export.Dim("rows", min=2, max=4096)
    program = torch.export.export(
        module, tensors, dynamic_shapes=(({0: rows}, *[None] * 6, {0: rows}),)
    )
    other = tuple(t.detach() for t in mlp_tensors(130, 17, 40, 24))
    torch.testing.assert_close(program.module()(*other), module(*other))


def test_every_activation_of_the_table_has_a_triton_form():
    assert all(activation.triton == activation.name for activation in ACTIVATIONS.values())


@pytest.mark.parametrize(("a", "b", "quotient"), [(0, 4, 0), (1, 4, 1), (4, 4, 1), (5, 4, 2)])
def test_ceil_div(a, b, quotient):
    assert ceil_div(a, b) == quotient


def test_cast_copies_only_to_another_dtype():
    x = randn(3)
    assert cast(x, torch.float32) is x
    assert cast(None, torch.float16) is None
    assert torch.equal(cast(x, torch.float16), x.half())


def test_unit_stride_copies_only_strided_columns():
    x = randn(4, 6)
    for view in (x, x[:, 1:5], x[:, :1], x[::2]):
        assert unit_stride(view) is view
    for strided in (x.t(), x[:, ::2]):
        dense = unit_stride(strided)
        assert dense.is_contiguous()
        assert torch.equal(dense, strided)


def test_pointer_of_a_missing_tensor_is_the_other_one():
    x, other = randn(4, 6), randn(2)
    assert pointer(None, other) is other
    assert pointer(x, other) is x
    assert pointer(x.t(), other).is_contiguous()


def test_taps_lie_channel_by_channel_in_float32():
    k = randn(5, 1, 3, 3, dtype=torch.float16)
    taps = tap_rows(k)
    assert (taps.shape, taps.dtype, taps.is_contiguous()) == ((9, 5), torch.float32, True)
    assert taps[5].tolist() == k[:, 0, 1, 2].tolist()


def test_autocast_is_off_inside_and_on_again_outside():
    x = randn(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        with no_autocast(x):
            assert (x @ x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16


def test_library_gradients_are_those_needed_and_differentiable():
    a, b = randn(3, grad=True), randn(3, seed=1, grad=True)
    dy = torch.ones(3)

    def product(a, b, missing):
        assert missing is None
        return a.square() * b

    da, db, none = library_gradients(product, [a, b, None], (True, False, False), [dy])
    assert db is none is None
    torch.testing.assert_close(da, 2 * a * b)
    torch.testing.assert_close(torch.autograd.grad(da.sum(), a)[0], 2 * b)
    # one tensor in two places gets a gradient for each
    da, db, _ = library_gradients(product, [a, a, None], (True, True, False), [dy])
    torch.testing.assert_close([da, db], [2 * a * a, a * a])


@pytest.mark.parametrize(
    ("is_cuda", "gpus", "entered"), [(True, 2, ["cuda:1"]), (True, 1, []), (False, 2, [])]
)
def test_kernels_are_launched_on_the_device_of_the_input(is_cuda, gpus, entered, monkeypatch):
    seen = []

    def device(name):
        seen.append(name)
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "device", device)
    with registration._device_of(SimpleNamespace(is_cuda=is_cuda, device="cuda:1")):
        assert seen == entered


def test_the_interpreter_gets_float32_for_bfloat16_and_no_float64():
    seen = []

    def kernel(x, w, missing, act):
        seen.append((x.dtype, w.dtype, missing, act))
        return x * w, x + w

    def plain(x, w, missing, act):
        return x - w, x

    def fake(x, w, missing, act):
        return x.new_empty(x.shape), x.new_empty(x.shape, dtype=torch.float32)

    f32, f16, bf16, f64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
    run = registration._interpreted(kernel, plain, fake)
    x, w = randn(3), randn(3, seed=1)
    product, total = run(x.to(bf16), w.to(f16), None, "silu")
    assert (product.dtype, total.dtype) == (bf16, f32)
    assert torch.equal(product, (x.to(bf16).float() * w.to(f16)).to(bf16))
    product, total = run(x.to(f16), w.to(f16), None, "silu")
    assert product.dtype == total.dtype == f16
    run(x, w.to(f64), None, "silu")
    assert seen == [(f32, f16, None, "silu"), (f16, f16, None, "silu"), (f32, f64, None, "silu")]
    difference, _ = run(x.to(f64), w, None, "silu")
    assert len(seen) == 3
    assert torch.equal(difference, x.to(f64) - w)
    one = registration._interpreted(lambda x: 2 * x, plain, lambda x: x)(x.to(bf16))
    assert torch.equal(one, (2 * x.to(bf16).float()).to(bf16))


# --- ops as a compiler sees them on a GPU, traced without one


def traced(name, dtype):
    op, arguments = calls(dtype=dtype)[name]

    def f(*tensors):
        rest = iter(tensors)
        outputs = op(*(next(rest) if isinstance(a, torch.Tensor) else a for a in arguments))
        return (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)

    with FakeTensorMode():
        tensors = [
            torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="cuda")
            for a in arguments
            if isinstance(a, torch.Tensor)
        ]
        return aot_export_joint_simple(f, tensors, trace_joint=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_a_compiler_sees_one_opaque_call(name, dtype):
    called = [str(n.target) for n in traced(name, dtype).graph.nodes if n.op == "call_function"]
    ours = [target for target in called if target.startswith("starlayers.")]
    assert ours == [f"starlayers.{name.split()[0]}.default"]
    assert set(called) <= {*ours, "<built-in function getitem>"}


def test_the_first_call_of_an_op_imports_nothing():
    """Ops made by `torch.library.custom_op` import the compiler then, which takes a second."""
    program = """
        import sys, torch
        from starlayers.kernels.star_mlp import star_mlp
        x, w = torch.ones(4, 4, requires_grad=True), torch.ones(4, 4)
        before = set(sys.modules)
        star_mlp(x, w, None, w, None, w, None, None, "silu", 0.0, False)[0].sum().backward()
        print(len(set(sys.modules) - before))
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    imported = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert int(imported) < 20
