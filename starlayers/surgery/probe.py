"""Trying a site before it is touched: run its module on random input, as it is and replaced."""

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from starlayers.surgery.gated import GatedMLP, Role
from starlayers.surgery.install import install_plain
from starlayers.surgery.recipes import is_sequence, recognise
from starlayers.surgery.shadow import shadow
from starlayers.surgery.site import (
    Site,
    attribute,
    dtype_and_device,
    halves,
    projection,
    put,
    unfloatable,
)

__all__ = ["Verdict", "verify"]

SEED = 0x57A4


class MismatchError(Exception):
    """A module does not compute the formula of a site; the message says where it differs."""


class Verdict:
    """What a trial found: the site with its branches in the right order, or why there is none."""

    def __init__(
        self, site: Site, reason: str | None = None, between: tuple[str, ...] = ()
    ) -> None:
        self.site = site
        self.reason = reason
        self.between = between


def verify(owner: nn.Module, site: Site) -> Verdict:
    """Run `owner`, or the part of it that holds the MLP, and compare with the site's formula.

    The run is of a shadow: the same parameters in other module objects, without hooks and with
    buffers of its own, so that nothing of the model is touched. A module on the meta device is
    tried with random weights.

    Example:
        >>> mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
        >>> verify(mlp, Site("sequential", "plain", "0", "1", "2")).reason is None
        True
    """
    for name in filter(None, (site.inp, site.up)):
        part = attribute(owner, name)
        reason = unfloatable(part) if projection(part) else f"{name!r} is no linear map of channels"
        if reason is not None:
            return Verdict(site, reason)
    first: str | None = None
    for variant in site.variants():
        try:
            with torch.device("cpu"):  # whatever device the model is being made on
                return Verdict(variant, None, _try(owner, variant))
        except MismatchError as error:
            first = first or str(error)
    return Verdict(site, first)


def _try(owner: nn.Module, site: Site) -> tuple[str, ...]:
    body, local = _body(owner, site)
    if "forward" in vars(body):
        raise MismatchError("its forward is replaced on the instance: starify before that")
    inp = attribute(body, local.inp)
    sizes = projection(inp)
    assert sizes is not None
    dtype, device = dtype_and_device(inp)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(SEED)
        n = sizes.in_features
        shape = (2, n, 3, 3) if sizes.channels_first else (2, 3, n)
        x = torch.randn(shape, dtype=dtype, device=device)
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            return _plain(body, local, x) if site.form == "plain" else _gated(body, local, x)


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
    # lists and dicts of modules hold, but do not run
    while shared and type(owner.get_submodule(".".join(shared))).forward is nn.Module.forward:
        shared.pop()
    return ".".join(shared)


def _inside(name: str | None, prefix: str) -> str | None:
    if name is None or not prefix:
        return name
    return name.removeprefix(prefix + ".") if name.startswith(prefix + ".") else None


def _plain(body: nn.Module, site: Site, x: Tensor) -> tuple[str, ...]:
    with _recorded(body, site) as calls:
        want = run(body, x, train=False)
    for name in (site.inp, site.act):
        if len(calls.of(name)) != 1:
            raise MismatchError(f"one run calls {name!r} {len(calls.of(name))} times, not once")
    if not _same(calls.of(site.act)[0].taken, calls.of(site.inp)[0].given):
        raise MismatchError(f"{site.act!r} is not applied to the output of {site.inp!r}")
    want_train = run(body, x, train=True)
    star = install_plain(body, site, "full")
    _equal(want, run(body, x, train=False), "with a zero gate")
    _equal(want_train, run(body, x, train=True), "with a zero gate in training")
    for parameter in star.gate.parameters():
        nn.init.normal_(parameter)
    if _tensors_equal(want, run(body, x, train=False)):
        raise MismatchError("a gate there has no effect on the output")
    return ()


def _gated(body: nn.Module, site: Site, x: Tensor) -> tuple[str, ...]:
    taken = [
        p
        for p in inspect.signature(body.forward).parameters.values()
        if p.kind is not p.VAR_KEYWORD
    ]
    if len(taken) != 1:
        raise MismatchError(f"its forward takes {len(taken)} arguments, not the input alone")
    with _recorded(body, site, everything=True) as calls:
        want = run(body, x, train=False)
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
    want_train = run(body, x, train=True)
    role = Role(site, type(body), recognise(attribute(body, site.act)), between, fused=False)
    GatedMLP.adopt(body, role)
    _equal(want, run(body, x, train=False), "written as a star")
    _equal(want_train, run(body, x, train=True), "written as a star, in training")
    return between


def run(body: nn.Module, x: Tensor, *, train: bool) -> Any:
    """The output of a module on one input, what else it needs being None or that input too.

    Raises:
        MismatchError: it does not run.
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
        torch.manual_seed(SEED)
        try:
            with _buffers_kept(body):
                return body.forward(x.clone(), **dict.fromkeys(needed, filling))
        except Exception as problem:  # a foreign module may raise anything
            error = error or problem
    first = str(error).strip().splitlines()[0][:120] if str(error).strip() else ""
    raise MismatchError(
        f"{type(body).__name__} does not run by itself: {type(error).__name__} {first}"
    )


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


class _Call:
    def __init__(self, taken: Tensor, given: Tensor) -> None:
        self.taken = taken
        self.given = given


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
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


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
        off = max(
            (float((a - b).abs().max()) for a, b in zip(_leaves(want), _leaves(got))), default=0
        )
        raise MismatchError(f"{when}, its output differs by {off:.2g}")
