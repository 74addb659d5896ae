"""All families of transformers through starify, and the tools that watch it."""

import pytest
import torch
import transformers
from torch import nn

from benchmarks.harness.records import load
from benchmarks.starify import families as sweep
from benchmarks.starify.census import census, unlisted
from benchmarks.starify.families_study import NAME
from benchmarks.starify.tiny_models import NotBuiltError, build, families, inputs_of, run
from benchmarks.starify.tiny_tables import NOT_BUILT
from starlayers import starify
from starlayers.surgery import report

#: one family in twelve; all of them, an hour, are the study `python -m benchmarks.starify families`
SAMPLE = list(families())[::12]


def test_the_study_has_a_record_of_every_family_and_no_difference():
    records = {record.run: record for record in load(NAME)}
    missing = set(families()) - set(records)
    versions = {record.versions["transformers"] for record in records.values()}
    # another release has other families
    assert not missing or transformers.__version__ not in versions, missing
    assert len(records) > 600
    told = {run: record.metrics.get("problems") for run, record in records.items()}
    assert {run: problems for run, problems in told.items() if problems} == {}


@pytest.mark.slow
@pytest.mark.hf
@pytest.mark.parametrize("family", SAMPLE)
def test_a_family_is_converted_exactly_or_left_with_a_reason(family):
    if family in NOT_BUILT:
        with pytest.raises(NotBuiltError, match=r"\w"):
            inputs_of(family, build(family))
        return
    assert sweep.problems(sweep.check(family)) == []


@pytest.mark.hf
@pytest.mark.parametrize(
    ("family", "kind", "state", "reason"),
    [
        ("apertus", "ApertusMLP", "ready", ""),
        ("esm", "EsmIntermediate", "ready", ""),
        ("convnext", "ConvNextLayer", "ready", ""),
        ("lfm2", "Lfm2MLP", "is a star", ""),
        ("rwkv", "RwkvFeedForward", "skipped", "calls relu and sigmoid itself"),
        ("minimax_m3_vl_text", "MiniMaxM3VLDenseMLP", "skipped", "where a star has one"),
        ("levit", "MLPLayerWithBN", "skipped", "BatchNorm1d 'linear_up.batch_norm'"),
        (
            "granite_speech",
            "GraniteSpeechConformerConvModule",
            "skipped",
            "GraniteSpeechConformerDepthWiseConv1d 'depth_conv'",
        ),
        ("segformer", "SegformerMixMLP", "skipped", "not applied to the output of 'fc1'"),
    ],
)
def test_unusual_mlps_are_listed(family, kind, state, reason):
    model = build(family)
    rows = [
        row
        for row in report(model).rows
        if type(model.get_submodule(row.name.rpartition(".")[0])).__name__ == kind
    ]
    assert rows
    assert {row.state for row in rows} == {state}
    assert all(reason in row.detail for row in rows)
    assert unlisted(census(model), report(model).rows) == []


@pytest.mark.hf
def test_models_are_tiny_and_the_same_at_every_build():
    first, second = build("qwen3_next"), build("qwen3_next")
    assert sum(p.numel() for p in first.parameters()) < 10**6
    inputs = inputs_of("qwen3_next", first)
    a, b = run(first, inputs), run(second, inputs)
    assert all(map(torch.equal, a, b))
    kinds = {type(m).__name__ for m in first.modules()}
    assert {"Qwen3NextAttention", "Qwen3NextGatedDeltaNet", "Qwen3NextExperts"} <= kinds


@pytest.mark.hf
@pytest.mark.parametrize("change", ["output", "gradient", "class"])
def test_a_wrong_conversion_is_a_problem(monkeypatch, change):
    def wrong(model, **options):
        starify(model, **options)
        last = model.model.layers[1].mlp.down_proj
        if change == "output":
            last.register_forward_hook(lambda module, x, y: y * (1 + 1e-6))
        elif change == "gradient":
            last.weight.register_hook(lambda gradient: gradient * (1 + 1e-4))
        else:
            model.model.norm = nn.Sequential(model.model.norm)

    monkeypatch.setattr(sweep, "starify", wrong)
    found = sweep.problems(sweep.check("llama"))
    told = {"output": "outputs differ", "gradient": "gradient of", "class": "leaves"}[change]
    assert any(told in problem for problem in found)


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w3, self.w2 = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.w2(self.w1(x) * self.w3(x))


