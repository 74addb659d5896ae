"""Gated MLPs that people have edited: what each computes beyond a star, by kind."""

import itertools
import random
import types
from collections import Counter, deque

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class SwiGLU(nn.Module):
    """Star MLP in the usual names; every case below is an edit of it."""

    def __init__(self, act=None, bias=False):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(16, 40, bias=bias), nn.Linear(16, 40, bias=bias)
        self.down_proj = nn.Linear(40, 16, bias=bias)
        self.act_fn = nn.SiLU() if act is None else act

    def product(self, x):
        return self.act_fn(self.gate_proj(x)) * self.up_proj(x)

    def forward(self, x):
        return self.down_proj(self.product(x))


class Function(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return self.f(x)


def act(f):
    """Return a maker of an MLP whose activation is a function."""
    return lambda: SwiGLU(Function(f))


def edited(forward, **parts):
    """Return a maker of an MLP with a forward of its own, and more attributes."""

    def make():
        kind = type("Edited", (SwiGLU,), {"forward": forward})
        mlp = kind()
        for name, value in parts.items():
            value = value() if isinstance(value, type) or callable(value) else value
            if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
                mlp.register_buffer(name, value)
            else:
                setattr(mlp, name, value)
        return mlp

    return make


def on_product(change):
    """Return a maker of an MLP that changes its product."""
    return edited(lambda self, x: self.down_proj(change(self, self.product(x), x)))


def on_output(change, **parts):
    """Return a maker of an MLP that changes its output."""
    return edited(lambda self, x: change(self, SwiGLU.forward(self, x), x), **parts)


class TrainsBeta(nn.Module):
    def __init__(self):
        super().__init__()
        self.beta = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x * torch.sigmoid(self.beta * x)


class NoisyInTraining(nn.Module):
    def forward(self, x):
        return F.silu(x + torch.randn_like(x)) if self.training else F.silu(x)


class OtherGradient(torch.autograd.Function):
    """SiLU with the gradient of the identity."""

    @staticmethod
    def forward(ctx, x):
        return F.silu(x)

    @staticmethod
    def backward(ctx, grad):
        return grad


def straight_through(x):
    return x + (F.silu(x) - x).detach()


def scaled_gradient(x):
    y = F.silu(x)
    if y.requires_grad:
        y.register_hook(lambda g: 2 * g)
    return y


def parameter(*shape, value=0.0):
    return lambda: nn.Parameter(torch.full(shape, value))


def counted(self, x):
    self.calls = getattr(self, "calls", 0) + 1
    y = SwiGLU.forward(self, x)
    return 2 * y if self.calls > 3 else y


def guarded(self, h, x):
    return h.clamp(-65504, 65504) if h.dtype == torch.float16 else h


def no_grad_gate(self, x):
    with torch.no_grad():
        gate = self.act_fn(self.gate_proj(x))
    return self.down_proj(gate * self.up_proj(x))


def branch(first, second=lambda h: h):
    """Return a maker of an MLP whose branches pass through functions."""

    def forward(self, x):
        a, b = first(self.gate_proj(x)), second(self.up_proj(x))
        return self.down_proj(self.act_fn(a) * b)

    return edited(forward)


def identity(h):
    return h


MONITOR = types.SimpleNamespace(calls=0, kept=None)
COUNTS, LAST = Counter(), deque(maxlen=2)


class Quantised(nn.Linear):
    """Linear layer of another class."""


def asks(question):
    """Return a maker of an MLP that doubles its product if a question about itself is answered."""
    return on_product(lambda s, h, x: 2 * h if question(s, h, x) else h)


def noted(note):
    """Return a maker of an MLP that leaves a note elsewhere."""
    return on_product(lambda s, h, x: (note(s, h), h)[1])


def set_global(s, h):
    global LAST_SHAPE
    LAST_SHAPE = object()


LAST_SHAPE = None


def clipped(s, y, x):
    if torch.is_grad_enabled():
        y.register_hook(lambda g: g.clamp(-1, 1))
    return y


class Clip(torch.autograd.Function):
    """Identity whose gradient is clipped."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad.clamp(-1, 1)


def dropped(draw):
    """Return a maker of an MLP that is dropped in training, very rarely."""
    return edited(
        lambda s, x: s.down_proj(s.product(x) * (0 if s.training and draw(s) < 1e-9 else 1)),
        rng=lambda: random.Random(0),
        generator=lambda: np.random.default_rng(0),
        steps=itertools.count,
    )


#: what is asked of tensors and layers that no graph shows -> a maker, and what is named
ASKED = {
    **{f"layer {name}": (asks(f), words) for name, f, words in [
        ("attribute", lambda s, h, x: getattr(s.down_proj, "smooth", None), "'smooth'"),
        ("by children", lambda s, h, x: any(hasattr(m, "smooth") for m in s.children()),
         "'smooth'"),
        ("class", lambda s, h, x: isinstance(s.up_proj, Quantised), "the class of 'up_proj'"),
        ("usual class", lambda s, h, x: not isinstance(s.down_proj, nn.Linear),
         "the class of 'down_proj'"),
        ("type", lambda s, h, x: type(s.down_proj) is Quantised, "asks for the type"),
        ("type's name", lambda s, h, x: s.down_proj.__class__.__name__ == "Q", "the class of"),
        ("bias", lambda s, h, x: s.gate_proj.bias is not None, "'bias' of 'gate_proj'"),
        ("weight's dtype", lambda s, h, x: s.up_proj.weight.dtype == torch.int8, "'weight' of"),
        ("hooks", lambda s, h, x: s.down_proj._forward_hooks, "'_forward_hooks'"),
        ("dict", lambda s, h, x: "smooth" in vars(s.down_proj), "'vars'"),
        ("sizes", lambda s, h, x: s.down_proj.in_features < 9, "'in_features' of 'down_proj'"),
    ]},
    **{f"tensor {name}": (asks(f), name) for name, f in [
        ("grad_fn", lambda s, h, x: x.grad_fn is not None),
        ("is_leaf", lambda s, h, x: not x.is_leaf),
        ("_version", lambda s, h, x: x._version > 0),
        ("storage_offset", lambda s, h, x: x.storage_offset() > 0),
        ("stride", lambda s, h, x: x.stride(-1) != 1),
        ("is_contiguous", lambda s, h, x: not x.is_contiguous()),
        ("is_cuda", lambda s, h, x: x.is_cuda),
        ("_backward_hooks", lambda s, h, x: x._backward_hooks),
    ]},
    "tensor address": (asks(lambda s, h, x: x.data_ptr() % 16 == 1), "data"),
    "gradient clipped by a hook": (on_output(clipped), "register_hook"),
    "gradient clipped by a function": (
        on_output(lambda s, y, x: Clip.apply(y)), "the gradient|view"
    ),
    "gradient retained": (
        noted(lambda s, h: h.retain_grad() if torch.is_grad_enabled() else None), "retain_grad"
    ),
}  # fmt: skip

#: what changes elsewhere, or draws random numbers -> a maker, and what is named
ELSEWHERE = {
    "global object": (
        noted(lambda s, h: setattr(MONITOR, "calls", MONITOR.calls + 1)), "MONITOR"
    ),
    "kept in a global object": (noted(lambda s, h: setattr(MONITOR, "kept", h)), "MONITOR"),
    "global counter": (noted(lambda s, h: COUNTS.update(calls=1)), "COUNTS"),
    "global deque": (noted(lambda s, h: LAST.append(h.detach())), "LAST"),
    "global variable": (noted(set_global), "global|LAST_SHAPE"),
    "class": (noted(lambda s, h: setattr(Quantised, "calls", object())), "Quantised"),
    "python's numbers": (dropped(lambda s: random.random()), "random numbers"),
    "numpy's numbers": (dropped(lambda s: np.random.rand()), "random numbers"),
    "torch's numbers": (dropped(lambda s: float(torch.rand(()))), "graph|rand"),
    "own numbers": (dropped(lambda s: s.rng.random()), "rng"),
    "own numbers of numpy": (dropped(lambda s: s.generator.random()), "generator"),
    "iterator": (dropped(lambda s: next(s.steps)), "steps, an iterator"),
}  # fmt: skip

#: name -> maker, and what its refusal has to name
REFUSED = {
    # limits of the activation, far from where values usually are
    "silu(clamp(max=9))": (act(lambda x: F.silu(x.clamp(max=9))), r"silu\(clamp\(x, None, 9\)\)"),
    "silu(clamp(max=1e3))": (act(lambda x: F.silu(x.clamp(max=1e3))), r"1000\.0"),
    "silu(clamp(max=1e30))": (act(lambda x: F.silu(x.clamp(max=1e30))), r"1e\+30"),
    "silu, then clamped": (act(lambda x: F.silu(x).clamp(max=1e5)), r"clamp\(silu\(x\)"),
    "silu, minimum": (act(lambda x: F.silu(x).clamp(min=-0.27)), r"-0\.27"),
    "Hardtanh(0, 10)": (lambda: SwiGLU(nn.Hardtanh(0, 10)), r"hardtanh\(x, 0, 10\)"),
    "clipped by where": (act(lambda x: torch.where(x > 50, 50.0, F.silu(x))), "where"),
    "clipped by minimum": (act(lambda x: torch.minimum(F.silu(x), x.new_tensor(50.0))), "minimum"),
    "gelu, nearly": (act(lambda x: F.gelu(x) * (1 + 1e-7)), r"mul\(gelu"),
    "silu with beta": (act(lambda x: x * torch.sigmoid(1.0001 * x)), "1.0001"),
    "leaky": (lambda: SwiGLU(nn.LeakyReLU(1e-6)), "leaky_relu"),
    "not element-wise": (act(lambda x: F.silu(x) / F.silu(x).abs().amax().clamp(1)), "amax"),
    "softmax": (act(lambda x: x.softmax(-1)), "softmax"),
    # limits of a branch or of the product
    "gate clamped": (branch(lambda a: a.clamp(max=1e4)), r"clamp\(x, None, 10000\.0\)"),
    "up clamped": (branch(identity, lambda b: b.clamp(-1e4, 1e4)), "both branches pass"),
    "gate scaled": (branch(lambda a: 0.5 * a), r"silu\(mul\(x, 0\.5\)\)"),
    "up scaled": (branch(identity, lambda b: 0.5 * b), "both branches pass"),
    "up + 1": (branch(identity, lambda b: b + 1), "both branches pass"),
    "gate normalised": (branch(lambda a: F.layer_norm(a, (40,))), "layer_norm"),
    "gate + up": (
        edited(lambda s, x: s.down_proj(s.act_fn(s.gate_proj(x) + s.up_proj(x)) * s.up_proj(x))),
        "2 times",
    ),
    "product clamped": (on_product(lambda s, h, x: h.clamp(-1e4, 1e4)), "takes clamp"),
    "product scaled": (on_product(lambda s, h, x: 0.5 * h), "takes mul with 0.5"),
    "product + input": (on_product(lambda s, h, x: h + F.pad(x, (0, 24))), "takes add"),
    "product guarded in float16": (on_product(guarded), "float16.*takes clamp"),
    "product without gradient": (on_product(lambda s, h, x: h.detach()), "takes detach"),
    "inf removed": (on_product(lambda s, h, x: h.nan_to_num()), "takes nan_to_num"),
    # another gradient
    "act without gradient": (act(lambda x: F.silu(x).detach()), "detach"),
    "straight through": (act(straight_through), "detach"),
    "own backward": (act(OtherGradient.apply), "the gradient of"),
    "gradient doubled by a hook": (act(scaled_gradient), "asks a tensor for 'requires_grad'"),
    "gate without gradient": (edited(no_grad_gate), "set_grad_enabled"),
    # conditions
    "noise in training": (lambda: SwiGLU(NoisyInTraining()), "train mode.*randn_like"),
    "dropout in the act": (act(lambda x: F.dropout(F.silu(x), 0.5)), "dropout"),
    "random slopes": (lambda: SwiGLU(nn.RReLU(0.1, 0.3)), "rrelu|leaky_relu"),
    "train mode doubles": (on_output(lambda s, y, x: 2 * y if s.training else y), "train mode"),
    "with gradients only": (
        on_product(lambda s, h, x: h + h.detach().mean() if torch.is_grad_enabled() else h),
        "takes add",
    ),
    "without gradients only": (
        on_output(lambda s, y, x: y if torch.is_grad_enabled() else y.round()),
        "without gradients",
    ),
    "in inference mode": (
        on_output(lambda s, y, x: 2 * y if torch.is_inference_mode_enabled() else y),
        "eval, inference",
    ),
    "long sequences": (
        on_output(lambda s, y, x: 2 * y if x.ndim == 3 and x.shape[1] > 512 else y),
        "size of its input",
    ),
    "single sequences": (on_output(lambda s, y, x: 2 * y if x.shape[0] == 1 else y), "differs"),
    "single tokens": (
        on_output(lambda s, y, x: 2 * y if x.ndim == 3 and x.shape[1] == 1 else y),
        "differs",
    ),
    "rows": (on_output(lambda s, y, x: 2 * y if x.ndim == 2 else y), "2 dimensions"),
    "maps": (on_output(lambda s, y, x: 2 * y if x.ndim == 4 else y), "4 dimensions"),
    "bfloat16": (on_output(lambda s, y, x: 2 * y if x.dtype == torch.bfloat16 else y), "bfloat16"),
    "autocast": (
        on_output(lambda s, y, x: 2 * y if torch.is_autocast_enabled("cpu") else y),
        "autocast",
    ),
    "large inputs": (on_output(lambda s, y, x: y if x.abs().max() < 1e4 else 2 * y), "graph"),
    "not contiguous": (
        on_output(lambda s, y, x: y if x.is_contiguous() else 2 * y),
        "differs|is_contiguous",
    ),
    "counts its calls": (edited(counted), "sets 'calls'"),
    "counts in a buffer": (
        edited(lambda s, x: (s.calls.add_(1), SwiGLU.forward(s, x))[1], calls=torch.zeros(2)),
        "changes 'calls' in place",
    ),
    "changes its input": (
        edited(lambda s, x: SwiGLU.forward(s, x.mul_(1.0))),
        "changes 'the input' in place",
    ),
    # parameters at neutral values
    "ReZero": (on_output(lambda s, y, x: y + s.alpha * x, alpha=parameter()), "'alpha'|add"),
    "LayerScale": (
        on_output(lambda s, y, x: y * s.scale, scale=parameter(16, value=1.0)),
        "'scale'",
    ),
    "bias of zeros": (on_output(lambda s, y, x: y + s.shift, shift=parameter(16)), "'shift'"),
    "buffer of ones": (on_output(lambda s, y, x: y * s.ones, ones=torch.ones(16)), "'ones'"),
    "side branch of zeros": (
        on_output(lambda s, y, x: y + s.side(x) * s.alpha, side=lambda: nn.Linear(16, 16),
                  alpha=parameter()),
        "its output is add",
    ),
    "learned beta": (lambda: SwiGLU(TrainsBeta()), r"act_fn\.beta"),
    "PReLU": (lambda: SwiGLU(nn.PReLU(init=0.0)), r"'act_fn\.weight'"),
    "residual": (on_output(lambda s, y, x: x + y), "its output is add"),
    # interface
    "keeps its gate": (
        edited(lambda s, x: s.down_proj(s.act_fn(s.keep(s.gate_proj(x))) * s.up_proj(x)),
               keep=lambda: Keeps()),
        r"sets 'keep\.kept'",
    ),
    "returns two": (on_output(lambda s, y, x: (y, s.product(x))), "times|one tensor"),
    "returns none": (on_output(lambda s, y, x: (y, None)), "one tensor"),
    "guard for float16 in a module": (
        edited(lambda s, x: s.down_proj(s.guard(s.product(x))), guard=lambda: Half()),
        "it calls 'guard' before its last layer in eval mode, float16.*no module before",
    ),
    **ASKED,
    **ELSEWHERE,
    "reads a weight": (
        edited(lambda s, x: s.down_proj(s.act_fn(F.linear(x, s.gate_proj.weight)) * s.up_proj(x))),
        "0 times",
    ),
}  # fmt: skip


class Keeps(nn.Module):
    def forward(self, h):
        self.kept = h
        return h


class Half(nn.Module):
    def forward(self, x):
        return x.clamp(-6e4, 6e4) if x.dtype == torch.float16 else x


class Finite(nn.Identity):
    def forward(self, x):
        return torch.nan_to_num(x)


class FiniteDropout(nn.Dropout):
    def forward(self, x):
        return torch.nan_to_num(super().forward(x))


def shifted(self, x, **kwargs):
    y = SwiGLU.forward(self, x)
    return y + kwargs["shift"] if "shift" in kwargs else y


def with_dropout(self, x):
    h = F.dropout(self.product(x), self.rate, self.training)
    return self.down_proj(h)


def up_first(self, x):
    up = self.up_proj(x)
    return self.down_proj(self.act_fn(self.gate_proj(x)) * up)


def with_limit(self, x):
    h = self.product(x)
    return self.down_proj(h if self.limit is None else h.clamp(-self.limit, self.limit))


#: name -> maker of what is a star, however it is written
EXACT = {
    "plain": SwiGLU,
    "biases": lambda: SwiGLU(bias=True),
    "gelu": lambda: SwiGLU(nn.GELU()),
    "gelu by tanh": lambda: SwiGLU(nn.GELU("tanh")),
    "relu in place": lambda: SwiGLU(nn.ReLU(inplace=True)),
    "Hardtanh(0, 6)": lambda: SwiGLU(nn.Hardtanh(0.0, 6.0)),
    "function": lambda: SwiGLU(F.silu),
    "written out": act(lambda x: x * torch.sigmoid(x)),
    "gelu written out": act(lambda x: 0.5 * x * (1 + torch.erf(x * 2**-0.5))),
    "in float32": act(lambda x: F.silu(x.float()).to(x.dtype)),
    "inline": edited(lambda s, x: s.down_proj(F.silu(s.gate_proj(x)) * s.up_proj(x))),
    "other order": edited(lambda s, x: s.down_proj(s.up_proj(x) * F.silu(s.gate_proj(x)))),
    "method": edited(lambda s, x: s.down_proj(s.gate_proj(x).sigmoid().mul(s.up_proj(x)))),
    "times one": on_output(lambda s, y, x: y * 1.0),
    "scale with a default": edited(
        lambda s, x, scale=1.0: SwiGLU.forward(s, x) if scale == 1.0 else s.down_proj(x) * scale
    ),
    "shift by keyword": edited(shifted),
    "functional dropout at 0": edited(with_dropout, rate=0.0),
    "no limit": edited(with_limit, limit=None),
    "dropout": edited(lambda s, x: s.down_proj(s.drop(s.product(x))), drop=lambda: nn.Dropout(0.5)),
    "own identity": edited(lambda s, x: s.down_proj(s.guard(s.product(x))), guard=lambda: Finite()),
    "own dropout": edited(
        lambda s, x: s.down_proj(s.guard(s.product(x))), guard=lambda: FiniteDropout(0.1)
    ),
    "a copy as output": on_output(lambda s, y, x: y.clone()),
    "functional dropout of the input at 0": edited(
        lambda s, x: SwiGLU.forward(s, F.dropout(x, 0.0))
    ),
    "up first": edited(up_first),
    "norm after the last layer": on_output(
        lambda s, y, x: s.norm(y), norm=lambda: nn.LayerNorm(16)
    ),
    "norm before the last layer": edited(
        lambda s, x: s.down_proj(s.norm(s.product(x))), norm=lambda: nn.LayerNorm(40)
    ),
}
