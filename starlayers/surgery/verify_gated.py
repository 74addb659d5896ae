"""Verify a gated MLP: by the graph of its forward, then by values and gradients."""

import random
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from starlayers.backend import use_backend
from starlayers.surgery.adopted import adopt, arguments
from starlayers.surgery.contexts import graphs
from starlayers.surgery.formula import Formula, activation_name, read_formula
from starlayers.surgery.gated import GatedMLP, Role
from starlayers.surgery.linear_layers import Projection, base_layer, dtype_and_device, projection
from starlayers.surgery.questions import (
    LayerProbe,
    answered,
    require_answered,
    require_no_types,
)
from starlayers.surgery.reads import Reads
from starlayers.surgery.sandbox import random_tensor, sandbox_copy, seed_generators
from starlayers.surgery.site import Site, attribute
from starlayers.surgery.trial_run import MismatchError, first_line, run

#: sizes of input and hidden layer of the small stand-in
SMALL = Projection(6, 10)

#: shapes of the inputs before the channels, and factors of the branches: a forward may make a
#: difference of single rows, tokens and sequences, and limits act far from zero
SHAPES = ((3,), (1,), (5, 2), (1, 1), (1, 700), (2, 3, 4))
MODES = ("gradients", "no gradients", "inference")
SCALES = (1.0, 1e-2, 30.0, 1e3, 1e6)
#: sizes of the gradients that are sent back, by the factor of the branches: hooks and functions
#: may clip them
GRADIENTS = {1.0: 1e4, 1e-2: 1.0, 30.0: 1e-4, 1e3: 1e2, 1e6: 1.0}

#: error allowed, relative to the largest value: roundings of one dtype in two orders
TOLERANCES = {torch.float64: 1e-6, torch.float32: 2e-4, torch.bfloat16: 0.06}

#: key of the state of the random generators among values
RANDOM = "random numbers"


class GatedVerdict(NamedTuple):
    """Result of `verify_gated`: the formula, and the name of its activation in `ACTIVATIONS`.

    `casts` is True if its product is converted to the dtype of the last layer's weight.
    """

    formula: Formula
    act_name: str | None
    casts: bool


def verify_gated(owner: nn.Module, site: Site, reads: Reads | None = None) -> GatedVerdict:
    """Return the star formula of a gated MLP, verified.

    By graph: under all `CONTEXTS` and for input of any size its forward is the same star formula
    and nothing else. By value: the star computes what the module does, with the same gradients of
    the input and of all parameters. The linear layers are replaced by plain ones for this, because
    whatever they are, adapters, quantised or sharded, a star calls them as the module does.

    Args:
        owner: the MLP.
        site: names of its parts.
        reads: is given the names of the attributes that its forward reads.

    Raises:
        MismatchError: the module computes anything else; the message says what.
    """
    _require_visible(owner)
    _require_one_input(owner)
    formula, act_name = _read(owner, site, set() if reads is None else reads)
    site = formula.site
    if act_name is None and site.act is None:
        raise MismatchError(
            f"its forward computes {formula.act}, which no row of ACTIVATIONS equals"
        )
    device = dtype_and_device(attribute(owner, site.inp))[1]

    def random(tensor: Tensor) -> Tensor:
        return random_tensor(tensor).to("cpu" if device.type == "meta" else device)

    try:
        body = _stand_in(owner, site, random, SMALL)
        run(body, _input(body, site, (2, 3)))
    except Exception:  # its forward or other layers know the true sizes
        body = _stand_in(owner, site, random)
    casts = _asks_for_weight(body, site)
    _compare(body, formula, act_name, casts)
    if site.out is not None:
        _compare_dtypes(body, formula, act_name, casts)
    return GatedVerdict(formula, act_name, casts)


def _require_visible(owner: nn.Module) -> None:
    """Raise a MismatchError for names that starify needs, and questions for types."""
    own = [*vars(owner), *owner._modules, *owner._parameters, *owner._buffers, *dir(type(owner))]
    taken = next((name for name in own if name == "star" or name.startswith("star_")), None)
    if taken is not None:
        raise MismatchError(f"its attribute {taken!r} has a name that a star needs")
    require_no_types(type(owner))


def _require_one_input(owner: nn.Module) -> None:
    needed = [p for p in arguments(owner) if p.default is p.empty]
    if len(needed) != 1:
        raise MismatchError(f"its forward takes {len(needed)} arguments, not the input alone")


# by graph


