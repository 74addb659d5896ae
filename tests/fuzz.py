"""Random cases for the functions of `starlayers.functional`, each drawn from one integer.

`draw(seed, paths)` chooses the arguments, `check(case)` runs them: value and gradients against
`starlayers.reference` in float64, with at most twice the error of eager PyTorch in the same dtype.
"""

import random
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch

from starlayers import ACTIVATIONS, dispatch, plans, use_backend
from starlayers.dispatch import plan_mlp, plan_star
from starlayers.functional import star, star_mlp, star_packed
from starlayers.kernels.registration import MLPWeights
from starlayers.reference import star_mlp_reference, star_reference
from tests.helpers import FORMULAS, assert_as_exact_as_eager, randn

INF = float("inf")
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
#: cases of the full tier: those on PATHS have the seeds below SEEDS_IN_TRITON, those in Triton the
#: others
CASES, SEEDS_IN_TRITON = 14_000, 11_000
#: cases of a test
BATCH = 100
NO_LEAST_SIZES = {
    "MIN_HIDDEN_BYTES_INFERENCE": 0,
    "MIN_HIDDEN_BYTES_TRAINING": 0,
    "HIDDEN_BYTES_A_CHANNEL": 0,
}
#: paths of an ordinary process; "any size" is "auto" without a least size for the op of CPUs
PATHS = ("auto", "any size", "eager", "cpu")
# name -> weight in a draw
FUNCTIONS = {"star": 7, "star_packed": 4, "star_mlp": 9}
DTYPES = {F32: 4, F16: 2, BF16: 2, F64: 2}
LAYOUTS = {
    "contiguous": 6,
    "offset": 2,
    "transposed": 3,
    "permuted": 2,
    "columns": 2,
    "step": 3,
    "expanded": 3,
    "scalar": 1,
}
#: all names of the table, but for what other tests register
ACTS = sorted((act for act, row in ACTIVATIONS.items() if row.name in FORMULAS), key=str)
OFFSETS = (0, 0.0, 1, 1.0, -0.5, 2.75)
CLAMPS = (None, None, (-1, 1), (-0.5, 2.25), (-INF, 0.75), (-0.25, INF), (-INF, INF), (0.5, 0.5))
WIDTHS = (1, 2, 3, 5, 7, 8, 9, 12, 16, 17, 24, 31, 33)
#: in, hidden, out for other tiles of the Triton kernels than narrow layers have, and for more than
#: one; the last two are too wide for a tile and multiples of 8, as those of wide layers require
WIDE = ((40, 70, 48), (96, 33, 9), (5, 140, 100), (200, 17, 130), (304, 24, 8), (16, 40, 400))
#: points where the first or second derivative of an activation jumps
KINKS = {"relu": (0.0,), "relu6": (0.0, 6.0), "squared_relu": (0.0,), "hardswish": (-3.0, 3.0)}
#: these, and limits of CLAMPS
SPECIAL = (0.0, -0.0, 6.0, 3.0, -3.0, -1.0, 1.0, 0.5, 0.75, 2.25, -0.25, -0.5)


@dataclass(frozen=True)
class Case:
    """Arguments of one call."""

    seed: int
    function: str
    path: str
    dtype: torch.dtype
    act: str | None
    #: `offset` and, for a star, both clamps
    options: dict
    #: name -> shape of every tensor that is not `None`; without x2 or w2, x1 or w1 serves as both
    shapes: dict
    #: dtype of the residual
    residual: torch.dtype
    #: name -> layout in memory, also of the result's gradient "dy"
    layouts: dict
    #: names of the tensors that require a gradient
    needs: tuple
    #: 2 for second gradients too
    order: int
    #: standard deviation of the inputs, 1 / sqrt(fan_in) for weights
    scale: float
    #: SPECIAL values among the inputs of a star, or a star MLP of zeros
    kinks: bool


