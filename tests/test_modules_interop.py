"""Layers with the rest of PyTorch: saving, AMP, compile, export, transforms."""

import copy
import io
import operator
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

from starlayers import StarBlock, StarMLP, StarOp
from starlayers.coefficients.modules import RankStarMLP, RankStarOp, ScaledStarMLP, SumMLP
from tests.helpers import assert_close_in_scale, gradients, randn

# float32 star MLPs run fused here and the others eager: both paths meet every test
pytestmark = pytest.mark.usefixtures("eligible")
DOUBLE = torch.float64
MAKERS = {
    "op": lambda **k: StarOp(4, 4, act="gelu", offset=1, **k),
    "packed": lambda **k: StarOp(4, 4, act="silu", packed=True, offset=1, **k),
    "near_linear": lambda **k: StarOp(4, 4, offset=1, init="near_linear", **k),
    "rank-op": lambda **k: RankStarOp(4, 4, act="gelu", rank=2, offset=1, **k),
    "rank": lambda **k: RankStarMLP(4, rank=2, **k),
    "sum": lambda **k: SumMLP(4, **k),
    "scaled": lambda **k: ScaledStarMLP(4, offset=0.5, **k),
    "mlp": lambda **k: StarMLP(4, 6, act="swiglu", bias=False, **k),
    "block": lambda **k: StarBlock(4, StarMLP(4, 8, act="tanh", **k), layer_scale=0.5),
}
makers = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def same(actual, expected, **tolerance):
    torch.testing.assert_close(list(actual), list(expected), **tolerance)


def exactly(actual, expected):
    same(actual, expected, rtol=0, atol=0)


def through_torch_save(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch-save": through_torch_save,
}


@makers
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_agree_and_are_apart(make, copied):
    module, x = make(), randn(3, 4)
    y = module(x)
    twin = copied(module)
    exactly(gradients(twin, x), gradients(module, x))
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert torch.equal(module(x), y)
    assert not torch.equal(twin(x), y)


@makers
def test_state_dict_round_trip(make):
    module, other, x = make(), make(), randn(3, 4)
    assert not torch.equal(other(x), module(x))
    other.load_state_dict(module.state_dict())
    exactly(gradients(other, x), gradients(module, x))


def test_state_dict_names():
    children = [f"{f}.{p}" for f in ("f1", "f2", "g") for p in ("weight", "bias")]
    assert list(StarMLP(4).state_dict()) == children
    assert list(StarOp(4, 4).state_dict()) == children[:4]
    assert list(StarOp(4, 4, packed=True).state_dict()) == ["f12.weight", "f12.bias"]
    stars = [f"star.{name}" for name in children[:4]]
    assert list(RankStarMLP(4).state_dict()) == [*stars, *children[4:]]
    assert list(ScaledStarMLP(4).state_dict()) == ["scale", "shift", *children]
    names = ["gamma", *(f"mlp.{name}" for name in children)]
    assert list(StarBlock(4, layer_scale=1.0).state_dict()) == names


@makers
def test_made_in_double_on_the_meta_device_and_filled_later(make):
    torch.manual_seed(0)
    module = make(dtype=DOUBLE)
    meta = make(dtype=DOUBLE, device="meta")
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    filled = nans(meta.to_empty(device="cpu"))
    torch.manual_seed(0)
    filled.reset_parameters()
    if isinstance(filled, StarBlock):  # whose children reset their own parameters
        filled.mlp.reset_parameters()
    x = randn(3, 4, dtype=DOUBLE)
    exactly(gradients(filled, x), gradients(module, x))
    assert module(x).dtype == DOUBLE


@makers
@pytest.mark.parametrize("order", [list, reversed], ids=["parents-first", "children-first"])
def test_modules_reset_one_by_one_in_any_order(make, order):
    results = []
    for module in (make(), nans(make(device="meta").to_empty(device="cpu"))):
        torch.manual_seed(0)
        for m in order(list(module.modules())):
            if hasattr(m, "reset_parameters"):
                m.reset_parameters()
        results.append(gradients(module, randn(3, 4)))
    exactly(*results)
    assert all(t.isfinite().all() for t in results[0])


def nans(module):
    """Fill all parameters of a module with NaN, as memory without values could be."""
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(torch.nan)
    return module


