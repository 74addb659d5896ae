"""Trying a site before it is touched: run its module on random input, as it is and replaced."""

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from starlayers.surgery.gated import Role, adopt
from starlayers.surgery.install import install_plain
from starlayers.surgery.recipes import is_sequence, recognise, runs
from starlayers.surgery.sandbox import seed, shadow, untraced
from starlayers.surgery.site import (
    Projection,
    Site,
    attribute,
    dtype_and_device,
    gate_blocker,
    halves,
    projection,
    put,
)

__all__ = ["Verdict", "verify"]

#: what the branches are multiplied by: clamps and their like only show far from zero
SCALES = (1.0, 1e-2, 30.0, 1e3)


class MismatchError(Exception):
    """A module does not compute the formula of a site; the message says where it differs."""


class CannotRunError(MismatchError):
    """A module does not run by itself on one input."""


class Verdict(NamedTuple):
    """What a trial found: the site with its branches in the right order, or why there is none."""

    site: Site
    reason: str | None = None
    between: tuple[str, ...] = ()


def verify(owner: nn.Module, site: Site, caller: tuple[nn.Module, str] | None = None) -> Verdict:
    """Run the part of `owner` that holds the MLP, and compare with the site's formula.

    What runs is a shadow: a copy without hooks, so that nothing of the model is touched. A module
    on the meta device is tried with random weights.

    Args:
        owner, site: the claim.
        caller: for a site in a row of layers, the module that calls the row, and the row's name in
            it. Where it runs by itself it must compute the same as well, since it may call layers
            of the row one by one.

    Example:
        >>> mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
        >>> verify(mlp, Site("sequential", "plain", "0", "1", "2")).reason is None
        True
    """
    first: str | None = None
    for variant in site.variants():
        try:
            for name in filter(None, (site.inp, site.up)):
                part = attribute(owner, name)
                reason = gate_blocker(part) if projection(part) else f"{name!r} is no linear map"
                if reason is not None:
                    return Verdict(site, reason)
            device = dtype_and_device(attribute(owner, site.inp))[1]
            device = torch.device("cpu") if device.type == "meta" else device
            # whatever device, mode and dtype the user is working in
            with torch.device("cpu"), untraced(device), _plain_state(device):
                between = _trial(*_body(owner, variant))
                if caller is not None:
                    _called(*caller, variant)
                return Verdict(variant, None, between)
        except MismatchError as error:
            first = first or str(error)
        except Exception as error:  # a foreign module may raise anything
            first = first or f"it cannot be tried: {_said(error)}"
    return Verdict(site, first)


@contextmanager
def _plain_state(device: torch.device) -> Iterator[None]:
    autocast = torch.autocast(device.type, enabled=False)
    with torch.inference_mode(False), torch.no_grad(), autocast:
        yield


def _called(caller: nn.Module, row: str, site: Site) -> None:
    there = Site(site.recipe, site.form, f"{row}.{site.inp}", f"{row}.{site.act}", None)
    if any(p.is_meta for p in caller.parameters()):
        return  # it may be a whole model, too large to be made real
    try:
        _trial(shadow(caller, share=True), there)
    except CannotRunError:
        return  # most modules above a row of layers take other input than the MLP does


def _trial(body: nn.Module, site: Site) -> tuple[str, ...]:
    if "forward" in vars(body):
        raise MismatchError("its forward is replaced on the instance: starify before that")
    inp = attribute(body, site.inp)
    sizes = projection(inp) or Projection(1, 1)
    dtype, device = dtype_and_device(inp)
    seed(device)
    n = sizes.in_features
    shape = (2, n, 3, 3) if sizes.channels_first else (2, 3, n)
    x = torch.randn(shape, dtype=dtype, device=device)
    return _plain(body, site, x) if site.form == "plain" else _gated(body, site, x)


def _body(owner: nn.Module, site: Site) -> tuple[nn.Module, Site]:
    """A shadow of what runs the MLP, and the site by its names there."""
    if is_sequence(owner) and site.inp in owner._modules:
        names = list(owner._modules)
        start, end = names.index(site.inp), names.index(site.act)
        part = nn.Sequential(
            OrderedDict((name, owner._modules[name]) for name in names[start : end + 1])  # type: ignore[misc]
        ).train(owner.training)
        return shadow(part), Site(site.recipe, site.form, site.inp, site.act, None)
    prefix = _running_part(owner, site)
    local = {part: _inside(getattr(site, part), prefix) for part in ("inp", "act", "out", "up")}
    body = shadow(owner.get_submodule(prefix))
    return body, Site(site.recipe, site.form, gate_last=site.gate_last, **local)  # type: ignore[arg-type]


