"""Independent formulas and small tools shared by the tests."""

import gc
import itertools
import math

import torch
from hypothesis import settings
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

#: name -> closed form from elementary functions, independent of the table that it checks
FORMULAS = {
    "identity": lambda x: 1 * x,
    "relu": lambda x: (x + x.abs()) / 2,
    "relu6": lambda x: x.clamp(min=0) - (x - 6).clamp(min=0),
    "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "quick_gelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
    "tanh": lambda x: 1 - 2 / (torch.exp(2 * x) + 1),
    "softplus": lambda x: torch.log1p(torch.exp(x)),
    "squared_relu": lambda x: x.clamp(min=0) ** 2,
    "hardswish": lambda x: x * ((x + 3).clamp(min=0) - (x - 3).clamp(min=0)) / 6,
}

#: no deadline, which would assert a timing; no random seed, so that a failure happens again
properties = settings(deadline=None, derandomize=True, database=None, max_examples=40)


def pairwise(*factors):
    """Return rows of one value per factor in which all pairs of values occur.

    Tests of factors that do not all interact need these rows, not the full product.
    """
    rows = [tuple(enumerate(row)) for row in itertools.product(*(range(len(f)) for f in factors))]
    pairs = {row: set(itertools.combinations(row, 2)) for row in rows}
    missing = set().union(*pairs.values())
    chosen = []
    while missing:
        row = max(rows, key=lambda row: len(pairs[row] & missing))
        missing -= pairs[row]
        chosen.append(tuple(factors[f][value] for f, value in row))
    return chosen


def randn(*shape, seed=0, dtype=torch.float32, grad=False):
    """Return normal numbers that depend on `seed` and `shape` alone."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return values.to(torch.get_default_device(), dtype).requires_grad_(grad)


def star_op_formula(op, x):
    """Compute `op(x)` of a `StarOp` from its weights and options."""
    h1, h2 = (x @ w.T + (0 if b is None else b) for w, b in branch_parameters(op))
    return FORMULAS[op.act](h1) * (op.offset + h2)


def branch_parameters(op):
    """Return weight and bias of both branches of a `StarOp`, with gradients."""
    if not op.packed:
        return [(f.weight, f.bias) for f in (op.f1, op.f2)]
    biases = (None, None) if op.f12.bias is None else op.f12.bias.chunk(2)
    return list(zip(op.f12.weight.chunk(2), biases))


def star_mlp_formula(mlp, x):
    """Compute `mlp(x)` of a `StarMLP` from its weights and options."""
    return star_op_formula(mlp, x) @ mlp.g.weight.T + (0 if mlp.g.bias is None else mlp.g.bias)


def gradients(module, x):
    """Return the output of `module(x)` and the gradients of a fixed weighting of it.

    The gradient of x comes first, then those of the parameters.
    """
    x = x.detach().requires_grad_()
    y = module(x)
    loss = (y * randn(*y.shape, seed=9, dtype=y.dtype)).sum()
    return [y, *torch.autograd.grad(loss, [x, *module.parameters()])]


def converted(tensors, dtype):
    """Return detached copies in `dtype` that require gradients; `None` stays `None`."""
    return [None if t is None else t.detach().to(dtype).requires_grad_() for t in tensors]


def results(f, tensors, *, order=1):
    """Return the outputs of `f(*tensors)` and gradients of a fixed weighting of them.

    Gradients are those of the tensors that require one. With `order=2` the gradients of a fixed
    weighting of these gradients follow. Empty outputs (statistics without `stats`) are left out.
    """
    outputs = f(*tensors)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    if len(outputs) > 1:
        outputs = [t for t in outputs if t.shape != (0,)]
    inputs = [t for t in tensors if t is not None and t.requires_grad]
    seeds = [randn(*t.shape, seed=90 + i, dtype=t.dtype) for i, t in enumerate(outputs)]
    grads = torch.autograd.grad(outputs, inputs, seeds, create_graph=order > 1)
    values = [*outputs, *grads]
    if order > 1:
        loss = sum(
            (g * randn(*g.shape, seed=80 + i, dtype=g.dtype)).sum() for i, g in enumerate(grads)
        )
        if loss.requires_grad:
            values += torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    return [t.detach() for t in values]


def assert_as_exact_as_eager(actual, eager, exact, *, sums=False):
    """Assert that each error is at most twice that of eager PyTorch, or two roundings.

    The norm of each tensor's error is compared, and its largest element. `exact` are the same
    quantities from the same inputs in float64. With `sums` they are sums of many terms of order 1,
    which may cancel: some float32 roundings of such a sum are allowed too.
    """
    for i, (ours, theirs, true) in enumerate(zip(actual, eager, exact, strict=True)):
        assert true.dtype == torch.float64
        assert (ours.dtype, ours.shape) == (theirs.dtype, true.shape), f"tensor {i}"
        error, allowed = ours.double() - true, theirs.double() - true
        for size in (torch.norm, largest):
            floor = 2 * torch.finfo(ours.dtype).eps * size(true) + 1e-12
            if sums:
                floor += 16 * torch.finfo(torch.float32).eps * size(true).clamp(min=4)
            assert size(error) <= 2 * size(allowed) + floor, (
                f"tensor {i}, {size.__name__}: error {size(error)}, eager's {size(allowed)}"
            )


def largest(t):
    """Return the largest magnitude in `t`, 0 if it is empty."""
    return t.abs().max() if t.numel() else t.new_zeros(())


def assert_close_in_scale(actual, expected, share):
    """Assert that no element is off by more than `share` of the largest one."""
    for i, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        assert ours.shape == theirs.shape
        scale = largest(theirs.detach().double())
        error = largest(ours.detach().double() - theirs.detach().double())
        assert error <= share * scale, f"tensor {i}: off by {error}, largest element {scale}"


class RecordOps(TorchDispatchMode):
    """Count of every operator called inside the block, by qualified name."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def peak_bytes(run):
    """Return the most memory on CPUs that `run()` holds at once beyond what was held before.

    Every allocation counts, temporary ones inside an operator too.
    """
    gc.collect()  # what is freed inside the block would count against its peak
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        kept = run()
    events = profiled.profiler.kineto_results.events()
    changes = [e.nbytes() for e in events if e.name() == "[memory]"]  # in the order of time
    del kept  # what `run` returns counts until here
    return max(itertools.accumulate(changes))