def _read(owner: nn.Module, site: Site, reads: Reads) -> tuple[Formula, str | None]:
    """Return the formula under all contexts, and the name of its activation."""
    parts = tuple(site.layers)
    inp = attribute(owner, site.inp)
    n = (projection(inp) or Projection(1, 1)).in_features
    device = dtype_and_device(inp)[1]
    device = torch.device("cpu") if device.type == "meta" else device
    first: tuple[Formula, str | None] | None = None
    for context, graph in graphs(partial(_stand_in, owner, site), n, device, parts, reads):
        try:
            formula, chain = read_formula(graph, site)
        except MismatchError as error:
            if first is None:
                raise
            raise MismatchError(f"in {context}: {error}") from error
        if first is None:
            first = formula, activation_name(chain)
        elif formula != first[0]:
            mine, others = formula.difference(first[0])
            verb = "computes" if formula.act != first[0].act else "calls"
            raise MismatchError(f"it {verb} {mine} in {context}, {others} otherwise")
    assert first is not None
    return first


def _stand_in(
    owner: nn.Module,
    site: Site,
    make: Callable[[Tensor], Tensor],
    small: Projection | None = None,
) -> Any:
    """Return a copy of an MLP with plain linear layers, of `small` sizes or the true ones."""
    memo: dict[int, Any] = {}
    for name in site.layers:
        layer = attribute(owner, name)
        n, f, _ = projection(layer) or Projection(1, 1)
        if small is not None:
            n, f = small.in_features, small.out_features
            if name == site.out:
                n, f = f, n
            elif site.up is None:
                f *= 2
        bias = getattr(base_layer(layer), "bias", None) is not None
        plain = nn.Linear(n, f, bias=bias, device="meta")
        plain.train(layer.training)
        memo[id(layer)] = sandbox_copy(plain, make=make)
    return sandbox_copy(owner, memo, make=make)


# by value


def _asks_for_weight(body: nn.Module, site: Site) -> bool:
    """Return True if a forward asks for the weight of its last layer.

    Raises:
        MismatchError: it asks its linear layers for anything else, or a tensor for what no graph
            shows.
    """
    names = site.layers
    for dtype in TOLERANCES:
        layers = {name: attribute(body, name) for name in names}
        probes = {name: LayerProbe(layer, name) for name, layer in layers.items()}
        memo = {id(layers[name]): probe.to(dtype) for name, probe in probes.items()}
        probed = sandbox_copy(body, memo).to(dtype)
        for probe in probes.values():
            probe.forget()
        call = answered(probed)
        failure: Exception | None = None
        for shape, train, mode in product(((3,), (5, 2), (2, 3, 4)), (False, True), MODES):
            try:
                values_of(probed.train(train), call, _input(body, site, shape, dtype), mode)
            except MismatchError:
                raise
            except Exception as error:  # a foreign module may raise anything
                failure = failure or error
        asked = [require_answered(probe, last=name == site.out) for name, probe in probes.items()]
        if failure is not None:
            raise MismatchError(
                f"it does not run with other linear layers than its own: {first_line(failure)}"
            )
        if any(asked):
            return True
    return False


def _role(body: nn.Module, formula: Formula, act_name: str | None, casts: bool) -> Role:
    between, after, first = formula.between, formula.after, formula.up_first
    kind = type(body)
    return Role(formula.site, kind, act_name, between, after, up_first=first, casts=casts)


def _compare_dtypes(body: nn.Module, formula: Formula, act_name: str | None, casts: bool) -> None:
    """Compare a module and its star where the last layer has another dtype than the others."""
    site, role = formula.site, _role(body, formula, act_name, casts)
    low, high = torch.bfloat16, torch.float32
    for (dtype, last), train in product(((low, high), (high, low)), (False, True)):
        own = sandbox_copy(body).to(dtype).train(train)
        attribute(own, site.out or "").to(last)
        x = _input(own, site, (3, 2), dtype)
        try:
            expected = values_of(own, own, x, "gradients")
        except Exception:  # as linear layers do: nothing to compare with
            continue
        star: GatedMLP = adopt(own, GatedMLP, role)
        try:
            with use_backend("eager"):
                actual = values_of(star, star.star_definition, x, "gradients")
        except Exception as error:  # the same
            raise MismatchError(f"with a last layer of {last}: {first_line(error)}") from error
        require_close(expected, actual, TOLERANCES[low], f"with a last layer of {last}")


