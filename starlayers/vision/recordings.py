"""Launches that a layer records without gradients, to repeat them while it stays as it is."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from starlayers.dispatch import launches_directly
from starlayers.kernels.program import Program
from starlayers.kernels.registration import autocasts, compute_dtype, precision, recorded_launches

__all__ = ["Recorded", "Recordings", "forget", "kind_of", "known", "record", "settled"]


class Recorded(NamedTuple):
    """Launches of a layer, and what they were made from."""

    #: versions of all tensors and settings; other ones need other launches
    state: tuple[Any, ...]
    program: Program
    #: the tensors themselves and their memory, so that no other takes their address
    kept: tuple[Any, ...]


class Recordings(dict[Any, Recorded]):
    """Kind of input -> launches of a layer. Copies and pickles of it are empty."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Recordings, ()


#: kinds of inputs for which a layer keeps launches
MOST_RECORDINGS = 16


def kind_of(x: Tensor, tensors: Iterable[Tensor | None]) -> Any:
    """Return all of `x` and of the call on which launches depend; `None` for no such launches."""
    if not launches_directly(x, tensors) or x.numel() == 0 or x.is_neg():
        return None
    # a cast is no launch of ours; on AMD's GPUs Triton also looks at the size of an input's storage
    if compute_dtype(x) != x.dtype or torch.version.hip:
        return None
    return x.shape, x.dtype, x.device, x.data_ptr() % 16, precision(x), autocasts(x)


def settled(layers: Iterable[nn.Module]) -> bool:
    """Return True if launches may stand for plain convolutions, norms and identities.

    Every tensor is then a parameter or buffer, since versions of others are not seen, and no norm
    uses statistics of the batch.
    """
    for m in layers:
        if type(m) is nn.Identity:
            continue
        if not {"weight", "bias"} <= m._parameters.keys() | m._buffers.keys():
            return False
        if isinstance(m, nn.BatchNorm2d):
            mean, var = (m._buffers.get(name) for name in ("running_mean", "running_var"))
            if m.training or mean is None or var is None:
                return False
    return True


def known(layer: nn.Module, key: Any, state: tuple[Any, ...]) -> Program | None:
    """Return the launches that `layer` recorded under `key`, if it is still in this state.

    What could make them wrong must be in key and state, which a layer asks for at every call: what
    is attached to it, the versions of its weights and statistics, the mode of the call.
    """
    recorded = layer.__dict__.get("recordings", {}).get(key)
    return recorded.program if recorded is not None and recorded.state == state else None


def record(
    layer: nn.Module,
    key: Any,
    state: tuple[Any, ...],
    x: Tensor,
    tensors: Iterable[Tensor | None],
    run: Callable[[], Tensor],
) -> Tensor:
    """Return `run()`, whose launches on `x` are recorded; `tensors` are those of the layer."""
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return run()  # a capture cannot wait until the weights are folded
    with recorded_launches() as launches:
        y = run()
    try:
        program = Program(launches, x, y)
    except ValueError:  # Triton's interpreter casts bfloat16
        return y
    recordings = layer.__dict__.setdefault("recordings", Recordings())
    if len(recordings) >= MOST_RECORDINGS:
        recordings.clear()
    if x.is_cuda:  # later calls may come on another stream, which must find the weights folded
        torch.cuda.current_stream(x.device).synchronize()
    tensors = tuple(tensors)
    kept = tensors, [None if t is None else t.detach() for t in tensors]
    recordings[key] = Recorded(state, program, kept)
    return y


def forget(layer: nn.Module) -> None:
    """Drop the launches that `layer` recorded.

    They would also be out of date after a change of a weight that PyTorch does not count, as
    `weight.data` allows; hence a layer forgets them when its mode is set.
    """
    layer.__dict__.pop("recordings", None)
