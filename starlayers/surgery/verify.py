"""Verify a claimed MLP by a trial run before it is replaced."""

import inspect
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from starlayers.surgery.forwards import remedy, replaced_forward
from starlayers.surgery.gated import Role, adopt, split_packed
from starlayers.surgery.install import install_plain
from starlayers.surgery.linear_layers import Projection, dtype_and_device, gate_blocker, projection
from starlayers.surgery.recipes import is_sequence, recognise, runs
from starlayers.surgery.sandbox import preserved_generators, sandbox_copy, seed_generators
from starlayers.surgery.site import Site, attribute
from starlayers.surgery.trial_run import (
    CallLog,
    CannotRunError,
    MismatchError,
    first_line,
    recorded,
    run,
)

#: factors of the branches in the trial runs: clamps and the like only act far from zero
SCALES = (1.0, 1e-2, 30.0, 1e3)


class Verdict(NamedTuple):
    """Result of `verify`: the site, or the reason why it cannot be replaced.

    The branches of the site are in the right order. `between` are the names of the modules between
    the product of a gated MLP and its last layer.
    """

    site: Site
    reason: str | None = None
    between: tuple[str, ...] = ()


def verify(owner: nn.Module, site: Site, caller: tuple[nn.Module, str] | None = None) -> Verdict:
    """Run an MLP as it is and as a star, and compare the outputs.

    The deepest part of `owner` that contains the MLP is run on random input, in eval mode and in
    train mode with seeded dropout, with the branches at all `SCALES`. The outputs must be equal to
    the bit, and a random gate must have an effect.

    A copy without hooks is run, so the model, its buffers and all random generators stay as they
    are. Of a module on the meta device the copy has random weights and is on the CPU.

    `caller` is, for an MLP in an `nn.Sequential`, the module that calls the sequence, and the name
    of the sequence in it. It may call layers of the sequence one by one, so if it runs by itself
    on the MLP's input its output must stay the same, too.
    """
    reasons = []
    for variant in site.variants():
        try:
            return Verdict(variant, None, _verify_variant(owner, variant, caller))
        except MismatchError as error:
            reasons.append(str(error))
        except Exception as error:  # a foreign module may raise anything
            reasons.append(f"it cannot be tried: {first_line(error)}")
    return Verdict(site, reasons[0])


def _verify_variant(
    owner: nn.Module, site: Site, caller: tuple[nn.Module, str] | None
) -> tuple[str, ...]:
    """Return the `between` of a verdict, or raise an error with the reason."""
    for name in filter(None, (site.inp, site.up)):
        part = attribute(owner, name)
        reason = gate_blocker(part) if projection(part) else f"{name!r} is no linear map"
        if reason is not None:
            raise MismatchError(reason)
    device = dtype_and_device(attribute(owner, site.inp))[1]
    device = torch.device("cpu") if device.type == "meta" else device
    with _default_state(device):
        between = _compare(*_runnable_part(owner, site))
        if caller is not None:
            _compare_in_caller(*caller, site)
    return between


@contextmanager
def _default_state(device: torch.device) -> Iterator[None]:
    """Run the block without the user's device, gradients, autocast and seeds."""
    with (
        torch.device("cpu"),
        preserved_generators(device),
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
    ):
        yield


def _runnable_part(owner: nn.Module, site: Site) -> tuple[nn.Module, Site]:
    """Return a copy of the part that runs the MLP, and the site in it."""
    if is_sequence(owner) and site.inp in owner._modules:
        names = list(owner._modules)
        start, end = names.index(site.inp), names.index(site.act)
        layers = OrderedDict((name, owner._modules[name]) for name in names[start : end + 1])
        part = nn.Sequential(layers).train(owner.training)  # type: ignore[arg-type]
        return sandbox_copy(part), replace(site, out=None)
    prefix = _deepest_common_module(owner, site)
    base = f"{prefix}." if prefix else ""
    parts: dict[str, Any] = {key: getattr(site, key) for key in ("inp", "act", "out", "up")}
    for key, name in parts.items():  # a part that lies outside of the module is None
        parts[key] = name[len(base) :] if name and name.startswith(base) else None
    return sandbox_copy(owner.get_submodule(prefix)), replace(site, **parts)


def _deepest_common_module(owner: nn.Module, site: Site) -> str:
    """Return the name of the deepest module that runs `inp` and `act`."""
    inp, act = site.inp.split(".")[:-1], site.act.split(".")[:-1]
    shared = [a for a, b in zip(inp, act) if a == b]
    while shared and not runs(owner.get_submodule(".".join(shared))):
        shared.pop()
    return ".".join(shared)


def _compare(body: nn.Module, site: Site) -> tuple[str, ...]:
    """Compare a module with itself after its MLP is replaced; return its `between`."""
    if replaced := replaced_forward(body):
        raise MismatchError(f"{replaced}: {remedy(replaced)}")
    x = _random_input(attribute(body, site.inp))
    if site.form == "plain":
        _compare_plain(body, site, x)
        return ()
    return _compare_gated(body, site, x)