@makers
def test_half_precision_module_is_near_the_formula(make):
    module = make()
    x = randn(8, 4)
    y = copy.deepcopy(module).bfloat16()(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert_close_in_scale([y], [module(x)], 0.02)


@makers
def test_autocast_runs_the_branches_in_bf16(make):
    module, x = make(), randn(8, 4)
    exact = gradients(module, x)
    seen = []
    hooks = [
        m.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
        for m in module.modules()
        if isinstance(m, nn.Linear)
    ]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = gradients(module, x)
    assert seen == [torch.bfloat16] * len(hooks)
    assert all(g.dtype == torch.float32 for g in cast[1:])
    assert_close_in_scale(cast, exact, 0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_relu6_gradients_are_finite_and_right_under_loss_scale(dtype):
    mlp, x = StarMLP(16).to(dtype), 3 * randn(64, 16, dtype=dtype)
    exact = copy.deepcopy(mlp).double()
    for module in (mlp, exact):
        y = module(x.to(module.g.weight.dtype))
        (y.to(DOUBLE).square().mean() * 65536).backward()
    for p, q in zip(mlp.parameters(), exact.parameters()):
        assert p.grad.isfinite().all()
        assert q.grad.abs().max() > 256, "the loss scale must be felt"
        error = (p.grad.double() - q.grad).norm() / q.grad.norm()
        assert error < 8 * torch.finfo(dtype).eps


@makers
def test_gradient_checkpointing_changes_nothing(make):
    module, x = make(), randn(5, 4)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False)

    exactly(gradients(Checkpointed(), x), gradients(module, x))


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(m, marks=() if n == "mlp" else pytest.mark.slow, id=n)
        for n, m in MAKERS.items()
    ],
)
def test_compiled_equals_eager(make, fresh_compiler):
    module = make()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for batch in (5, 3):
        x = randn(batch, 4)
        same(gradients(compiled, x), gradients(module, x))


@pytest.mark.slow
def test_inductor_equals_eager(fresh_compiler):
    block, x = StarBlock(4, StarMLP(4, 4), pre=nn.LayerNorm(4)), randn(3, 4)
    same(gradients(torch.compile(block, fullgraph=True), x), gradients(block, x))


@pytest.mark.export
@makers
def test_exported_graph_is_plain_aten(make):
    module = make().eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(module, (randn(5, 4),), dynamic_shapes=({0: batch},))
    calls = {n.target for n in program.graph.nodes if n.op == "call_function"}
    assert {op.namespace for op in calls - {operator.getitem}} == {"aten"}
    for n in (5, 7):
        same([program.module()(randn(n, 4))], [module(randn(n, 4))])


@makers
def test_first_and_second_order_gradients(make):
    module, x = make(dtype=DOUBLE), randn(2, 4, dtype=DOUBLE, grad=True)
    names, parameters = zip(*module.named_parameters())

    def f(x, *parameters):
        return functional_call(module, dict(zip(names, parameters)), (x,))

    assert torch.autograd.gradcheck(f, (x, *parameters), fast_mode=True)
    assert torch.autograd.gradgradcheck(f, (x, *parameters), fast_mode=True)


@makers
@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4)], ids=str)
def test_zero_size_batch_has_zero_gradients(make, shape):
    module = make()
    y, dx, *dw = gradients(module, torch.empty(shape))
    assert y.shape == dx.shape == shape
    assert all(torch.equal(g, torch.zeros_like(p)) for g, p in zip(dw, module.parameters()))


@makers
def test_layout_of_the_input_changes_nothing(make):
    module = make()
    for x in (
        randn(4, 6).t(),
        randn(6, 8)[:, ::2],
        randn(1, 4).expand(6, 4),
        randn(6, 8).chunk(2, 1)[1],
    ):
        kept = x.clone()
        assert not x.is_contiguous()
        same(gradients(module, x), gradients(module, x.contiguous()))
        assert torch.equal(x, kept)


@makers
def test_transforms(make):
    module, x = make(dtype=DOUBLE), randn(5, 4, dtype=DOUBLE)
    same([vmap(module)(x)], [module(x)])
    value, tangent = jvp(module, (x,), (torch.ones_like(x),))
    h = 1e-6
    same(
        [value, tangent],
        [module(x), (module(x + h) - module(x - h)) / (2 * h)],
        rtol=1e-6,
        atol=1e-7,
    )
    dx = grad(lambda x: module(x).square().sum())(x)
    x.requires_grad_()
    same([dx], torch.autograd.grad(module(x).square().sum(), x))


@makers
def test_batched_vector_jacobian_products(make):
    module, x = make(), randn(5, 4, grad=True)
    y = module(x)
    rows = torch.eye(y.numel()).view(-1, *y.shape)
    (batched,) = torch.autograd.grad(y, x, rows, retain_graph=True, is_grads_batched=True)
    one_by_one = [torch.autograd.grad(y, x, row, retain_graph=True)[0] for row in rows]
    same([batched], [torch.stack(one_by_one)], rtol=1e-4, atol=1e-5)


def test_ensemble_of_modules():
    modules, x = [StarMLP(4, dtype=DOUBLE) for _ in range(3)], randn(5, 4, dtype=DOUBLE)
    parameters, buffers = stack_module_state(modules)
    base = modules[0]
    y = vmap(lambda p, b: functional_call(base, (p, b), (x,)))(parameters, buffers)
    same([y], [torch.stack([m(x) for m in modules])])
