"""CUDA graphs of training steps: the forward and the backward of a network as a launch each."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from starlayers.backend import backend_name
from starlayers.dispatch import launches_directly
from starlayers.kernels.registration import autocasts
from starlayers.vision import graphs
from starlayers.vision.network_state import NetworkState

__all__ = ["TrainingGraph"]


class Captured(NamedTuple):
    """Graphs of a step, the kind of its input, and the network that they were captured from."""

    state: NetworkState
    kind: Any
    run: Callable[[Tensor], Tensor]
    #: whether each tensor of the network wants a gradient
    wanted: list[bool]
    #: counters of the norms: what was folded from their statistics sees a step by them
    counters: list[Tensor]


class TrainingGraph:
    """CUDA graphs of the forward and the backward of a network on one kind of input.

    A graph overwrites the activations of the step before. So a forward is replayed only when the
    backward before it has run or its result is gone, and a backward that comes after a later
    forward raises. Results and gradients are copied out of the graphs: they may be kept, and
    gradients accumulate. Copies and pickles of this object are empty.
    """

    def __init__(self) -> None:
        self.captured: Captured | None = None
        #: number of the last replay, whether its backward ran, and its node in autograd's graph
        self.step, self.finished = 0, True
        self.node: Callable[[], object] = lambda: None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return TrainingGraph, ()

    def capture(self, model: nn.Module, x: Tensor) -> None:
        """Capture steps of `model` on inputs like `x`; buffers and random numbers stay as they are.

        Raises:
            RuntimeError: the network or the call cannot be captured, with the reason.
        """
        self.captured = None
        reason = _obstacle(model, x) or graphs.skipped(model)
        if reason:
            raise RuntimeError(f"{type(model).__name__}: no CUDA graph of training: {reason}")
        with _unchanged(model, x), _uncached_autocast(x):
            run = make_graphed(model, x.detach().clone(memory_format=torch.preserve_format))
        state = NetworkState(model)
        counters = [b for b in model.buffers() if not b.is_floating_point()]
        self.captured = Captured(state, graphs.kind_of(x), run, _wanted(state), counters)
        self.finished = True

    def reason(self, model: nn.Module, x: Tensor) -> str:
        """Return why a call on `x` now would not replay the graphs; empty if it would."""
        known, reason = self.captured, _obstacle(model, x)
        if known is None:
            return "this copy of the network was not captured"
        if reason or graphs.kind_of(x) != known.kind:
            return reason or "another kind of input was captured"
        state = known.state
        same = state.modules[0] is model and state.same_memory()
        if not same or _wanted(state) != known.wanted:
            return "the network is not as it was captured; call graph_training again"
        if not (self.finished or self.node() is None):
            return "the backward of the step before is still to come"
        return ""

    def replayed(self, model: nn.Module, x: Tensor) -> Tensor | None:
        """Return `model(x)` by the graphs, or `None` where the model has to be called."""
        if self.captured is None or self.reason(model, x):
            return None
        y = self.captured.run(x)
        increment_version(self.captured.counters)
        node: Any = y.grad_fn
        self.step, self.finished, self.node = self.step + 1, False, weakref.ref(node)
        step = self.step

        def before(_: Any) -> None:
            if step != self.step:
                raise RuntimeError(
                    f"{type(model).__name__}: this backward comes after a later forward, whose "
                    "CUDA graph has overwritten its activations; run the backward first"
                )
            self.finished = True

        node.register_prehook(before)
        node.register_hook(_copied)
        return y.clone()


def make_graphed(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the function of an input like `x` that replays forward and backward of `model`."""
    graphed: Any = torch.cuda.make_graphed_callables(_Steps(model), (x,))
    return graphed  # type: ignore[no-any-return]


class _Steps(nn.Module):
    """Network computed step by step, for a capture."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return graphs.run(self.model, x)


def _copied(gradients: tuple[Tensor | None, ...], _: Any) -> tuple[Tensor | None, ...]:
    """Return gradients in new memory; the next step writes theirs again."""
    copies = iter(torch._foreach_mul([g for g in gradients if g is not None], 1.0))
    return tuple(None if g is None else next(copies) for g in gradients)


def _wanted(state: NetworkState) -> list[bool]:
    return [t.requires_grad for t in state.tensors]


def _obstacle(model: nn.Module, x: Tensor) -> str:
    """Return what about the call keeps graphs of training from it."""
    if type(x) is not Tensor or x.device.type not in graphs.DEVICES:
        return f"input is a {type(x).__name__} on {x.device.type!r}, and graphs are CUDA's"
    if not model.training:
        return "the network is in eval mode"
    if x.requires_grad or not torch.is_grad_enabled():
        return "gradients of the parameters, and only those, are computed"
    if not any(p.requires_grad for p in model.parameters()):
        return "no parameter wants a gradient"
    if backend_name() == "eager":
        return "the eager backend was asked for"
    capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
    if capturing or not launches_directly(x, (), gradients=True):
        return "a compiler, a transform, a mode or another capture wants each step"
    return ""


@contextmanager
def _unchanged(model: nn.Module, x: Tensor) -> Iterator[None]:
    """Give buffers and random numbers their state back: warm-up steps are no training."""
    buffers = list(model.buffers())
    before = [b.clone() for b in buffers]
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        try:
            yield
        finally:
            with torch.no_grad():
                for b, value in zip(buffers, before, strict=True):
                    b.copy_(value)


def _uncached_autocast(x: Tensor) -> Any:
    """Return the autocast of the caller, without the cache that a capture must not fill."""
    kind = x.device.type
    if not autocasts(x):
        return nullcontext()
    return torch.autocast(kind, torch.get_autocast_dtype(kind), cache_enabled=False)