def draw(seed, paths=PATHS):
    """Return the case of a seed, on one of `paths`."""
    rng = random.Random(seed)
    function = weighted(rng, FUNCTIONS)
    # "cpu" has no op for a star alone
    path = rng.choice(paths if function == "star_mlp" else [p for p in paths if p != "cpu"])
    if path == "cpu":
        dtype = F32
    else:
        dtype = weighted(rng, {d: n for d, n in DTYPES.items() if (path, d) != ("triton", F64)})
    act = rng.choice(ACTS)
    options = {"offset": rng.choice(OFFSETS)}
    lead = tuple(rng.choice((1, 1, 2, 3, 4, 5)) for _ in range(rng.randrange(4)))
    if lead and rng.random() < 0.06:  # no rows
        lead = tuple(0 if i == len(lead) // 2 else n for i, n in enumerate(lead))
    if function == "star_mlp":
        shapes = mlp_shapes(rng, lead, path)
        twin = "w2"
    else:
        shapes = star_shapes(rng, lead, function)
        options |= {"clamp1": rng.choice(CLAMPS), "clamp2": rng.choice(CLAMPS)}
        twin = "x2"
    if rng.random() < 0.04:
        shapes.pop(twin, None)
    residual = rng.choice((F32, F16, BF16)) if dtype != F64 and rng.random() < 0.3 else dtype
    layouts = {name: weighted(rng, LAYOUTS) for name in (*shapes, "dy")}
    if function == "star" and len(shapes["x1"]) == 4 and rng.random() < 0.5:
        layouts |= {name: "channels_last" for name in layouts if rng.random() < 0.8}
    share = rng.choice((0, 0.5, 0.5, *[1] * 9))
    needs = tuple(name for name in shapes if rng.random() < share)
    order = 2 if needs and dtype in (F32, F64) and rng.random() < 0.25 else 1
    scale = rng.choice((0.3, 1.0, 1.0, 2.0 if function == "star_mlp" else 3.0))
    kinks = rng.random() < 0.2
    return Case(
        seed, function, path, dtype, act, options, shapes, residual, layouts, needs, order, scale,
        kinks,
    )  # fmt: skip


def weighted(rng, table):
    """Return a key of `table`, by the weights that are its values."""
    return rng.choices(list(table), list(table.values()))[0]


def star_shapes(rng, lead, function):
    """Return name -> shape of the branches of a star."""
    width = rng.choice(WIDTHS)
    if rng.random() < 0.06:  # nothing, or more than a tile is wide
        width = rng.choice((0, 64, 100, 1030, 2050))
    if function == "star_packed":
        return {"h": (*lead, 2 * width)}
    shape = () if not lead and rng.random() < 0.3 else (*lead, width)
    return {"x1": shape, "x2": shape}


def mlp_shapes(rng, lead, path):
    """Return name -> shape of the tensors of a star MLP."""
    if rng.random() < 0.08:  # more than one block of rows on a CPU, more than one tile on a GPU
        lead = (*lead[:1], rng.randrange(60, 140))
    width, hidden, out = (rng.choice(WIDTHS) for _ in range(3))
    if rng.random() < 0.04:
        width, hidden, out = rng.choice(((0, hidden, out), (width, 0, out), (width, hidden, 0)))
    if path == "triton" and rng.random() < 0.25:
        width, hidden, out = rng.choice(WIDE)
    shapes = {
        "x": (*lead, width),
        "w1": (hidden, width),
        "b1": (hidden,),
        "w2": (hidden, width),
        "b2": (hidden,),
        "w3": (out, hidden),
        "b3": (out,),
        "residual": (*lead, out),
    }
    missing = {"b1": 0.3, "b2": 0.3, "b3": 0.3, "residual": 0.6}
    return {name: s for name, s in shapes.items() if rng.random() >= missing.get(name, 0)}


def result_shape(case):
    """Return the shape of the result."""
    if case.function == "star_mlp":
        return (*case.shapes["x"][:-1], case.shapes["w3"][0])
    if case.function == "star_packed":
        return (*case.shapes["h"][:-1], case.shapes["h"][-1] // 2)
    return case.shapes["x1"]


def result_dtype(case):
    """Return the dtype of the result, which a residual may widen."""
    added = case.residual if "residual" in case.shapes else case.dtype
    return torch.promote_types(case.dtype, added)


def numbers(case, attempt=0):
    """Return name -> tensor of the case, and the gradient of its result as "dy"."""
    rng = random.Random(f"{case.seed} {attempt}")
    tensors = {}
    for name, shape in {**case.shapes, "dy": result_shape(case)}.items():
        dtype = {"dy": result_dtype(case), "residual": case.residual}.get(name, case.dtype)
        scale = {"dy": 1}.get(name, case.scale)
        if name in ("w1", "w2", "w3"):
            scale = max(1, shape[-1]) ** -0.5
        t = scale * randn(*shape, seed=rng.getrandbits(32), dtype=F64)
        if case.kinks and name in ("x1", "x2", "h"):
            chosen = (99 * t).long() % len(SPECIAL)
            t = t.where(
                randn(*shape, seed=rng.getrandbits(32)) > 0.3, t.new_tensor(SPECIAL)[chosen]
            )
        elif case.kinks and name in ("x", "b1"):
            t = torch.zeros_like(t)
        tensors[name] = laid_out(t.to(dtype), case.layouts[name], rng)
    return tensors


def laid_out(t, layout, rng):
    """Return `t` in another layout of memory, with NaN wherever none of its elements lies.

    The values stay, but expanded dimensions repeat their first entry. A layout that `t` has too few
    dimensions for is contiguous.
    """
    dim = rng.randrange(t.ndim) if t.ndim else 0
    if layout == "expanded" and t.ndim:
        return t.narrow(dim, 0, min(1, t.shape[dim])).clone().expand(t.shape)
    if layout == "scalar" and t.ndim and t.numel():
        return t.flatten()[:1].clone().expand(t.shape)
    if layout == "offset":
        room = t.new_full((t.numel() + 8,), torch.nan)[3 : 3 + t.numel()].view(t.shape)
    elif layout == "transposed" and t.ndim > 1:
        room = torch.empty_like(t.mT, memory_format=torch.contiguous_format).mT
    elif layout == "channels_last" and t.ndim == 4:
        room = torch.empty_like(t, memory_format=torch.channels_last)
    elif layout == "permuted" and t.ndim:
        order = rng.sample(range(t.ndim), t.ndim)
        back = [order.index(d) for d in range(t.ndim)]
        room = t.new_empty([t.shape[d] for d in order]).permute(back)
    elif layout == "columns" and t.ndim:
        room = t.new_full((*t.shape[:-1], t.shape[-1] + 5), torch.nan)[..., 2:-3]
    elif layout == "step" and t.ndim:
        step, size = rng.choice((2, 3)), t.shape[dim]
        room = t.new_full(
            [step * size + 1 if d == dim else n for d, n in enumerate(t.shape)], torch.nan
        )
        room = room[(*[slice(None)] * dim, slice(1, None, step))]
    else:
        room = torch.empty_like(t, memory_format=torch.contiguous_format)
    return room.copy_(t)


def near_a_kink(case, t):
    """Return True if rounding in float32 might move an inner value of a star MLP over a kink."""
    kinks = KINKS.get(ACTIVATIONS[case.act].name, ())
    if case.function != "star_mlp" or not kinks:
        return False
    h = t["x"].double() @ t["w1"].double().T
    h = h + t["b1"].double() if "b1" in t else h
    distances = torch.stack([(h - kink).abs() for kink in kinks])
    # at a distance of 0 there were only zeros to add
    return bool(((distances > 0) & (distances < 1e-5)).any())


def mlp_arguments(t):
    """Return x, w1, b1, w2, b2, w3, b3."""
    return [t["x"], t["w1"], t.get("b1"), t.get("w2", t["w1"]), t.get("b2"), t["w3"], t.get("b3")]


def branches(t):
    """Return both branches of a star."""
    return t["h"].chunk(2, -1) if "h" in t else (t["x1"], t.get("x2", t["x1"]))


def library(case, t):
    """Call the function of the case."""
    if case.function == "star":
        return star(*branches(t), case.act, **case.options)
    if case.function == "star_packed":
        return star_packed(t["h"], case.act, **case.options)
    residual = t.get("residual")
    return star_mlp(*mlp_arguments(t), case.act, residual=residual, **case.options)


def definition(case, t):
    """Compute the same by its definition."""
    if case.function != "star_mlp":
        return star_reference(*branches(t), case.act, **case.options)
    y = star_mlp_reference(*mlp_arguments(t), case.act, **case.options)
    return y + t["residual"] if "residual" in t else y


def formula(case, t):
    """Compute the same in float64 from elementary functions, without the library's table."""
    t = {name: tensor.double() for name, tensor in t.items()}
    act, offset = FORMULAS[ACTIVATIONS[case.act].name], case.options["offset"]
    if case.function == "star_mlp":
        x, w1, b1, w2, b2, w3, b3 = (0 if a is None else a for a in mlp_arguments(t))
        s = act(x @ w1.T + b1) * (x @ w2.T + b2 + offset)
        return s @ w3.T + b3 + t.get("residual", 0)
    limits = (case.options[clamp] or (-INF, INF) for clamp in ("clamp1", "clamp2"))
    x1, x2 = (x.clamp(min=low).clamp(max=high) for x, (low, high) in zip(branches(t), limits))
    return act(x1) * (x2 + offset)


def dense(t, dtype=None):
    """Return contiguous copies of name -> tensor, in `dtype` if there is one."""
    return {
        name: x.to(dtype or x.dtype).clone(memory_format=torch.contiguous_format)
        for name, x in t.items()
    }


def derivatives(f, case, t):
    """Return name -> the result of `f(case, t)`, its gradients and, for order 2, theirs.

    The gradients are those weighted by `dy`. Second gradients are those of a weighted sum of them,
    of `dy` too.
    """
    t = {name: x.detach().requires_grad_(name in case.needs) for name, x in t.items()}
    y = f(case, t)
    values = {"y": y}
    if case.needs:
        inputs, dy = [t[name] for name in case.needs], t["dy"].requires_grad_(case.order > 1)
        grads = torch.autograd.grad(y, inputs, dy, create_graph=case.order > 1)
        values |= {f"gradient of {name}": g for name, g in zip(case.needs, grads)}
    if case.order > 1:
        loss = sum((g * randn(*g.shape, seed=i, dtype=g.dtype)).sum() for i, g in enumerate(grads))
        names = (*case.needs, "dy")
        second = torch.autograd.grad(loss, [*inputs, dy], allow_unused=True, materialize_grads=True)
        values |= {f"second gradient of {name}": g for name, g in zip(names, second)}
    return {name: v.detach() for name, v in values.items()}


@contextmanager
def on_path(path):
    """Run the block on one of PATHS or on "triton"."""
    if path != "any size":
        with use_backend(path):
            yield
        return
    with mock.patch.multiple(plans, **NO_LEAST_SIZES):
        dispatch.forget_plans()
        yield
    dispatch.forget_plans()


def planned(case, t):
    """Return the path on which the library decides."""
    if case.function != "star_mlp":
        return plan_star(*branches(t), case.act).path
    x, *weights = mlp_arguments(t)
    return plan_mlp(x, MLPWeights(*weights), case.act, t.get("residual")).path


def allowed_paths(case):
    """Return the paths that the library may decide on."""
    mlp = case.function == "star_mlp"
    if case.path == "triton":
        return ("star_mlp", "star_mlp_wide") if mlp else ("star",)
    on_cpu = case.path == "cpu" or (case.path == "any size" and case.dtype == F32)
    return ("cpu",) if mlp and on_cpu else ("eager",)


def memory(t):
    """Return all bytes of the memory of `t`, also of what lies between its elements."""
    return torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage())


def yardsticks(case, t):
    """Yield name -> quantity, as inexact as eager PyTorch computes it; one of them is enough.

    The first is eager PyTorch on dense copies, and for a star the only one. Where the terms of a
    sum cancel, the error of one computation says little, since it may happen to be none. For a
    star MLP there follow the exact quantities of inputs that are off by up to one rounding, several
    times. In 16 bits and for kernels there is first eager PyTorch on the tensors as they lie in
    memory: its strided matrix products add in another order and, in 16 bits, round once more.
    """
    eager = derivatives(definition, case, dense(t))
    yield eager
    if case.function != "star_mlp":
        return
    if case.dtype in (F16, BF16) or case.path == "triton":
        yield derivatives(definition, case, t)
    eps, exact = torch.finfo(case.dtype).eps, dense(t, F64)
    for seed in range(8):
        off = {
            name: x * (1 + eps * randn(*x.shape, seed=8 * i + seed, dtype=F64).clamp(-1, 1))
            for i, (name, x) in enumerate(exact.items())
        }
        moved = derivatives(definition, case, off)
        yield {name: value.to(eager[name].dtype) for name, value in moved.items()}


def excess(ours, eager, true, **options):
    """Return a message if `ours` is less exact than eager PyTorch, else ""."""
    try:
        assert_as_exact_as_eager([ours], [eager], [true], **options)
    except AssertionError as error:
        return str(error)
    return ""


def compare(case):
    """Compare the library with its definition on the arguments of a case."""
    t = next(t for t in (numbers(case, n) for n in range(100)) if not near_a_kink(case, t))
    kept = {name: memory(x).clone() for name, x in t.items()}
    with on_path(case.path):
        path = planned(case, t)
        assert path in allowed_paths(case), f"{path!r} instead of {allowed_paths(case)}"
        actual = derivatives(library, case, t)
    for name, x in t.items():
        assert torch.equal(memory(x), kept[name]), f"{name} was written to"
    y = actual["y"]
    assert y.shape == result_shape(case), f"the result is {tuple(y.shape)}"
    assert y.dtype == result_dtype(case), f"the result is {y.dtype}"
    places = {x.untyped_storage().data_ptr() for x in t.values() if x.numel()}
    assert y.untyped_storage().data_ptr() not in places, "the result lies in an input"
    exact = derivatives(definition, case, dense(t, F64))
    # torch's softplus(x) is x past 20, which is off by 2e-9
    torch.testing.assert_close(exact["y"], formula(case, t), rtol=1e-8, atol=1e-8)
    assert actual.keys() == exact.keys(), f"{list(actual)} instead of {list(exact)}"
    left, first = list(exact), {}
    for eager in yardsticks(case, t):
        errors = {
            name: excess(actual[name], eager[name], exact[name], sums=case.dtype != F64)
            for name in left
        }
        left, first = [name for name in left if errors[name]], first or errors
        if not left:
            return
    raise AssertionError("; ".join(f"{name}: {first[name]}" for name in left))


def check(case):
    """Compare the library with its definition on the arguments of a case.

    Raises:
        AssertionError: they differ, or one of them raises; with the seed and all arguments.
    """
    try:
        compare(case)
    except Exception as error:
        raise AssertionError(f"fuzz case of seed {case.seed}: {error!r}\n{case}") from error
