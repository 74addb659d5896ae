"""Formulas of gates, read from their graphs."""

import pytest
import torch
import torch.nn.functional as F

from starlayers import ACTIVATIONS
from starlayers.surgery.gate_graph import (
    GateGraphError,
    activation_formula,
    activation_of,
    gate_formula,
    written,
)

H = torch.ones(4, 6)
STAR = ("mul.Tensor", "up", ("silu.default", "gate"))


def formula(gate, h=H):
    return gate_formula(gate, h)


def test_halves():
    assert formula(lambda h: h.chunk(2, 1)[0]) == "gate"
    assert formula(lambda h: h.chunk(2, -1)[1]) == "up"
    assert formula(lambda h: h.split(3, 1)[1]) == "up"
    assert formula(lambda h: h.split([3, 3], -1)[0]) == "gate"
    assert formula(lambda h: h[:, 3:6]) == "up"
    assert formula(lambda h: h[..., :]) == "h"
    assert formula(lambda h: h[:, 1:4])[0] == "slice.Tensor"
    assert formula(lambda h: h.split([2, 4], -1)[0])[0] == "item"
    assert formula(lambda h: h[:, ::2])[0] == "slice.Tensor"


def test_factors_have_one_order():
    assert formula(lambda h: F.silu(h[:, :3]) * h[:, 3:]) == STAR
    assert formula(lambda h: h[:, 3:] * F.silu(h[:, :3])) == STAR


def test_casts_without_a_second_rounding_are_left_out():
    def gate(h):
        return (F.silu(h[:, :3].float()) * h[:, 3:].float()).to(h.dtype)

    assert formula(gate) == formula(gate, H.bfloat16()) == formula(gate, H.half()) == STAR
    assert formula(lambda h: h.half().float()) == ("to_float16", "h")
    assert formula(lambda h: h.bfloat16().half(), H.half()) == ("to_bfloat16", "h")


def test_defaults_are_left_out():
    silu = ("gelu.default", "gate")
    assert formula(lambda h: F.gelu(h[:, :3])) == silu
    assert formula(lambda h: F.gelu(h[:, :3], approximate="none")) == silu
    assert formula(lambda h: F.gelu(h[:, :3], approximate="tanh")) == (*silu, "tanh")
    assert formula(lambda h: F.softplus(h[:, :3], 1, 20)) == ("softplus.default", "gate")
    assert formula(lambda h: F.softplus(h[:, :3], 1, 9)) == ("softplus.default", "gate", 1, 9)


@pytest.mark.parametrize("name", [n for n, row in ACTIVATIONS.items() if row.name == n])
def test_rows_of_the_table(name):
    row = ACTIVATIONS[name]

    def gate(h):
        return row.fn(h[:, :3]) * h[:, 3:]

    others = [r for r in ACTIVATIONS.values() if r is not row]
    assert activation_of(formula(gate), [*others, row]) == name
    with pytest.raises(GateGraphError, match=r"not act\(gate\) \* up with an act of the table"):
        activation_of(formula(gate), others)


def test_relu6_has_two_names():
    assert formula(lambda h: F.hardtanh(h[:, :3], 0.0, 6.0)) == activation_formula(
        ACTIVATIONS["relu6"]
    )
    assert formula(lambda h: F.hardtanh(h[:, :3], 0.0, 5.0))[0] == "hardtanh.default"


@pytest.mark.parametrize(
    ("gate", "reason"),
    [
        (lambda h: h.add_(1), "works in place, by add_"),
        (lambda h: (h, h), "more than one tensor"),
        (lambda h: h + torch.ones(6), "not act"),
        (lambda h: h if h.sum() > 0 else -h, "no graph that holds for all values"),
        (lambda h: h if len(h) > 3 else -h, "no graph that holds for all values and any number"),
        (lambda h: h[:2], "not two halves side by side"),
    ],
)
def test_graphs_that_are_no_formula(gate, reason):
    with pytest.raises(GateGraphError, match=reason):
        activation_of(formula(gate), [ACTIVATIONS["silu"]])


def test_any_width():
    def narrow(h):
        gate, up = h.chunk(2, -1)
        return F.silu(gate) * up if h.shape[-1] > 5 else up

    assert gate_formula(narrow, H) == STAR
    with pytest.raises(GateGraphError, match="no graph that holds for inputs of any size"):
        gate_formula(narrow, H, any_width=True)
    assert gate_formula(lambda h: h.chunk(2, -1)[0], H, any_width=True) == "gate"


def test_formulas_as_text():
    assert written(STAR) == "mul(up, silu(gate))"
    assert written(("clamp.default", "up", None, 7.0)) == "clamp(up, None, 7.0)"
    assert written("gate") == "gate"
