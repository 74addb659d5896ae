"""Star projection: first layer and activation of an MLP, with a gate."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import skip_init

from starlayers.dispatch import Plan, declined, plan_star
from starlayers.functional import star_product
from starlayers.recompute import recomputed
from starlayers.surgery.entries import HOOKS
from starlayers.surgery.linear_layers import Projection, dtype_and_device, projection
from starlayers.surgery.place import Place
from starlayers.surgery.site import Site, with_new_names
from starlayers.surgery.snapshot import Snapshot

__all__ = ["StarProjection"]


def _random_states(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the states of the random generators of the CPU and of the GPU of a tensor."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(x.device) if x.is_cuda else None


class ScaleGate(nn.Module):
    """Gate of one learned number per hidden channel, zero at first.

    Shapes: any -> (hidden,), or (hidden, 1, 1) for channels-first layers.
    """

    def __init__(self, sizes: Projection, **factory: Any) -> None:
        super().__init__()
        shape = (sizes.out_features, 1, 1) if sizes.channels_first else (sizes.out_features,)
        self.weight = nn.Parameter(torch.zeros(shape, **factory))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight

    def extra_repr(self) -> str:
        return str(len(self.weight))


class LowRankGate(nn.Module):
    """Gate of two thin linear layers, `up(down(x))`, with `up` zero at first.

    Shapes: (..., in) -> (..., hidden), or with channels in dimension 1.
    """

    def __init__(self, sizes: Projection, rank: int, **factory: Any) -> None:
        super().__init__()
        n, f, first = sizes
        self.down = _linear(Projection(n, rank, first), zero=False, **factory)
        self.up = _linear(Projection(rank, f, first), zero=True, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(finite(self.down(x)))  # type: ignore[no-any-return]


def _linear(sizes: Projection, *, zero: bool, **factory: Any) -> nn.Module:
    """Return a linear layer: zeros with a bias, or random without one."""
    n, f, channels_first = sizes
    kind: Any = nn.Conv2d if channels_first else nn.Linear
    # skip_init: a zero layer must draw no random number, or starify would change the user's seeds
    make = partial(skip_init, kind) if zero else kind
    kernel_size = (1,) if channels_first else ()
    layer: nn.Module = make(n, f, *kernel_size, bias=zero, **factory)
    if zero:
        zero_(layer)
    return layer


def parse_gate(spec: str) -> tuple[str, int]:
    """Return the kind of a gate and its rank, 0 for the kinds without one."""
    if not isinstance(spec, str):
        raise TypeError(f"gate must be 'full', 'scale' or 'low_rank=r', got {spec!r}")
    kind, _, rank = spec.partition("=")
    if kind in ("full", "scale") and not rank:
        return kind, 0
    if kind == "low_rank" and rank.isdecimal() and int(rank) >= 1:
        return kind, int(rank)
    raise ValueError(
        f"unknown gate {spec!r}, choose 'full', 'scale' or 'low_rank=r' with r of at least 1, "
        "as in 'low_rank=8'"
    )


def make_gate(spec: str, inp: nn.Module) -> nn.Module:
    """Return a zero gate for the linear layer `inp`, of its dtype and on its device."""
    kind, rank = parse_gate(spec)
    sizes = projection(inp)
    if sizes is None:
        raise ValueError(f"{type(inp).__name__} is no linear layer or 1x1 convolution")
    factory = dict(zip(("dtype", "device"), dtype_and_device(inp)))
    if kind == "scale":
        return ScaleGate(sizes, **factory)
    if kind == "low_rank":
        return LowRankGate(sizes, rank, **factory)
    return _linear(sizes, zero=True, **factory)


def gated(a: Tensor, gate: Tensor) -> Tensor:
    """Return `a + a * gate`, which is `a` to the last bit where the gate is zero.

    In float16 activations overflow in models that people use (T5 clamps them afterwards), so an
    infinite `a` stays what it is there; infinity times zero would be no number.
    """
    if isinstance(a, Tensor) and a.is_nested:  # which has no addcmul
        return a + a * gate.to(a.dtype)
    return torch.addcmul(a, finite(a), gate.to(a.dtype))


def finite(a: Tensor) -> Tensor:
    """Return a tensor of float16 with infinities clamped; of other dtypes the tensor itself."""
    if a.dtype != torch.float16:
        return a
    limit = torch.finfo(a.dtype).max
    return a.clamp(-limit, limit)


fx.wrap("finite")  # its branch is taken when the traced network runs


def zero_(gate: nn.Module) -> None:
    """Set a gate to zero, in place; the random first layer of a low-rank gate stays."""
    last = gate.up if isinstance(gate, LowRankGate) else gate
    for parameter in last.parameters():  # type: ignore[union-attr]
        nn.init.zeros_(parameter)


class StarProjection(nn.Module):
    """First half of a starified MLP: `act(inp(x)) * (1 + gate(x))`.

    It is computed as `a + a * gate(x)` with `a = act(inp(x))`: with a zero gate the result equals
    `act(inp(x))` to the last bit in every dtype, and in low precision a small gate is not lost in
    the rounding of `1 + gate(x)`.

    In a model it stands where `inp` was and returns what `inp` does; its `Place`, where the
    activation was, computes the rest. So other calls of the layer give what they did.

    Shapes: those of `inp`, (..., in) -> (..., hidden).

    Args:
        inp: the model's own linear layer. It is called, so its hooks and adapters stay in effect.
        act: the model's own activation.
        gate: the new branch.
        site: names of the MLP's parts, which `revert` reads.
        spec: the gate, as in `make_gate`.
        act_name: name of `act` in `ACTIVATIONS`, `None` if it is not one of them.
        fused: compute the product with the kernels of the core, which round once and may differ
            from `act` in the last bits. Ignored without `act_name`.
        recompute: save only `x` for the backward pass.

    Example:
        >>> inp = nn.Linear(4, 8)
        >>> site = Site("chain", "plain", "0", "1", "2")
        >>> star = StarProjection(inp, nn.GELU(), make_gate("full", inp), site, spec="full")
        >>> x = torch.randn(2, 4)
        >>> torch.equal(star(x), nn.GELU()(inp(x)))
        True
        >>> _ = nn.init.ones_(star.gate.bias)  # now the factor is 2
        >>> torch.equal(star(x), 2 * nn.GELU()(inp(x)))
        True
    """

    def __init__(
        self,
        inp: nn.Module,
        act: nn.Module | Callable[[Tensor], Tensor],
        gate: nn.Module,
        site: Site,
        *,
        spec: str,
        act_name: str | None = None,
        fused: bool = False,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.inp, self.act, self.gate = inp, act, gate
        self.site, self.spec, self.act_name = site, spec, act_name
        self.fused, self.recompute = fused, recompute
        #: original values of the owner's attributes that had to change, which `revert` restores
        self.undo: dict[str, Any] = {}
        self.place: Place | None = None
        self._verified = Snapshot(act, type(act).forward) if isinstance(act, nn.Module) else None
        self.train(inp.training)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # pickled by earlier versions
        state = {"place": None, "_verified": None, **with_new_names(state)}
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.place is not None and "star" not in vars(self.place):
            self.place.star = self

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        place, recompute = self.place, self.recompute and torch.is_grad_enabled()
        if place is not None:
            place.require_free()
            if not recompute:
                return place.mark(self.inp(x, *args, **kwargs), x)
            if not torch.compiler.is_compiling():
                again = partial(self._again, _random_states(x), args, kwargs)
                return place.mark(self.inp(x, *args, **kwargs), x, again)
        if recompute:
            y: Tensor = recomputed(self._star, x, *args, **kwargs)
        else:
            y = self._star(x, *args, **kwargs)
        return y if place is None else place.mark(y, None)  # a compiler repeats the whole

    def plan(self, x: Tensor, *args: Any, **kwargs: Any) -> Plan:
        """Return the plan for the product: what runs, or why it is the definition.

        Raises:
            RuntimeError: the backend is "triton" and no kernel applies.
        """
        if not self.fused:
            return Plan("eager", "the model's own activation is kept, to the last bit")
        if self.act_name is None:
            return Plan("eager", "no activation of the table computes what the model's does")
        if change := self._change():
            return declined(change, "this StarProjection")
        h = x.new_empty(1).expand(*x.shape[:-1], self.out_features)
        return plan_star(h, h, self.act_name)

    def _star(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._product(self.inp(x, *args, **kwargs), x)

    def activated(
        self, h: Tensor, x: Tensor, again: Callable[[Tensor, bool], Tensor] | None = None
    ) -> Tensor:
        """Return `act(h) * (1 + gate(x))` of a result `h` of `inp`.

        With `again`, which computes `h` once more, only `x` is saved for the backward.
        """
        if again is None or not torch.is_grad_enabled():
            return self._product(h, x)
        given, grad = [h], h.requires_grad
        del h

        def call(x: Tensor) -> Tensor:
            return self._product(given.pop() if given else again(x, grad), x)

        return recomputed(call, x)

    def _again(
        self, states: Any, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor, grad: bool
    ) -> Tensor:
        """Return the result of `inp` once more, with the random numbers that it had."""
        with torch.no_grad(), torch.random.fork_rng([x.device] if x.is_cuda else []):
            cpu, cuda = states
            torch.set_rng_state(cpu)
            if cuda is not None:
                torch.cuda.set_rng_state(cuda, x.device)
            h: Tensor = self.inp(x, *args, **kwargs)
        # a clone is no leaf, so that activations may work in place
        return h.detach().requires_grad_().clone() if grad else h

    def _product(self, h: Tensor, x: Tensor) -> Tensor:
        # a compiler guards what the model's own activation reads, and fuses the product itself
        fused = self.fused and not torch.compiler.is_compiling()
        if fused and self.act_name is not None and not self._change():
            return star_product(h, self.gate(x).to(h.dtype), self.act_name, offset=1.0)
        return gated(self.act(h), self.gate(x))

    def _change(self) -> str:
        """Return in words what has changed of the activation since it was verified."""
        if self._verified is None or not isinstance(self.act, nn.Module):
            return ""
        if any(vars(self.act)[kind] for kind in HOOKS):
            return "the activation has hooks"
        if self._verified.module is not self.act:
            return "the activation was replaced"
        return self._verified.change(self.act)

    # Models read weight, dtype and sizes of their own linear layer, which is now `inp`.
    @property
    def weight(self) -> Tensor:
        """Weight of the model's own linear layer."""
        return self.inp.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """Bias of the model's own linear layer."""
        return self.inp.bias  # type: ignore[return-value]

    @property
    def in_features(self) -> int:
        """Number of input channels."""
        return (projection(self.inp) or Projection(0, 0)).in_features

    @property
    def out_features(self) -> int:
        """Number of hidden channels."""
        return (projection(self.inp) or Projection(0, 0)).out_features

    def reset_gate(self) -> None:
        """Set the gate to zero, and draw the first layer of a low-rank gate anew."""
        if isinstance(self.gate, LowRankGate):
            self.gate.down.reset_parameters()  # type: ignore[operator]
        zero_(self.gate)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "bias"):  # as models set those of their own linear layer
            setattr(self.inp, name, value)
        else:
            super().__setattr__(name, value)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for key in [k for k in state_dict if k.startswith(prefix)]:  # of the model as it was
            name = key.removeprefix(prefix)
            if name.partition(".")[0] not in self._modules:
                state_dict.setdefault(f"{prefix}inp.{name}", state_dict.pop(key))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Raise an error: pruning and weight norm belong on `inp`, the model's own layer."""
        raise RuntimeError(
            f"{name!r} cannot be added to a StarProjection, whose weight is that of its own linear "
            "layer: prune or parametrise its child `inp` instead"
        )

    def extra_repr(self) -> str:
        flags = [name for name in ("fused", "recompute") if getattr(self, name)]
        return ", ".join([f"gate={self.spec!r}", *flags])
