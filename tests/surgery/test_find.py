"""MLPs that are found, sites in a model, and sizes of linear layers."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

from starlayers import starify
from starlayers.surgery import Site, find_mlps
from starlayers.surgery import find as module
from starlayers.surgery.find import Finding, NameFilter
from starlayers.surgery.linear_layers import (
    Projection,
    base_layer,
    dtype_and_device,
    gate_blocker,
    projection,
    weight_of,
)
from starlayers.surgery.site import attribute, join, parent_of, put
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
        "blocks.0.fc1",
        "blocks.0",
        Site("chain", "plain", "fc1", "act", "fc2"),
        act_name="gelu",
    )
    assert gated == Finding(
        "blocks.1.up",  # as the recipe claims it: the verification orders the branches
        "blocks.1",
        Site("gated", "gated", "gate", "act", "down", up="up"),
        act_name="silu",
        act="silu(x)",
        casts=False,
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
    assert module._caller(net, "child.seq.0") == ("", "child.seq.0")
    assert module._caller(net, "child.seq") == ("", "child.seq")
    assert module._caller(net, "child") is None  # no sequence
    assert module._caller(net, "") is None
    inner = Holds(sequence())
    assert module._caller(Holds(inner), "child.child") == ("child", "child")
    alone = nn.Sequential(sequence())
    assert module._caller(alone, "0") is None
    assert module._caller(nn.ModuleDict({"a": sequence()}), "a") is None


def test_nested_sequences():
    net = nn.Sequential(sequence(), nn.Sequential(nn.LayerNorm(8), sequence()))
    assert [f.path for f in find_mlps(net)] == ["0.0", "1.1.0"]
    x = torch.randn(2, 8)
    y = net(x)
    assert torch.equal(starify(net)(x), y)


# --- sites, and access to parts by dotted name


def test_dotted_names():
    net = nn.Sequential(nn.Sequential(nn.ReLU(), nn.GELU()))
    assert parent_of(net, "0.1") == (net[0], "1")
    assert parent_of(net, "0") == (net, "0")
    assert attribute(net, "0.1") is net[0][1]
    with pytest.raises(AttributeError):
        attribute(net, "0.7")
    assert join("a.b", "c") == "a.b.c"
    assert join("", "c") == "c"


def test_put_keeps_the_place_among_the_children():
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    gelu = nn.GELU()
    put(net, "1", gelu)
    assert net[1] is gelu
    assert [type(m) for m in net] == [nn.Linear, nn.GELU, nn.Linear]


def test_put_replaces_a_function_and_not_the_module_it_hides():
    layer = nn.ReLU()
    net = nn.Module()
    net.act = layer
    vars(net)["act"] = nn.functional.gelu  # as deepcopy leaves nn.TransformerDecoderLayer
    put(net, "act", nn.functional.silu)
    assert net.act is nn.functional.silu
    assert net._modules["act"] is layer


def test_sites_compare_and_copy_by_value():
    site = Site("r", "plain", "a", "b", None)
    assert copy.deepcopy(site) == site == Site(recipe="r", form="plain", inp="a", act="b", out=None)


# --- sizes and weights of linear layers, and refusals of gates


class OtherLinear(nn.Module):
    """Linear layer of another library, which does not derive from `nn.Linear`."""

    def __init__(self, n, f):
        super().__init__()
        self.in_features, self.out_features = n, f


class Derived(nn.Linear):
    pass


class Wrapper(nn.Module):
    """Adapter around a layer, as PEFT makes it."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer = layer


@pytest.mark.parametrize(
    ("module", "sizes"),
    [
        (nn.Linear(2, 3), (2, 3, False)),
        (Derived(2, 3), (2, 3, False)),
        (OtherLinear(2, 3), (2, 3, False)),
        (Conv1D(3, 2), (2, 3, False)),
        (nn.Conv2d(2, 3, 1), (2, 3, True)),
        (nn.Conv2d(2, 3, 1, padding="same"), (2, 3, True)),
        (nn.Conv2d(2, 3, 1, padding="valid"), (2, 3, True)),
        (Wrapper(Wrapper(nn.Linear(2, 3))), (2, 3, False)),
        (nn.Conv2d(2, 3, 1, padding=1), None),
        (nn.Conv2d(2, 3, 3), None),
        (nn.Conv2d(2, 3, (1, 3)), None),
        (nn.Conv2d(2, 3, 1, stride=2), None),
        (nn.Conv2d(2, 4, 1, groups=2), None),
        (nn.Conv1d(2, 3, 1), None),
        (OtherLinear(2, None), None),
        (OtherLinear("2", 3), None),
        (nn.Bilinear(2, 2, 3), None),
        (nn.Embedding(2, 3), None),
        (None, None),
    ],
)
def test_projection(module, sizes):
    assert projection(module) == (None if sizes is None else Projection(*sizes))


@pytest.mark.parametrize("padding", [0, (0, 0)])
def test_padding_may_be_set_as_a_number_later(padding):
    conv = nn.Conv2d(2, 3, 1)
    conv.padding = padding
    assert projection(conv) == Projection(2, 3, True)
    conv.padding = 1
    assert projection(conv) is None


def test_channels_are_last_by_default():
    assert Projection(2, 3).channels_first is False


def test_base_layer():
    layer = nn.Linear(2, 3)
    assert base_layer(Wrapper(Wrapper(layer))) is layer
    assert base_layer(layer) is layer
    assert base_layer(Wrapper("no module")).base_layer == "no module"


def test_weight_of():
    layer = nn.Linear(2, 3)
    assert weight_of(layer) is layer.weight
    assert weight_of(Wrapper(layer)) is layer.weight
    assert weight_of(nn.ReLU()) is None
    normed = parametrizations.weight_norm(nn.Linear(2, 3))
    assert weight_of(normed) is normed.parametrizations.weight.original1
    spectral = parametrizations.spectral_norm(nn.Linear(2, 3))
    assert weight_of(spectral) is spectral.parametrizations.weight.original


def test_dtype_and_device():
    layer = nn.Linear(2, 3, dtype=torch.bfloat16, device="meta")
    assert dtype_and_device(layer) == (torch.bfloat16, torch.device("meta"))


def with_weight(dtype):
    layer = nn.Linear(2, 3)
    layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
    return layer


class Callable_(nn.Linear):
    """Quantised layer of torch: its weight is a method."""

    weight = None

    def __init__(self):
        nn.Module.__init__(self)


class Packed4Bit(torch.Tensor):
    pass


def subclassed():
    layer = nn.Linear(2, 3)
    del layer.weight
    layer.weight = layer.bias.new_zeros(3, 2).as_subclass(Packed4Bit)
    return layer


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Linear(2, 3), None),
        (Wrapper(nn.Linear(2, 3)), None),
        (with_weight(torch.bfloat16), None),
        (with_weight(torch.float16), None),
        (with_weight(torch.int32), "Linear holds torch.int32 weights: starify before quantising"),
        (
            with_weight(torch.float8_e4m3fn),
            "Linear holds torch.float8_e4m3fn weights: starify before quantising",
        ),
        (
            Callable_(),
            "Callable_ has no weight tensor: quantised? starify before quantising",
        ),
        (
            subclassed(),
            "Linear has a weight of type Packed4Bit: starify before quantising, after initialising",
        ),
        (
            nn.LazyLinear(3),
            "LazyLinear has a weight of type UninitializedParameter: starify before quantising, "
            "after initialising",
        ),
    ],
)
def test_gate_blocker(layer, reason):
    assert gate_blocker(layer) == reason