def _running_part(owner: nn.Module, site: Site) -> str:
    """The deepest module that runs both the projection and the activation ("" is the owner)."""
    inp, act = site.inp.split(".")[:-1], site.act.split(".")[:-1]
    shared = [a for a, b in zip(inp, act) if a == b]
    while shared and not runs(owner.get_submodule(".".join(shared))):
        shared.pop()
    return ".".join(shared)


def _inside(name: str | None, prefix: str) -> str | None:
    if name is None or not prefix:
        return name
    return name.removeprefix(prefix + ".") if name.startswith(prefix + ".") else None


def _plain(body: nn.Module, site: Site, x: Tensor) -> tuple[str, ...]:
    inp = attribute(body, site.inp)
    with _recorded(body, site) as calls:
        run(body, x, calls=calls)
    for name in (site.inp, site.act):
        if len(calls.of(name)) != 1:
            raise MismatchError(f"one run calls {name!r} {len(calls.of(name))} times, not once")
    if not _same(calls.of(site.act)[0].taken, calls.of(site.inp)[0].given):
        raise MismatchError(f"{site.act!r} is not applied to the output of {site.inp!r}")
    want = _at_all_scales(body, x, [inp])
    star = install_plain(body, site, "full")
    _equal(want, _at_all_scales(body, x, [inp]), "with a zero gate")
    before = _seen(body, site, x)
    for parameter in star.gate.parameters():
        nn.init.normal_(parameter)
    if _tensors_equal(before, _seen(body, site, x)):
        raise MismatchError("a gate there has no effect on what follows")
    return ()


def _seen(body: nn.Module, site: Site, x: Tensor) -> Any:
    """What the last projection takes, which may itself be zero, or else the output."""
    if site.out is None:
        return run(body, x)
    with _recorded(body, site) as calls:
        run(body, x, calls=calls)
    return [call.taken for call in calls.of(site.out)]


def _gated(body: nn.Module, site: Site, x: Tensor) -> tuple[str, ...]:
    parameters = inspect.signature(body.forward).parameters.values()
    taken = [p for p in parameters if p.kind is not p.VAR_KEYWORD]
    if len(taken) != 1:
        raise MismatchError(f"its forward takes {len(taken)} arguments, not the input alone")
    with _recorded(body, site, everything=True) as calls:
        want = run(body, x, calls=calls)
    out = calls.of(site.out or "")
    if len(out) != 1 or len(calls.of(site.inp)) != 1:
        raise MismatchError(f"one run does not call {site.inp!r} and {site.out!r} once each")
    h = calls.of(site.inp)[0].given
    a, b = halves(h, site) if site.up is None else (h, calls.of(site.up)[0].given)
    product = attribute(body, site.act)(a) * b
    if not _same(out[0].taken.to(product.dtype), product):
        raise MismatchError(
            f"{site.out!r} does not take {site.act}({site.inp}) times the other branch"
        )
    if not _tensors_equal(want, out[0].given):
        raise MismatchError(f"its output is not that of {site.out!r}")
    own = {site.inp, site.up, site.out, site.act}
    between = tuple(
        name
        for name, call in calls.order
        if name not in own and _same(call.taken, product) and _same(call.given, product)
    )
    branches = [attribute(body, name) for name in (site.inp, site.up) if name is not None]
    wanted = _at_all_scales(body, x, branches)
    row = recognise(attribute(body, site.act))
    adopt(body, Role(site, type(body), row, between, fused=False))
    _equal(wanted, _at_all_scales(body, x, branches), "written as a star")
    return between


def _at_all_scales(body: nn.Module, x: Tensor, branches: list[nn.Module]) -> list[Any]:
    """Outputs in eval mode and, with seeded dropout, in train mode, the branches scaled."""
    found = []
    for scale in SCALES:
        handles = [
            branch.register_forward_hook(lambda _, args, y, scale=scale: y * scale)
            for branch in branches
        ]
        try:
            found += [run(body, x, train=train) for train in (False, True)]
        finally:
            for handle in handles:
                handle.remove()
    return found


