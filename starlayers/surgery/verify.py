"""Verify a claimed MLP before it is replaced."""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from starlayers.activations import ACTIVATIONS
from starlayers.surgery.callers import call_in_forward
from starlayers.surgery.forwards import remedy, replaced_forward
from starlayers.surgery.install import install_plain
from starlayers.surgery.linear_layers import (
    Projection,
    base_layer,
    dtype_and_device,
    gate_blocker,
    projection,
    weight_of,
)
from starlayers.surgery.outside import untouched
from starlayers.surgery.reads import EVERY, Attributes, Reads, unnamed_attributes
from starlayers.surgery.recipes import is_sequence, runs
from starlayers.surgery.sandbox import (
    default_state,
    sandbox_copy,
    seed_generators,
    usual_tensor,
)
from starlayers.surgery.site import Site, attribute
from starlayers.surgery.snapshot import signature
from starlayers.surgery.trial_run import (
    CallLog,
    CannotRunError,
    MismatchError,
    first_line,
    recorded,
    run,
)
from starlayers.surgery.unseen import unseen
from starlayers.surgery.verify_act import name_of_act
from starlayers.surgery.verify_gated import verify_gated
from starlayers.surgery.verify_hidden import verify_hidden

#: factors of the branches in the trial runs: limits only act far from zero
SCALES = (1.0, 1e-2, 30.0, 1e3, 1e6)

#: verdicts by the signature of what was verified, each with the values of unnamed attributes that
#: were read for it, and the objects whose ids are in the signature
Cache = dict[Any, list[tuple["Verdict", Attributes, Any]]]

#: verdicts on gated MLPs, which rest on no value of a tensor
_gated: Cache = {}
MOST_VERDICTS = 256


class Verdict(NamedTuple):
    """Result of `verify`: the site, or the reason why it cannot be replaced.

    The branches of the site are in the right order. `between` are the names of the modules between
    the product of a gated MLP and its last layer, `after` those after that. `act_name` is the
    activation's name in `ACTIVATIONS`, `None` if it has none, and `act` the activation in words.
    `up_first` and `casts` are as for `Role`.
    """

    site: Site
    reason: str | None = None
    between: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    act_name: str | None = None
    act: str = ""
    up_first: bool = False
    casts: bool = True


def verify(
    owner: nn.Module,
    site: Site,
    caller: tuple[nn.Module, str] | None = None,
    cache: Cache | None = None,
) -> Verdict:
    """Verify that an MLP computes the formula of its site, and nothing else.

    A gated MLP is verified by the graph of its forward and by values (`verify_gated`). A plain MLP
    keeps its own forward, so the deepest part of `owner` that contains it is run as it is and as a
    star: in eval mode and in train mode with seeded dropout, with and without gradients, in two
    dtypes, with the first layer at all `SCALES`. Outputs, gradients and tensors that the forward
    keeps in attributes must be equal to the bit, and a random gate must have an effect.

    Copies without hooks are run, so the model, its buffers and all random generators stay as they
    are. Of a module on the meta device the copy has random weights and is on the CPU.

    `caller` is, for an MLP in an `nn.Sequential`, the module that calls the sequence, and the name
    of the sequence in it. It may call layers of the sequence one by one, so if it runs by itself
    on the MLP's input its output must stay the same, too. `cache` has the verdicts on plain MLPs
    of the same signature in one model.
    """
    reads: Reads = set()
    unnamed: Attributes = {}
    keys: Any
    kept: Any
    if site.form == "plain":
        store = {} if cache is None else cache
        modules = [owner.get_submodule(_deepest_common(owner, site)), *(caller or ())[:1]]
        keys, kept = zip(*map(signature, modules))
    else:
        store = _gated
        unnamed = unnamed_attributes(owner, site.layers)
        own, kept = signature(owner, site.layers, unnamed)
        keys = own, *(_stood_in(attribute(owner, name)) for name in site.layers)
    key = site, keys, tuple(map(id, ACTIVATIONS.values())), caller and caller[1]
    for known, read, _ in store.get(key, []):
        if all(unnamed[name] == value for name, value in read.items()):
            return known
    try:
        with untouched(owner, site.layers, forbidden=site.form != "plain"):
            verdict = _verified(owner, site, caller, reads)
    except MismatchError as error:
        verdict = Verdict(site, str(error))
    except Exception as error:  # a foreign module may raise anything
        verdict = Verdict(site, f"it cannot be tried: {first_line(error)}")
    if len(store) >= MOST_VERDICTS:
        store.clear()
    read = {name: value for name, value in unnamed.items() if name in reads or EVERY in reads}
    store.setdefault(key, []).append((verdict, read, (*kept, *ACTIVATIONS.values())))
    return verdict


