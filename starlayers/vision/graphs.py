"""CUDA graphs of a network without gradients: one launch by the host for all of its kernels."""

import warnings
from collections import OrderedDict
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from starlayers.backend import backend_name
from starlayers.dispatch import is_plain, launches_directly
from starlayers.kernels.registration import autocasts, precision
from starlayers.kernels.versions import folded_weights_stay
from starlayers.vision.network_state import NetworkState

__all__ = ["Graphs", "kind_of", "run", "skipped"]

#: graphs that a network keeps; the one that was used longest ago goes
MOST_GRAPHS = 8
#: kinds of inputs that it remembers to have met once
MOST_MET = 1024
#: runs before a capture, which compile kernels and settle their choice
WARM_UPS = 3
#: seconds that a launch costs the host, and bytes that a GPU copies in a second. "auto" wants the
#: launches that a graph saves to cost more than the copies of input and output that it adds.
LAUNCH_S, COPY_BYTES_S = 5e-6, 1e12


class Captured(NamedTuple):
    """Graph, its tensors, and the network that it was captured from."""

    state: NetworkState
    graph: Any
    source: Tensor
    result: Tensor
    #: launches of blocks with the weights that they folded, which the graph reads
    recordings: list[Any]

    def shows(self, model: nn.Module) -> bool:
        """Return True if a replay computes what `model` would."""
        return self.state.modules[0] is model and self.state.same()


class Graphs:
    """CUDA graphs of a network, one for each kind of input, captured as they are needed.

    Args:
        always: capture a kind of input when it is first met; otherwise when it is met again, and
            only where the launches saved cost more than the copies added.

    A graph repeats the kernels that were captured, with their addresses. It is dropped as soon as a
    parameter, a buffer, a module or a setting is another one. The graphs of a network share the
    memory between their kernels: they run one after the other, whatever threads and streams they
    are called from. Copies and pickles of this object are empty.
    """

    def __init__(self, always: bool) -> None:
        self.always = always
        self.captured: OrderedDict[Any, Captured] = OrderedDict()
        self.met: set[Any] = set()
        self.failed: dict[Any, str] = {}
        self.lock = Lock()
        self.done: Any = None

    def __reduce__(self) -> tuple[type, tuple[bool]]:
        return Graphs, (self.always,)

    def forget(self) -> None:
        """Drop all graphs; kinds of inputs that were met or failed are met anew."""
        with self.lock:
            for kind in list(self.captured):
                self._drop(kind)
            self.met.clear()
            self.failed.clear()

    def reason(self, model: nn.Module, x: Tensor) -> str:
        """Return why a call on `x` now would not replay a graph; empty if it would."""
        reason = _obstacle(model, x) or skipped(model)
        if reason:
            return reason
        kind = kind_of(x)
        known = self.captured.get(kind)
        if known is not None and known.shows(model):
            return ""
        return (
            self.failed.get(kind)
            or self._not_worth_it(model, x)
            or "no graph of this kind of input is captured yet"
        )

    def replayed(self, model: nn.Module, x: Tensor) -> Tensor | None:
        """Return `model(x)` by a graph, in new memory; `None` where the model has to be called."""
        if _obstacle(model, x):
            return None
        with self.lock:
            kind = kind_of(x)
            known = self.captured.get(kind)
            if known is not None and not known.shows(model):
                self._drop(kind)
                known = None
            known = known or self._capture(model, x, kind)
            if known is None:
                return None
            self.captured.move_to_end(kind)
            return self._replay(known, x)

    def _replay(self, known: Captured, x: Tensor) -> Tensor:
        if self.done is not None:  # the last replay may be running on another stream
            torch.cuda.current_stream(x.device).wait_event(self.done)
        known.source.copy_(x)
        known.graph.replay()
        y = known.result.clone()
        if x.is_cuda:
            self.done = torch.cuda.Event()
            self.done.record()
        return y

    def _drop(self, kind: Any) -> None:
        """Drop a graph; its memory is free for others once its last replay is done."""
        if self.done is not None:
            self.done.synchronize()
        del self.captured[kind]

    def _not_worth_it(self, model: nn.Module, x: Tensor) -> str:
        """Return why "auto" does not capture a graph for `x`; empty if it does."""
        if self.always:
            return ""
        layers = sum(bool(m._parameters) for m in model.modules())
        # a launch for each at least; the output is smaller than the input
        if 2 * x.numel() * x.element_size() / COPY_BYTES_S > layers * LAUNCH_S:
            return f"copying {tuple(x.shape)} costs more than {layers} launches"
        return ""

    def _capture(self, model: nn.Module, x: Tensor, kind: Any) -> Captured | None:
        if kind in self.failed or skipped(model):
            return None
        if not self.always and kind not in self.met:
            if len(self.met) >= MOST_MET:
                self.met.clear()
            self.met.add(kind)
            return None
        if reason := self._not_worth_it(model, x):
            self.failed[kind] = reason  # later calls need not count the layers again
            return None
        try:
            with torch.inference_mode(False):  # its memory is written in whatever mode comes later
                source = x.detach().clone(memory_format=torch.preserve_format)
            pools = (c.graph.pool() for c in self.captured.values() if c.source.device == x.device)
            with folded_weights_stay():
                graph, result = capture(model, source, next(pools, None))
            recordings = [dict(m.__dict__.get("recordings", {})) for m in model.modules()]
            known = Captured(NetworkState(model), graph, source, result, recordings)
        except RuntimeError as error:
            self.failed[kind] = f"a capture failed: {error}"
            warnings.warn(
                f"{type(model).__name__}: {self.failed[kind]}; inputs of this kind run without a "
                "CUDA graph",
                stacklevel=4,
            )
            return None
        while len(self.captured) >= MOST_GRAPHS:
            self._drop(next(iter(self.captured)))
        self.captured[kind] = known
        return known


#: types of devices that have graphs
DEVICES = {"cuda"}


def _obstacle(model: nn.Module, x: Tensor) -> str:
    """Return what about a call keeps graphs without gradients from it."""
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
    return ""


def skipped(model: nn.Module) -> str:
    """Return what graphs of `model` would skip; empty if there is nothing."""
    if getattr(model, "_is_replica", False):
        return "the network is a replica of nn.DataParallel, made anew for every call"
    return "" if all(is_plain(m, type(m)) for m in model.modules()) else "a module has hooks"


def capture(model: nn.Module, source: Tensor, pool: Any) -> tuple[Any, Tensor]:
    """Capture `run(model, source)`, with memory of `pool`; returns the graph and its result."""
    stream = torch.cuda.Stream(source.device)
    stream.wait_stream(torch.cuda.current_stream(source.device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            run(model, source)
    torch.cuda.current_stream(source.device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # threads that load data go on calling CUDA meanwhile
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        result = run(model, source)
    return graph, result


def run(model: Any, x: Tensor) -> Tensor:
    """Compute a StarNet step by step."""
    y: Tensor = model.forward_head(model.forward_features(x))
    return y


def kind_of(x: Tensor) -> Any:
    """Return what a graph is captured for, beside the network."""
    autocast = torch.get_autocast_dtype(x.device.type) if autocasts(x) else None
    return x.shape, x.stride(), x.dtype, x.device, autocast, precision(x), backend_name()