def _compare(body: nn.Module, formula: Formula, act_name: str | None, casts: bool) -> None:
    """Compare a module with the star that is to replace it: values, and all gradients."""
    site, role = formula.site, _role(body, formula, act_name, casts)
    for dtype, scale in product(TOLERANCES, SCALES):
        own = sandbox_copy(body).to(dtype)
        _scale_branches(own, site, scale)
        star: GatedMLP = adopt(sandbox_copy(own), GatedMLP, role)
        for shape, train, mode in product(SHAPES, (False, True), MODES):
            own.train(train), star.train(train)
            x = _input(own, site, shape, dtype)
            x = x.transpose(0, 1) if mode == "inference" and x.ndim == 3 else x  # other strides
            expected = values_of(own, own, x, mode, GRADIENTS[scale])
            ways: list[tuple[Any, str]] = [(star.star_definition, "eager")]
            if scale == 1.0:
                ways.append((star.star_original, "eager"))
            if dtype == torch.float32 and _fits_cpu_op(star, x):
                ways.append((star, "cpu"))
            for call, backend in ways:
                with use_backend(backend):
                    actual = values_of(star, call, x, mode, GRADIENTS[scale])
                where = f"for {tuple(x.shape)} of {dtype}, {'train' if train else 'eval'}, {mode}"
                require_close(expected, actual, TOLERANCES[dtype], where)


def _input(
    body: nn.Module, site: Site, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return normal input, of a shape before the channels."""
    inp = attribute(body, site.inp)
    seed_generators(inp.weight.device)
    return torch.randn(*shape, inp.in_features, dtype=dtype, device=inp.weight.device)


@torch.no_grad()
def _scale_branches(body: nn.Module, site: Site, scale: float) -> None:
    for name in filter(None, (site.inp, site.up)):
        for parameter in attribute(body, name).parameters():
            parameter.mul_(scale)


def _fits_cpu_op(star: GatedMLP, x: Tensor) -> bool:
    """Return True if the CPU's own op, which `auto` takes for large inputs, serves a call."""
    try:
        with use_backend("cpu"):
            return star.star_plan(x).weights is not None
    except RuntimeError:
        return False


def values_of(
    module: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor, mode: str, size: float = 1.0
) -> dict[str, Tensor]:
    """Return the output of a call, and the gradients of input and parameters if there are any.

    The gradient of the output has values up to `size`. Random numbers that are drawn are told by
    the next ones.
    """
    seed_generators(x.device)
    before = _numpy_state()
    if mode != "gradients":
        with torch.inference_mode(mode == "inference"), torch.no_grad():
            y = call(x)
        return {"": y, RANDOM: _next_numbers(before)}
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = call(x)
        drawn = _next_numbers(before)
        inputs = {"x": x} | {k: p for k, p in module.named_parameters() if p.requires_grad}
        weight = torch.linspace(-size, size, y.numel(), dtype=y.dtype, device=y.device).view_as(y)
        loss = (y * weight).sum()
        gradients = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
    found = {k: torch.zeros(()) if g is None else g for k, g in zip(inputs, gradients)}
    return {"": y.detach(), **found, RANDOM: drawn}


def _numpy_state() -> tuple[Any, ...]:
    """Return the state of numpy's random generator, `()` if numpy is not loaded."""
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return ()
    kind, keys, *rest = numpy.random.get_state()
    return kind, keys.tobytes(), *rest


def _next_numbers(before: tuple[Any, ...]) -> Tensor:
    """Return the next numbers of the random generators, and whether numpy's has moved."""
    drawn = torch.tensor([random.getrandbits(31), _numpy_state() != before], dtype=torch.float64)
    return torch.cat([drawn, torch.rand(1, dtype=torch.float64)])


def require_close(
    expected: dict[str, Tensor], actual: dict[str, Tensor], tolerance: float, where: str
) -> None:
    """Raise a MismatchError if a star differs from the module by more than roundings."""
    for name, a in expected.items():
        b = actual[name]
        what = "its output" if not name else f"the gradient of {name!r}"
        if name == RANDOM and not torch.equal(a, b):
            raise MismatchError("its forward draws random numbers, which a star does not")
        if a.shape != b.shape or a.dtype != b.dtype:
            raise MismatchError(f"written as a star, {what} is {b.dtype} {tuple(b.shape)}")
        finite = a.isfinite()
        error = torch.where(finite, (a - b).abs(), 0).nan_to_num(torch.inf)
        size = torch.where(finite, a.abs(), 0)
        off = float(error.max() / size.max().clamp_min(1e-30)) if a.numel() else 0.0
        if off > tolerance:
            raise MismatchError(f"written as a star, {what} differs by {off:.2g} {where}")