def _stood_in(layer: nn.Module) -> Any:
    """Return what a verification knows of a linear layer, for which a plain one stands in."""
    base, weight = base_layer(layer), weight_of(layer)
    bias = getattr(base, "bias", None) is not None
    place = dtype_and_device(layer)[1] if projection(layer) else None
    return type(layer), type(base), type(weight), projection(layer), bias, place


def _verified(
    owner: nn.Module, site: Site, caller: tuple[nn.Module, str] | None, reads: Reads
) -> Verdict:
    """Return the verdict on an MLP, or raise an error with the reason."""
    for name in filter(None, (site.inp, site.up)):
        if projection(attribute(owner, name)) is None:
            raise MismatchError(f"{name!r} is no linear map")
    reason = gate_blocker(attribute(owner, site.inp)) if site.form == "plain" else None
    if reason is not None:
        raise MismatchError(reason)
    device = dtype_and_device(attribute(owner, site.inp))[1]
    device = torch.device("cpu") if device.type == "meta" else device
    with default_state(device):
        if site.form != "plain":
            _require_own_forward(owner)
            if hidden := unseen(owner, site.layers):
                raise MismatchError(hidden)
            formula, act_name, casts = verify_gated(owner, site, reads)
            between, after, act = formula.between, formula.after, formula.act
            first = formula.up_first
            return Verdict(formula.site, None, between, after, act_name, act, first, casts)
        if site.act is None:
            return Verdict(site, act_name=verify_hidden(owner, site))
        _compare_plain(*_runnable_part(owner, site))
        if caller is not None:
            _compare_in_caller(*caller, site)
        return named(owner, site)


def named(owner: nn.Module, site: Site) -> Verdict:
    """Return the verdict on a plain MLP that was verified: the name of its activation."""
    return Verdict(site, act_name=name_of_act(attribute(owner, site.act or "")))


def _require_own_forward(body: nn.Module) -> None:
    if replaced := replaced_forward(body):
        raise MismatchError(f"{replaced}: {remedy(replaced)}")


def _runnable_part(owner: nn.Module, site: Site) -> tuple[nn.Module, Site]:
    """Return a copy of the part that runs the MLP, and the site in it."""
    if is_sequence(owner) and site.inp in owner._modules:
        names = list(owner._modules)
        start, end = names.index(site.inp), names.index(site.act or "")
        layers = OrderedDict((name, owner._modules[name]) for name in names[start : end + 1])
        part = nn.Sequential(layers).train(owner.training)  # type: ignore[arg-type]
        return sandbox_copy(part, make=usual_tensor), replace(site, out=None)
    prefix = _deepest_common(owner, site)
    base = f"{prefix}." if prefix else ""
    parts: dict[str, Any] = {key: getattr(site, key) for key in ("inp", "act", "out", "up")}
    for key, name in parts.items():  # a part that lies outside of the module is None
        parts[key] = name[len(base) :] if name and name.startswith(base) else None
    part = sandbox_copy(owner.get_submodule(prefix), make=usual_tensor)
    return part, replace(site, **parts)


def _deepest_common(owner: nn.Module, site: Site) -> str:
    """Return the name of the deepest module that runs `inp` and `act`."""
    inp, act = site.inp.split(".")[:-1], (site.act or "").split(".")[:-1]
    shared = [a for a, b in zip(inp, act) if a == b]
    while shared and not runs(owner.get_submodule(".".join(shared))):
        shared.pop()
    return ".".join(shared)


def _compare_in_caller(caller: nn.Module, sequence: str, site: Site) -> None:
    """Compare the caller of a sequence as it is and with the MLP replaced."""
    inp, act = f"{sequence}.{site.inp}", f"{sequence}.{site.act}"
    try:
        if any(p.is_meta for p in caller.parameters()):
            # it may be a whole model, too large for random weights on the CPU
            raise CannotRunError("it has no weights")
        _compare_plain(sandbox_copy(caller, share=True), replace(site, inp=inp, act=act, out=None))
    except CannotRunError:  # most callers take other input than the MLP does
        if other := call_in_forward(caller, inp):
            raise MismatchError(f"{other} calls {inp!r} by itself, and cannot be tried") from None


#: shape of an input
Shape = tuple[int, ...]