class SelfAttention(Gated):
    pass


class Narrow(nn.Module):
    def __init__(self, hidden=2):
        super().__init__()
        self.body = nn.ModuleList([nn.Linear(4, hidden), nn.Linear(hidden, 4)])

    def forward(self, x):
        return self.body[1](self.body[0](x))


class First(nn.Module):
    def __init__(self, *sizes):
        super().__init__()
        self.dense = nn.Linear(*sizes)

    def forward(self, x):
        return self.dense(x)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.intermediate, self.output = First(4, 8), First(8, 4)

    def forward(self, x):
        return self.output(self.intermediate(x))


class Experts(nn.Module):
    def __init__(self, up, down):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.ones(up)), nn.Parameter(torch.ones(down))

    def forward(self, x):
        return x


@pytest.mark.parametrize(
    ("module", "form", "first"),
    [
        (Gated(), "pair", ("w1", "w3")),
        (Narrow(hidden=7), "pair", ("body.0",)),
        (nn.Sequential(nn.Linear(4, 12), nn.GLU(), nn.Linear(6, 4)), "pair", ("0",)),
        (nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 1)), "pair", ("0",)),
        (Layer(), "split", ("intermediate.dense",)),
        (Experts((3, 12, 4), (3, 4, 6)), "experts", ("up", "down")),
        (Experts((3, 4, 12), (3, 6, 4)), "experts", ("up", "down")),
        (Experts((12, 4), (4, 6)), "experts", ("up", "down")),
    ],
)
def test_the_census_finds_mlps_by_structure(module, form, first):
    (found,) = census(module)
    assert (found.owner, found.form, found.explained) == ("", form, "")
    assert set(found.first) == set(first)


def test_the_census_explains_what_it_leaves_out():
    assert [c.explained for c in census(SelfAttention())] == ["attention: projections of heads"]
    assert [c.explained for c in census(Narrow())] == ["bottleneck: narrows first"]
    assert census(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))) == []
    assert census(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 5))) == []


class Line:
    def __init__(self, name, state="skipped", detail="reason"):
        self.name, self.state, self.detail = name, state, detail


def test_only_a_row_with_a_reason_covers_an_mlp():
    found = census(nn.ModuleDict({"a": Gated(), "b": Experts((3, 12, 4), (3, 4, 6))}))
    assert [c.owner for c in unlisted(found, [])] == ["a", "b"]
    assert unlisted(found, [Line("a.w3"), Line("b.gate")]) == []
    assert [c.owner for c in unlisted(found, [Line("a.w1", detail=" "), Line("b")])] == ["a"]
    assert unlisted(census(SelfAttention()), []) == []


def test_differences_see_shapes_nans_and_gradients_that_are_gone():
    one, nan = torch.ones(2), torch.tensor([1.0, float("nan")])
    infinite = float("inf")
    assert sweep.difference([one], [one]) == 0.0
    assert sweep.difference([one], [one + 0.5]) == 0.5
    assert sweep.difference([nan], [nan]) == 0.0
    assert sweep.difference([nan], [one]) == sweep.difference([one], [one, one]) == infinite
    assert sweep.gradient_difference({"w": one}, {"w": one * 2}) == (0.5, "w")
    assert sweep.gradient_difference({"w": None}, {"w": one}) == (infinite, "w")
    assert sweep.gradient_difference({"w": one}, {"w": one * 0}) == (infinite, "w")
    assert sweep.gradient_difference({"w": None}, {"w": None})[0] == 0.0


def test_the_report_and_the_census_agree_on_an_encoder_of_torch():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 20, batch_first=True), 2)
    mlps = [c.first for c in census(model) if not c.explained]
    assert mlps == [("layers.0.linear1",), ("layers.1.linear1",)]
    assert unlisted(census(model), report(model).rows) == []
