"""MLPs that are found, and names that select them."""

import pytest
import torch
from torch import nn

from starlayers import starify
from starlayers.surgery import Site, find_mlps
from starlayers.surgery import find as module
from starlayers.surgery.find import Finding, NameFilter
from tests.surgery.small import MLP, Gated, Net, Packed, Twice


@pytest.mark.parametrize(
    ("include", "exclude", "names"),
    [
        (None, None, ["a", "a.b", "a.b.c", "ab", "d"]),
        ("a", None, ["a", "a.b", "a.b.c"]),
        ("a.*", None, ["a.b", "a.b.c"]),
        ("a*", None, ["a", "a.b", "a.b.c", "ab"]),
        (["a.b", "d"], None, ["a.b", "a.b.c", "d"]),
        (("[ad]",), None, ["a", "a.b", "a.b.c", "d"]),
        ([], None, []),
        ("A", None, []),
        (None, "a", ["ab", "d"]),
        (None, ["a.b", "d"], ["a", "ab"]),
        (None, [], ["a", "a.b", "a.b.c", "ab", "d"]),
        ("a", "a.b", ["a"]),
        ("a.b", "a", []),
    ],
)
def test_name_filter(include, exclude, names):
    selected = NameFilter(include, exclude)
    assert [n for n in ("a", "a.b", "a.b.c", "ab", "d") if n in selected] == names


def test_patterns_must_match():
    names = ["x.fc1", "y.fc1"]
    NameFilter(["x", "y.*"], "*").check(names)
    NameFilter(None, None).check([])
    with pytest.raises(
        ValueError,
        match=r"^include pattern 'z' matches none of the 2 MLPs found, the first of which is x",
    ):
        NameFilter(["x", "z"], None).check(names)
    with pytest.raises(ValueError, match=r"^exclude pattern 'z' matches none of the 0 MLPs found$"):
        NameFilter(None, "z").check([])


def test_findings():
    net = Net(MLP(), Gated("up"), Packed(gate_last=True), Twice())
    plain, gated, packed, twice = find_mlps(net)
    assert plain == Finding(
        "blocks.0.fc1", "blocks.0", Site("chain", "plain", "fc1", "act", "fc2"), None, ()
    )
    assert gated == Finding(
        "blocks.1.up",  # as the recipe claims it: the trial run swaps the branches
        "blocks.1",
        Site("gated", "gated", "gate", "act", "down", up="up"),
    )
    assert packed.site == Site("packed", "packed", "both", "act", "down", gate_last=True)
    assert (twice.path, twice.reason) == (
        "blocks.3.fc1",
        "one run calls 'act' 2 times, not once",
    )


def test_between():
    class Dropped(Gated):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            return self.down(self.drop(self.act(self.gate(x)) * self.up(x)))

    assert [f.between for f in find_mlps(Dropped())] == [("drop",)]


def test_star_layers_are_left_out_but_their_names_are_known():
    net = starify(Net(MLP(), Gated()), grow=1)
    assert find_mlps(net) == []
    assert find_mlps(net, include=["blocks.0", "blocks.1.gate"]) == []
    with pytest.raises(ValueError, match=r"'blocks\.2' matches none of the 2 MLPs"):
        find_mlps(net, include="blocks.2")


def test_what_is_not_selected_is_not_run():
    class Loud(MLP):
        def forward(self, x):
            pytest.fail("was run")

    net = Net(MLP(), Loud())
    assert [f.path for f in find_mlps(net, include="blocks.0")] == ["blocks.0.fc1"]
    assert [f.path for f in find_mlps(net, exclude="blocks.1")] == ["blocks.0.fc1"]


def test_a_shared_mlp_is_found_once():
    mlp = MLP()
    assert [f.path for f in find_mlps(Net(mlp, mlp))] == ["blocks.0.fc1"]


def test_another_claim_of_the_same_layer_is_tried_if_the_first_fails():
    class TwoActivations(MLP):
        """Only the second of its activations is applied."""

        def __init__(self):
            super().__init__()
            self.act, self.relu = nn.Tanh(), nn.ReLU()

        def forward(self, x):
            return self.fc2(self.relu(self.fc1(x)))

    (finding,) = find_mlps(TwoActivations())
    assert (finding.site.act, finding.reason) == ("relu", None)

    class NoneApplies(TwoActivations):
        def forward(self, x):
            return self.fc2(self.fc1(x))

    (finding,) = find_mlps(NoneApplies())
    assert (finding.site.act, finding.reason) == ("act", "one run calls 'act' 0 times, not once")


def test_modules_inside_a_star_projection_are_no_mlps():
    class Inner(nn.Linear):
        """A linear layer with an MLP inside, as adapters may have."""

        def __init__(self):
            super().__init__(8, 16)
            self.adapter = MLP()

        def forward(self, x):
            return super().forward(self.adapter(x))

    mlp = MLP()
    mlp.fc1 = Inner()
    assert [f.path for f in find_mlps(mlp)] == ["fc1", "fc1.adapter.fc1"]
    starify(mlp, include="fc1", exclude="fc1.*")
    assert type(mlp.fc1.inp) is Inner
    assert find_mlps(mlp) == []


def sequence():
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))


class Holds(nn.Module):
    def __init__(self, child):
        super().__init__()
        self.child = child

    def forward(self, x):
        return self.child(x)


def test_the_caller_of_a_sequence():
    net = Holds(nn.ModuleDict({"seq": nn.Sequential(sequence(), nn.LayerNorm(8))}))
    assert module._caller(net, "child.seq.0") == (net, "child.seq.0")
    assert module._caller(net, "child.seq") == (net, "child.seq")
    assert module._caller(net, "child") is None  # no sequence
    assert module._caller(net, "") is None
    inner = Holds(sequence())
    assert module._caller(Holds(inner), "child.child") == (inner, "child")
    alone = nn.Sequential(sequence())
    assert module._caller(alone, "0") is None
    assert module._caller(nn.ModuleDict({"a": sequence()}), "a") is None


def test_nested_sequences():
    net = nn.Sequential(sequence(), nn.Sequential(nn.LayerNorm(8), sequence()))
    assert [f.path for f in find_mlps(net)] == ["0.0", "1.1.0"]
    x = torch.randn(2, 8)
    y = net(x)
    assert torch.equal(starify(net)(x), y)
