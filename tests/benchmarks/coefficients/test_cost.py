"""The cost of a penalty: what is measured is what the library computes, and memory is counted."""

import json

import torch

from benchmarks import coefficients_cost
from benchmarks.coefficients_cost import ARMS, BASELINE, memory
from starlayers import StarOp
from starlayers.coefficients import CoefficientPenalty
from starlayers.vision import StarNet


def test_memory_counts_what_is_kept_and_the_largest_tensor():
    op = StarOp(99, 50, act=None)
    found = memory(CoefficientPenalty(op, 2))
    vectors = 50 * 100 * 4
    assert found["largest"] == vectors
    assert 2 * vectors <= found["kept"] < 3 * vectors
    dense = memory(CoefficientPenalty(StarOp(99, 50, act=None, rank=2), 1))
    assert dense["largest"] == 50 * 100 * 100 * 4


def test_a_smoke_run_writes_a_row_for_every_penalty(monkeypatch, tmp_path, capsys):
    small = StarNet(8, (1, 1), stage_strides=(2, 2))
    monkeypatch.setattr(coefficients_cost, "starnet_s4", lambda: small)
    before = [p.detach().clone() for p in small.parameters()]
    coefficients_cost.run(smoke=True, out=tmp_path)
    result = json.loads((tmp_path / "coefficients-cost-smoke.json").read_text())
    assert list(result["rows"]) == [BASELINE, *ARMS]
    assert result["rows"][BASELINE]["ratio"] == 1
    for name in ARMS:
        row = result["rows"][name]
        assert row["penalty_share"] == row["penalty_ms"] / result["rows"][BASELINE]["median_ms"]
        assert row["kept"] > 0
    assert all(torch.equal(a, b) for a, b in zip(before, small.parameters()))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:7]] == [BASELINE, *ARMS]
