"""Plans of calls, and the conditions under which each path may compute one.

`dispatch` asks here when it has not met a call before.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from starlayers.activations import ACTIVATIONS, Activation, get_activation
from starlayers.kernels import registration
from starlayers.kernels.conv import PATCH_CHANNELS, Convolution
from starlayers.kernels.registration import MLPWeights, autocasts, compute_dtype
from starlayers.kernels.tiles import MLP_FORWARD, mlp_backward_tiles, mlp_tile, split_columns

__all__ = [
    "Call",
    "Plan",
    "call_of",
    "decide_mlp",
    "few",
    "has_triton_form",
    "kernel_reason",
    "rows_of",
    "small",
    "too_few",
    "too_wide",
    "unsuited",
]

# Least bytes of one hidden branch for the row-blocked CPU op, from `benchmarks.core sweep`: below,
# the op's overhead or the two matrix products that its backward recomputes cost more than the
# memory traffic they save. These products grow with the channels of the input and the traffic does
# not: in training a layer needs HIDDEN_BYTES_A_CHANNEL for each channel of its input, and one of
# more than MAX_CHANNELS_TRAINING is never faster. glibc returns allocations above 32 MiB to the
# system, so that a larger hidden activation pays for its page faults at every use.
MIN_HIDDEN_BYTES_INFERENCE = 4 * 2**20
MIN_HIDDEN_BYTES_TRAINING = 16 * 2**20
HIDDEN_BYTES_A_CHANNEL = 2**19
MAX_CHANNELS_TRAINING = 128

# Least elements for the fused star on a GPU: for fewer, the two or three launches of eager
# PyTorch cost less than dispatching one op. Not measured: a launch takes about 5 us, the time in
# which an H100 moves this many elements.
MIN_ELEMENTS_STAR = 2**20

# Least rows for the fused star MLP on a GPU. Each tile of rows runs on one multiprocessor, so with
# few rows most multiprocessors idle, while cuBLAS splits the columns too. On an H100 a star MLP of
# 128 channels in bfloat16 takes 23 us fused and 20 us eager for 1024 rows, and 22 us and 60 us for
# 16384. Rows of at most MAX_BYTES_ANY_ROWS bytes are fast enough at any number of rows.
MIN_ROWS = 4096
MAX_BYTES_ANY_ROWS = 128

# Most products that each output of a fused convolution may sum. PyTorch runs a convolution, its
# bias and its norm as three kernels, so that fusing them saves four passes over the result: 8 bytes
# an output in 16-bit types, 2.7 ps at 3 TB/s. 1152 products (128 channels, nine taps) take an H100
# 5.8 ps at half its peak. Not measured: with more, cuDNN's products would save more than the passes
# cost.
MAX_CONTRACTION = 1152

#: channels of the input, of the product and of the result
Sizes = tuple[int, int, int]


#: exact types of the tensors that kernels accept: a subclass may compute something else
PLAIN = (Tensor, nn.Parameter)


class Plan(NamedTuple):
    """Path of a call: "eager" for a reason, or one of the fused paths and its weights.

    `explain` also has "raises", where the backend asked for does not serve a call, and "unknown".

    Fused paths are "cpu" (blocks of rows on a CPU), "star", "star_mlp", "star_mlp_wide", "block" (a
    whole StarBlock2d) and "convolution" (with norm and activation), the others by Triton kernels.

    Example:
        >>> print(Plan("eager", "autocast is on"))
        runs eager: autocast is on
    """

    path: str
    reason: str = ""
    weights: MLPWeights | None = None
    #: tile of the kernel, for people; text is made only when asked for
    tile: object = None

    @property
    def fused(self) -> bool:
        """True unless the definition computes the call."""
        return not self.reason

    def __str__(self) -> str:
        if self.reason:
            verb = self.path if self.path in ("raises", "unknown") else f"runs {self.path}"
            return f"{verb}: {self.reason}"
        return f"runs fused: {self.path}" + (f", {self.tile}" if self.tile else "")


ASKED_FOR = Plan("eager", "the eager backend was asked for")
COMPILED = Plan("eager", "being compiled or exported")
ON_CPU = Plan("eager", "no Triton kernel for device 'cpu'")
CPU_ASKED_FOR = Plan("eager", "the cpu backend was asked for, which has no op of this kind")
TRANSFORMED = "a functional transform or tracer is active, or a FLOP counter or function mode"
#: backends that rule kernels of stars and blocks out
ASKED = {"eager": ASKED_FOR, "cpu": CPU_ASKED_FOR}


class Call(NamedTuple):
    """All that decides about the kernels of a call but its sizes."""

    backend: str
    activation: Activation
    #: the table has the activation under its own name, by which ops look it up
    by_name: bool
    #: dtype in which the call is computed
    dtype: torch.dtype
    autocast: bool
    #: "compile", "export" or "transform" while one of them is active
    tracer: str
    interpret: bool
    #: class, device and dtype of the input and of each parameter
    tensors: tuple[tuple[type, torch.device, torch.dtype], ...]


def rows_of(x: Tensor) -> int:
    """Return the number of rows of `x` (..., channels)."""
    return x.numel() // (x.shape[-1] or 1)


def call_of(backend: str, act: str | None, tracer: str, tensors: tuple[Tensor, ...]) -> Call:
    """Return what decides about a call on `tensors`, the input first, under a `tracer`."""
    x = tensors[0]
    row = get_activation(act)
    return Call(
        backend,
        row,
        ACTIVATIONS.get(row.name) is row,
        compute_dtype(x),
        autocasts(x),
        tracer,
        registration.INTERPRET,
        tuple((type(t), t.device, t.dtype) for t in tensors),
    )


def kernel_reason(call: Call) -> str:
    """Return why no Triton kernel may take the tensors of a call; empty if one may."""
    device = call.tensors[0][1]
    if device.type not in registration.KERNEL_DEVICES:
        return f"no Triton kernel for device {device.type!r}"
    if not registration.HAS_TRITON:
        return "Triton is not installed"
    if call.interpret and call.backend != "triton":
        return "the interpreter is for testing: it serves where use_backend('triton') asks for it"
    other = next((kind for kind, _, _ in call.tensors if kind not in PLAIN), None)
    if other is not None and call.tracer != "export":
        return f"an input is a {other.__name__}"
    if any(place != device for _, place, _ in call.tensors):
        return "the tensors are on several devices"
    if call.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"dtype {call.dtype} (needs float32, float16 or bfloat16)"
    if not call.autocast and any(dtype != call.dtype for _, _, dtype in call.tensors):
        return "input and parameters differ in dtype and autocast is off"
    if call.activation.triton is None:
        return f"activation {call.activation.name!r} has no Triton form"
    if not call.by_name:
        return _other_name(call.activation)
    if call.tracer == "export" and call.backend == "auto":
        return "being exported: the graph stays portable"
    return TRANSFORMED if call.tracer == "transform" else ""


def has_triton_form(act: str | None) -> bool:
    """Return True if kernels can apply an activation: they look it up by its row's name.

    Example:
        >>> has_triton_form("relu6")
        True
    """
    row = get_activation(act)
    return row.triton is not None and ACTIVATIONS.get(row.name) is row


def decide_mlp(
    call: Call,
    rows: int,
    sizes: Sizes,
    training: bool,
    takes_wide: bool,
    residual: tuple[type, torch.device] | None,
) -> Plan:
    """Return the plan of a star MLP without its weights.

    Args:
        call: what decides but sizes.
        rows: of the input.
        sizes: channels of the input, of the product and of the result.
        training: a backward will follow.
        takes_wide: take the kernels of wide MLPs where the others do not fit.
        residual: class and device of the residual.
    """
    _, device, _ = call.tensors[0]
    on_cpu = device.type == "cpu" and not (call.backend == "triton" and call.interpret)
    if residual is not None and (residual[0] not in PLAIN or residual[1] != device):
        return Plan("eager", f"residual is a {residual[0].__name__} on {residual[1]}")
    if call.backend == "cpu" or (on_cpu and call.backend == "auto"):
        reason = cpu_reason(call, rows, sizes, training)
        return Plan("eager", reason) if reason else Plan("cpu")
    reason = kernel_reason(call) or too_few(call.backend, call.dtype, rows, sizes)
    if reason:
        return Plan("eager", reason)
    reason = too_wide(device, call.dtype, sizes, training)
    if not reason:
        tile = mlp_tile(MLP_FORWARD, device, _held_width(sizes), call.dtype.itemsize)
        return Plan("star_mlp", tile=tile)
    wide = takes_wide or call.backend == "triton"
    return Plan("star_mlp_wide") if wide else Plan("eager", reason)


def cpu_reason(call: Call, rows: int, sizes: Sizes, training: bool) -> str:
    """Return why the row-blocked op for CPUs may not run; empty if it may."""
    kind, device, dtype = call.tensors[0]
    if device.type != "cpu":
        return f"input is on {device.type!r}"
    if call.tracer in ("compile", "export"):
        return COMPILED.reason
    if call.interpret:
        return "Triton's interpreter replaces the CPU's own kernel"
    odd = next((k for k, _, _ in call.tensors if k not in PLAIN), None)
    if odd is not None:
        what = "input" if kind not in PLAIN else "a parameter"
        return f"{what} is a {odd.__name__}"
    other = next((kept for _, _, kept in call.tensors if kept != torch.float32), None)
    if other is not None:
        return f"dtype {other} (needs float32)"
    if any(place != device for _, place, _ in call.tensors):
        return "the parameters are on another device"
    if not call.activation.closed_form:
        return f"activation {call.activation.name!r} was registered without a derivative"
    if not call.by_name:
        return _other_name(call.activation)
    if call.autocast:
        return "autocast is on"
    if call.tracer:
        return TRANSFORMED
    if call.backend != "auto":
        return ""
    channels, hidden_bytes = sizes[0], rows * sizes[1] * dtype.itemsize
    if training and channels > MAX_CHANNELS_TRAINING:
        return f"in training {channels} channels are too many for what the op computes twice"
    least = MIN_HIDDEN_BYTES_INFERENCE
    if training:
        least = max(MIN_HIDDEN_BYTES_TRAINING, channels * HIDDEN_BYTES_A_CHANNEL)
    return small(hidden_bytes) if hidden_bytes < least else ""


def _other_name(row: Activation) -> str:
    return f"the row of the activation is not in ACTIVATIONS under its own name {row.name!r}"


def small(hidden_bytes: int) -> str:
    """Return in words that a hidden activation of so many bytes runs eager."""
    return f"hidden activation of {hidden_bytes} bytes is small enough for eager"


def too_few(backend: str, dtype: torch.dtype, rows: int, sizes: Sizes) -> str:
    """Return why there are too few rows for a fused star MLP; empty if enough."""
    width = max(sizes[0], sizes[2])
    if backend == "triton" or not few(dtype, rows, width):
        return ""
    return f"{rows} rows of {width} channels would leave most of a GPU idle"


def few(dtype: torch.dtype, rows: int, width: int) -> bool:
    """Return True if so many rows of `width` channels would leave most of a GPU idle."""
    return rows < MIN_ROWS and width * dtype.itemsize > MAX_BYTES_ANY_ROWS


def unsuited(conv: Convolution, x: Tensor) -> str:
    """Return why cuDNN should compute a convolution of `x` (N, C, H, W); empty if the kernel may.

    cuDNN computes float32, because nothing shows yet that three TF32 products are faster.
    """
    if x.dtype == torch.float32:
        return "cuDNN computes float32 convolutions"
    if conv.contraction > MAX_CONTRACTION:
        return f"{conv.contraction} products an output are more than the saved passes are worth"
    if conv.in_channels > PATCH_CHANNELS and x.stride(1) != 1:
        return f"{conv.in_channels} channels that are not channels_last"
    pixels, channels = conv.pixels(x.shape), max(conv.in_channels, conv.out_channels)
    if few(x.dtype, pixels, channels):
        return f"{pixels} pixels of {channels} channels would leave most of a GPU idle"
    return ""


def too_wide(device: torch.device, dtype: torch.dtype, sizes: Sizes, training: bool) -> str:
    """Return why no tile keeps the hidden activation on chip; empty if one does.

    Input and output channels decide, since a program holds whole rows; training needs a tile of
    the backward too.
    """
    width, size = _held_width(sizes), dtype.itemsize
    missing = "forward" if mlp_tile(MLP_FORWARD, device, width, size) is None else ""
    if not missing and training and not mlp_backward_tiles(device, width, sizes[1], size):
        missing = "backward"
    if not missing:
        return ""
    return f"{sizes[0]} -> {sizes[2]} channels are too wide for a {missing} tile in {dtype}"


def _held_width(sizes: Sizes) -> int:
    """Return the columns of the widest row that a program holds."""
    return max(sum(split_columns(w)) for w in (sizes[0], sizes[2]))