def _compare_in_caller(caller: nn.Module, sequence: str, site: Site) -> None:
    """Compare the caller of a sequence as it is and with the MLP replaced."""
    if any(p.is_meta for p in caller.parameters()):
        return  # it may be a whole model, too large for random weights on the CPU
    inp, act = f"{sequence}.{site.inp}", f"{sequence}.{site.act}"
    try:
        _compare(sandbox_copy(caller, share=True), replace(site, inp=inp, act=act, out=None))
    except CannotRunError:
        return  # most callers take other input than the MLP does


def _random_input(inp: nn.Module) -> Tensor:
    """Return normal input: two sequences of 3 positions, or maps of 3x3."""
    sizes = projection(inp) or Projection(1, 1)
    dtype, device = dtype_and_device(inp)
    seed_generators(device)
    n = sizes.in_features
    shape = (2, n, 3, 3) if sizes.channels_first else (2, 3, n)
    return torch.randn(shape, dtype=dtype, device=device)


def _compare_plain(body: nn.Module, site: Site, x: Tensor) -> None:
    inp = attribute(body, site.inp)
    log = _recorded_run(body, x, [site.inp, site.act])
    for name in (site.inp, site.act):
        if len(log.of(name)) != 1:
            raise MismatchError(f"one run calls {name!r} {len(log.of(name))} times, not once")
    if not _equal_tensors(log.of(site.act)[0].input, log.of(site.inp)[0].output):
        raise MismatchError(f"{site.act!r} is not applied to the output of {site.inp!r}")
    expected = _outputs_at_scales(body, x, [inp])
    star = install_plain(body, site, "full")
    _require_equal(expected, _outputs_at_scales(body, x, [inp]), "with a zero gate")
    before = _after_gate(body, site, x)
    for parameter in star.gate.parameters():
        nn.init.normal_(parameter)
    if _equal(before, _after_gate(body, site, x)):
        raise MismatchError("a gate there has no effect on what follows")


def _after_gate(body: nn.Module, site: Site, x: Tensor) -> Any:
    """Return the inputs of the last layer, or the output if there is none.

    The output would not show a gate if the weights of the last layer are zero.
    """
    if site.out is None:
        return run(body, x)
    return [call.input for call in _recorded_run(body, x, [site.out]).of(site.out)]


def _compare_gated(body: nn.Module, site: Site, x: Tensor) -> tuple[str, ...]:
    parameters = inspect.signature(body.forward).parameters.values()
    arguments = [p for p in parameters if p.kind is not p.VAR_KEYWORD]
    if len(arguments) != 1:
        raise MismatchError(f"its forward takes {len(arguments)} arguments, not the input alone")
    parts = [name for name in (site.inp, site.act, site.out) if name]
    modules = [name for name, _ in body.named_modules() if name]
    log = _recorded_run(body, x, list(dict.fromkeys([*modules, *parts])))
    product = _check_product(body, site, log)
    between = tuple(
        call.name
        for call in log.calls
        if call.name not in (*parts, site.up)
        and _equal_tensors(call.input, product)
        and _equal_tensors(call.output, product)
    )
    branches = [attribute(body, name) for name in (site.inp, site.up) if name is not None]
    expected = _outputs_at_scales(body, x, branches)
    act_name = recognise(attribute(body, site.act))
    adopt(body, Role(site, type(body), act_name, between, fused=False))
    _require_equal(expected, _outputs_at_scales(body, x, branches), "written as a star")
    return between


def _check_product(body: nn.Module, site: Site, log: CallLog) -> Tensor:
    """Return the product of the branches, after checks of a recorded run."""
    outs = log.of(site.out or "")
    if len(outs) != 1 or len(log.of(site.inp)) != 1:
        raise MismatchError(f"one run does not call {site.inp!r} and {site.out!r} once each")
    h = log.of(site.inp)[0].output
    if site.up is None:
        a, b = split_packed(h, gate_last=site.gate_last)
    else:
        a, b = h, log.of(site.up)[0].output
    product: Tensor = attribute(body, site.act)(a) * b
    if not _equal_tensors(outs[0].input.to(product.dtype), product):
        raise MismatchError(
            f"{site.out!r} does not take {site.act}({site.inp}) times the other branch"
        )
    if not _equal(log.output, outs[0].output):
        raise MismatchError(f"its output is not that of {site.out!r}")
    return product


def _recorded_run(body: nn.Module, x: Tensor, names: list[str]) -> CallLog:
    """Run a module in eval mode, and return the log of its named parts."""
    with recorded(body, names) as log:
        run(body, x, log=log)
    return log


def _outputs_at_scales(body: nn.Module, x: Tensor, branches: list[nn.Module]) -> list[Any]:
    """Return outputs in eval and train mode, the branches scaled by `SCALES`."""
    outputs = []
    for scale in SCALES:
        handles = [
            branch.register_forward_hook(lambda _, args, y, scale=scale: y * scale)
            for branch in branches
        ]
        try:
            outputs += [run(body, x, train=train) for train in (False, True)]
        finally:
            for handle in handles:
                handle.remove()
    return outputs


def _require_equal(expected: Any, actual: Any, condition: str) -> None:
    """Raise a MismatchError with the largest difference if tensors differ."""
    if not _equal(expected, actual):
        pairs = zip(_tensors(expected), _tensors(actual))
        off = max((float((a - b).abs().nan_to_num().max()) for a, b in pairs), default=0.0)
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
