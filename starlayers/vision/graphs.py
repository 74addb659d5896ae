"""CUDA graphs of a network without gradients: one launch by the host for all of its kernels."""

import warnings
from collections import OrderedDict
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from starlayers.backend import backend_name
from starlayers.dispatch import is_plain, launches_directly
from starlayers.kernels.registration import autocasts
from starlayers.kernels.versions import versions

__all__ = ["Graphs"]

#: graphs that a network keeps; the one that was used longest ago goes
MOST_GRAPHS = 8
#: kinds of inputs that it remembers to have met once
MOST_MET = 1024
#: runs before a capture, which compile kernels and settle their choice
WARM_UPS = 3
#: seconds that a launch costs the host, and bytes that a GPU copies in a second. "auto" wants the
#: launches that a graph saves to cost more than the copies of input and output that it adds.
LAUNCH_S, COPY_BYTES_S = 5e-6, 1e12


class State:
    """All of a network in eval mode that a graph of it was captured from, to be compared later.

    That is its modules and whatever is attached to or set in them, and memory and versions of its
    parameters and buffers. Holding them keeps others from their addresses.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = {m: _contents(m) for m in model.modules()}
        self.tensors = [*model.parameters(), *model.buffers()]
        self.memory = [t.detach() for t in self.tensors]
        self.version = self._version()

    def same(self) -> bool:
        """Return True if the network is as it was."""
        for m, known in self.modules.items():
            for before, now in zip(known, _contents(m), strict=True):
                if len(before) != len(now) or not all(map(is_, before, now)):
                    return False
        return self._version() == self.version

    def _version(self) -> tuple[Any, ...]:
        addresses = [t.data_ptr() for t in self.tensors]
        return versions(()), [t._version for t in self.tensors], addresses


def _contents(m: nn.Module) -> tuple[tuple[Any, ...], ...]:
    """Return children, parameters, buffers and attributes of a module."""
    children, parameters, buffers = m._modules, m._parameters, m._buffers
    attributes = tuple(v for k, v in m.__dict__.items() if k not in OWN)
    return tuple(children.values()), tuple(parameters.values()), tuple(buffers.values()), attributes


#: attributes of blocks and networks that hold launches
OWN = ("recordings", "graphs")


class Captured(NamedTuple):
    """Graph, its tensors, and the network that it was captured from."""

    state: State
    graph: Any
    source: Tensor
    result: Tensor


class Graphs:
    """CUDA graphs of a network, one for each kind of input, captured as they are needed.

    Args:
        always: capture a kind of input when it is first met; otherwise when it is met again, and
            only where the launches saved cost more than the copies added.

    A graph repeats the kernels that were captured, with their addresses. It is dropped as soon as a
    parameter, a buffer, a module or a setting is another one. Copies and pickles of this object are
    empty.
    """

    def __init__(self, always: bool) -> None:
        self.always = always
        self.captured: OrderedDict[Any, Captured] = OrderedDict()
        self.met: set[Any] = set()
        self.failed: dict[Any, str] = {}

    def __reduce__(self) -> tuple[type, tuple[bool]]:
        return Graphs, (self.always,)

    def forget(self) -> None:
        """Drop all graphs; kinds of inputs that were met or failed are met anew."""
        self.captured.clear()
        self.met.clear()
        self.failed.clear()

    def reason(self, model: nn.Module, x: Tensor) -> str:
        """Return why a call on `x` now would not replay a graph; empty if it would."""
        reason = self._obstacle(model, x)
        if reason:
            return reason
        kind = _kind(x)
        known = self.captured.get(kind)
        if known is not None and known.state.same():
            return ""
        return self.failed.get(kind) or "no graph of this kind of input is captured yet"

    def replayed(self, model: nn.Module, x: Tensor) -> Tensor | None:
        """Return `model(x)` by a graph, in new memory; `None` where the model has to be called."""
        if self._obstacle(model, x):
            return None
        kind = _kind(x)
        known = self.captured.get(kind)
        if known is None or not known.state.same():
            self.captured.pop(kind, None)
            if kind in self.failed:
                return None
            if not self.always and kind not in self.met:
                if len(self.met) >= MOST_MET:
                    self.met.clear()
                self.met.add(kind)
                return None
            known = self._capture(model, x, kind)
            if known is None:
                return None
        self.captured.move_to_end(kind)
        known.source.copy_(x)
        known.graph.replay()
        return known.result.clone()

    def _obstacle(self, model: nn.Module, x: Tensor) -> str:
        """Return what keeps every graph from a call, whatever was captured."""
        if type(x) is not Tensor:
            return f"input is a {type(x).__name__}"
        if x.device.type not in DEVICES:
            return f"input is on {x.device.type!r}, and graphs are CUDA's"
        if model.training:
            return "the network is in training mode"
        if backend_name() == "eager":
            return "the eager backend was asked for"
        if not launches_directly(x, model.parameters()):
            return "gradients, a compiler, a transform, a mode or another capture wants each step"
        if not all(is_plain(m, type(m)) for m in model.modules()):
            return "a module has hooks"
        if not self.always:
            layers = sum(bool(m._parameters) for m in model.modules())
            # a launch for each at least; the output is smaller than the input
            if 2 * x.numel() * x.element_size() / COPY_BYTES_S > layers * LAUNCH_S:
                return f"copying {tuple(x.shape)} costs more than {layers} launches"
        return ""

    def _capture(self, model: nn.Module, x: Tensor, kind: Any) -> Captured | None:
        try:
            source = x.detach().clone(memory_format=torch.preserve_format)
            graph, result = capture(model, source)
            known = Captured(State(model), graph, source, result)
        except RuntimeError as error:
            self.failed[kind] = f"a capture failed: {error}"
            warnings.warn(
                f"{type(model).__name__}: {self.failed[kind]}; inputs of this kind run without a "
                "CUDA graph",
                stacklevel=4,
            )
            return None
        while len(self.captured) >= MOST_GRAPHS:
            self.captured.popitem(last=False)
        self.captured[kind] = known
        return known


#: types of devices that have graphs
DEVICES = {"cuda"}


def capture(model: nn.Module, source: Tensor) -> tuple[Any, Tensor]:
    """Capture `model.forward_features` and head on `source`; returns the graph and its result."""
    stream = torch.cuda.Stream(source.device)
    stream.wait_stream(torch.cuda.current_stream(source.device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            _run(model, source)
    torch.cuda.current_stream(source.device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = _run(model, source)
    return graph, result


def _run(model: Any, x: Tensor) -> Tensor:
    y: Tensor = model.forward_head(model.forward_features(x))
    return y


def _kind(x: Tensor) -> Any:
    """Return what a graph is captured for, beside the network."""
    autocast = torch.get_autocast_dtype(x.device.type) if autocasts(x) else None
    return x.shape, x.stride(), x.dtype, x.device, autocast, backend_name()