def _shape_that_runs(body: nn.Module, inp: nn.Module) -> Shape:
    """Return the first shape of input with which a module runs: sequences, maps, or one sequence.

    Of the layers around an MLP some take maps (ConvNeXt), channels before positions (mixers), or
    several sequences in one.
    """
    sizes = projection(inp) or Projection(1, 1)
    n = sizes.in_features
    maps, sequences = (2, n, 3, 3), (2, 3, n)
    shapes: list[Shape] = [maps] if sizes.channels_first else [sequences, maps, (2, n, 3), (6, n)]
    problem: CannotRunError | None = None
    for shape in shapes:
        try:
            run(body, _random_input(inp, shape))
        except CannotRunError as error:
            problem = problem or error
        else:
            return shape
    raise problem or CannotRunError("it takes no input")


def _random_input(inp: nn.Module, shape: Shape) -> Tensor:
    """Return normal input of a shape, in the dtype of a linear layer."""
    dtype, device = dtype_and_device(inp)
    seed_generators(device)
    return torch.randn(shape, dtype=dtype, device=device)


def _compare_plain(body: nn.Module, site: Site) -> None:
    """Compare a module with itself after its MLP is replaced."""
    _require_own_forward(body)
    dtype = dtype_and_device(attribute(body, site.inp))[0]
    shape = _shape_that_runs(body, attribute(body, site.inp))
    _compare_in_dtype(sandbox_copy(body, share=True), site, shape)
    for other in {torch.float32, torch.bfloat16, torch.float16, torch.float64} - {dtype}:
        converted = sandbox_copy(body).to(other)
        try:
            run(converted, _random_input(attribute(converted, site.inp), shape))
        except CannotRunError:
            continue  # it asks for its own dtype
        try:
            _compare_in_dtype(converted, site, shape)
        except MismatchError as error:
            raise MismatchError(f"in {other}: {error}") from error


def _require_direct(body: nn.Module, site: Site, shape: Shape) -> None:
    """Raise a MismatchError unless the activation takes the first layer's output, always.

    The module is run on inputs of other shapes and strides too, with and without gradients, in
    inference mode and under autocast; what does not run there has no say.
    """
    inp, act = attribute(body, site.inp), site.act or ""
    n = (projection(inp) or Projection(1, 1)).in_features
    first = projection(inp) is not None and projection(inp).channels_first  # type: ignore[union-attr]
    shapes: list[Shape] = [(1, *shape[1:])]
    if not first and len(shape) == 3:
        shapes += [(3, n), (1, n), (1, 1, n), (2, 1, n), (1, 600, n)]
    inputs = [_random_input(inp, other) for other in [shape, *shapes]]
    if not first and len(shape) == 3:
        inputs.append(_random_input(inp, (shape[1], shape[0], n)).transpose(0, 1))
    kind = inputs[0].device.type
    modes: dict[str, Any] = {
        "": torch.no_grad,
        "with gradients: ": torch.enable_grad,
        "in inference mode: ": torch.inference_mode,
        "under autocast: ": lambda: torch.autocast(kind, torch.bfloat16),
    }
    for x, (words, mode), train in product(inputs, modes.items(), (False, True)):
        try:
            with mode():
                log = _recorded_run(body, x, [site.inp, act], train)
        except CannotRunError:
            continue
        direct = len(log.of(site.inp)) == len(log.of(act)) == 1 and _equal_tensors(
            log.of(act)[0].input, log.of(site.inp)[0].output
        )
        if not direct:
            raise MismatchError(
                f"{words}{act!r} is not applied to the output of {site.inp!r} for input of shape "
                f"{tuple(x.shape)}"
            )


def _compare_in_dtype(body: nn.Module, site: Site, shape: Shape) -> None:
    inp, act = attribute(body, site.inp), site.act or ""
    x = _random_input(inp, shape)
    for scale, train in product(SCALES, (False, True)):
        with _scaled(inp, scale):
            log = _recorded_run(body, x, [site.inp, act], train)
        for name in (site.inp, act):
            if len(log.of(name)) != 1:
                raise MismatchError(f"one run calls {name!r} {len(log.of(name))} times, not once")
        if not _equal_tensors(log.of(act)[0].input, log.of(site.inp)[0].output):
            raise MismatchError(f"{act!r} is not applied to the output of {site.inp!r}")
    _require_direct(body, site, shape)
    parameters = [p for p in body.parameters() if p.requires_grad]
    expected = _trials(body, inp, shape, parameters)
    star = install_plain(body, site, "full")
    _require_equal(expected, _trials(body, inp, shape, parameters), "with a zero gate")
    for train in (False, True):
        with _spread(inp):
            before = _after_gate(body, site, x, train)
        kept = [p.detach().clone() for p in star.gate.parameters()]
        for parameter in star.gate.parameters():
            nn.init.normal_(parameter)
        with _spread(inp):
            after = _after_gate(body, site, x, train)
        if _equal(before, after):
            raise MismatchError("a gate there has no effect on what follows")
        for parameter, zero in zip(star.gate.parameters(), kept):
            parameter.copy_(zero)