def run(body: nn.Module, x: Tensor, *, train: bool = False, calls: "_Calls | None" = None) -> Any:
    """The output of a module on one input, what else it needs being None or that input too.

    Raises:
        CannotRunError: it does not run.
    """
    body.train(train)
    parameters = list(inspect.signature(body.forward).parameters.values())[1:]
    needed = [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    error: Exception | None = None
    for filling in (None, x) if needed else (None,):
        seed(x.device)
        if calls is not None:
            calls.order.clear()  # of an attempt that failed half way
        try:
            with _buffers_kept(body):
                return body.forward(x.clone(), **dict.fromkeys(needed, filling))
        except Exception as problem:  # a foreign module may raise anything
            error = error or problem
    raise CannotRunError(f"{type(body).__name__} does not run by itself: {_said(error)}")


def _said(error: Exception | None) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__} {lines[0][:120]}"


@contextmanager
def _buffers_kept(body: nn.Module) -> Iterator[None]:
    """Let every run start from the same running statistics and counters."""
    kept = [
        (m, {k: b if b is None else b.clone() for k, b in m._buffers.items()})
        for m in body.modules()
    ]
    try:
        yield
    finally:
        for module, buffers in kept:
            module._buffers.update(buffers)


class _Call(NamedTuple):
    taken: Tensor
    given: Tensor


class _Calls:
    def __init__(self) -> None:
        self.order: list[tuple[str, _Call]] = []

    def of(self, name: str) -> list[_Call]:
        return [call for called, call in self.order if called == name]


@contextmanager
def _recorded(body: nn.Module, site: Site, *, everything: bool = False) -> Iterator[_Calls]:
    """Keep what the parts of a site take and give while the block runs."""
    calls = _Calls()
    names = [name for name, _ in body.named_modules() if name] if everything else []
    names += [name for name in (site.inp, site.act, site.out) if name and name not in names]
    undo: list[Callable[[], object]] = []
    for name in names:
        part = attribute(body, name)
        if isinstance(part, nn.Module):
            undo += _watch(part, name, calls)
        else:
            put(body, name, _watched(part, name, calls))
            undo.append(lambda name=name, part=part: put(body, name, part))  # type: ignore[misc]
    try:
        yield calls
    finally:
        for action in undo:
            action()


def _watch(part: nn.Module, name: str, calls: _Calls) -> list[Callable[[], object]]:
    pending: list[Tensor] = []

    def before(_: nn.Module, args: tuple[Any, ...]) -> None:
        pending.append(args[0].clone() if args and isinstance(args[0], Tensor) else torch.empty(0))

    def after(_: nn.Module, args: tuple[Any, ...], y: Any) -> None:
        given = y.clone() if isinstance(y, Tensor) else torch.empty(0)
        calls.order.append((name, _Call(pending.pop(), given)))

    handles = [part.register_forward_pre_hook(before), part.register_forward_hook(after)]
    return [handle.remove for handle in handles]


def _watched(f: Callable[[Tensor], Tensor], name: str, calls: _Calls) -> Callable[[Tensor], Tensor]:
    def watched(x: Tensor) -> Tensor:
        taken = x.clone()
        y = f(x)
        calls.order.append((name, _Call(taken, y.clone())))
        return y

    return watched


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit wherever the first is finite."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(((a == b) | ~a.isfinite()).all())


def _leaves(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items = list(value.values()) if isinstance(value, dict) else value
    return [t for v in items for t in _leaves(v)] if isinstance(items, (list, tuple)) else []


def _tensors_equal(a: Any, b: Any) -> bool:
    first, second = _leaves(a), _leaves(b)
    return len(first) == len(second) and all(map(_same, first, second))


def _equal(want: Any, got: Any, when: str) -> None:
    if not _tensors_equal(want, got):
        pairs = zip(_leaves(want), _leaves(got))
        off = max((float((a - b).abs().nan_to_num().max()) for a, b in pairs), default=0.0)
        raise MismatchError(f"{when}, its output differs by {off:.2g}")