def _after_gate(body: nn.Module, site: Site, x: Tensor, train: bool) -> Any:
    """Return the inputs of the last layer, or the output if there is none.

    The output would not show a gate if the weights of the last layer are zero.
    """
    if site.out is None:
        return run(body, x, train=train)
    return [call.input for call in _recorded_run(body, x, [site.out], train).of(site.out)]


def _recorded_run(body: nn.Module, x: Tensor, names: list[str], train: bool) -> CallLog:
    """Run a module, and return the log of its named parts."""
    with recorded(body, names) as log:
        run(body, x, train=train, log=log)
    return log


def _trials(
    body: nn.Module, inp: nn.Module, shape: Shape, parameters: list[nn.Parameter]
) -> list[Any]:
    """Return results in all modes, `inp` scaled by `SCALES`: outputs, attributes, gradients."""
    results: list[Any] = []
    for scale, train, grad in product(SCALES, (False, True), (False, True)):
        x = _random_input(inp, shape).requires_grad_(grad)
        kept = [(m, dict(vars(m))) for m in body.modules()]
        with torch.set_grad_enabled(grad), _scaled(inp, scale):
            y = run(body, x, train=train)
            results.append(y)
            results += [_kept_tensors(m, state) for m, state in kept]
            if grad:
                results.append(_gradients(y, [x, *parameters]))
        for module, state in kept:
            vars(module).clear()
            vars(module).update(state)
    return results


@contextmanager
def _scaled(layer: nn.Module, scale: float) -> Iterator[None]:
    """Multiply the output of a layer by a number while the block runs."""
    handle = layer.register_forward_hook(lambda _, args, y: y * scale)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _spread(layer: nn.Module) -> Iterator[None]:
    """Add numbers from -2 to 2 to the output of a layer: with zero weights it is zero itself."""
    handle = layer.register_forward_hook(
        lambda _, args, y: y + torch.linspace(-2, 2, y.numel()).to(y).view_as(y)
    )
    try:
        yield
    finally:
        handle.remove()


def _kept_tensors(module: nn.Module, before: dict[str, Any]) -> list[Tensor]:
    """Return the tensors that a run put into attributes of a module."""
    changed = (v for k, v in vars(module).items() if before.get(k) is not v)
    return [t.detach() for value in changed for t in _tensors(value)]


def _gradients(y: Any, inputs: list[Any]) -> list[Tensor]:
    """Return the gradients of the outputs, summed with weights from -1 to 1."""
    outputs = [t for t in _tensors(y) if t.requires_grad]
    inputs = [t for t in inputs if t.requires_grad]
    if not outputs or not inputs:
        return []
    sums = [(t * torch.linspace(-1, 1, t.numel()).to(t).view_as(t)).sum() for t in outputs]
    gradients = torch.autograd.grad(sum(sums), inputs, allow_unused=True)  # type: ignore[arg-type]
    return [torch.zeros(()) if g is None else g for g in gradients]


def _require_equal(expected: Any, actual: Any, condition: str) -> None:
    """Raise a MismatchError with the largest difference if tensors differ."""
    if not _equal(expected, actual):
        pairs = list(zip(_tensors(expected), _tensors(actual)))
        off = max((float((a - b).abs().nan_to_num().max()) for a, b in pairs), default=0.0)
        if not off:
            raise MismatchError(
                f"{condition}, a gradient is missing, or overflows where the module's does not"
            )
        raise MismatchError(f"{condition}, its output differs by {off:.2g}")


def _equal(a: Any, b: Any) -> bool:
    """Return True if two nests hold equally many tensors, and all pairs are equal."""
    first, second = _tensors(a), _tensors(b)
    return len(first) == len(second) and all(map(_equal_tensors, first, second))


def _equal_tensors(a: Tensor, b: Tensor) -> bool:
    """Return True if shapes and dtypes agree, and all values where `a` is finite."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(((a == b) | ~a.isfinite()).all())


def _tensors(value: Any) -> list[Tensor]:
    """Return the tensors in a nest of lists, tuples and dicts, in order."""
    if isinstance(value, Tensor):
        return [value]
    items = list(value.values()) if isinstance(value, dict) else value
    return [t for v in items for t in _tensors(v)] if isinstance(items, (list, tuple)) else []
