"""StarNets as CUDA graphs, with a recorder on the CPU in the place of CUDA's."""

import copy
import io
import threading
import time

import pytest
import torch
from torch import nn

from starlayers import explain, use_backend
from starlayers.kernels import versions
from starlayers.modules import StarMLP
from starlayers.vision import StarNet, graphs
from tests.helpers import randn


class Recorded:
    """Stands for a CUDA graph: repeats the network on the memory that it was captured with."""

    def __init__(self, model, source, result, memory):
        self.model, self.source, self.result = model, source, result
        self.replays, self.memory = 0, memory
        self.weights_stayed = versions.weights_stay()

    def replay(self):
        self.replays += 1
        result = self.model.forward_head(self.model.forward_features(self.source))
        with torch.inference_mode(self.result.is_inference()):
            self.result.copy_(result)

    def pool(self):
        return self.memory


@pytest.fixture
def captures(monkeypatch):
    """Let networks on the CPU be captured; returns the list of graphs."""
    made = []

    def capture(model, source, pool):
        result = model.forward_head(model.forward_features(source))
        made.append(Recorded(model, source, result, pool or object()))
        return made[-1], result

    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(graphs, "DEVICES", {"cpu"})
    return made


def starnet(graph, **options):
    net = StarNet(8, (1,), stage_strides=(2,), num_classes=3, **options)
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
            nn.init.normal_(norm.running_mean)
    return net.fuse(graph=graph)


X = randn(2, 3, 32, 32)


class Doubled(StarMLP):
    def forward(self, x):
        return 2 * super().forward(x)


def defined(net, x):
    return net.forward_head(net.forward_features(x))


@torch.no_grad()
def test_a_kind_of_input_is_captured_once_and_replayed_for_every_value(captures):
    net = starnet(True)
    first = net(X)
    kept = first.clone()
    second = net(2 * X)
    torch.testing.assert_close(first, defined(net, X))
    torch.testing.assert_close(second, defined(net, 2 * X))
    assert torch.equal(first, kept)  # the graph's own memory is written again, this is not
    assert [g.replays for g in captures] == [2]
    assert net(X[:1]).shape == (1, 3)
    net(X.contiguous(memory_format=torch.channels_last))
    assert len(captures) == 3
    assert len(net.graphs.captured) == 3


@torch.no_grad()
def test_auto_waits_for_a_kind_to_come_again(captures):
    net = starnet("auto")
    for count in (0, 1, 1):
        torch.testing.assert_close(net(X), defined(net, X))
        assert len(captures) == count


@torch.no_grad()
def test_auto_declines_where_copies_cost_more_than_launches(captures, monkeypatch):
    net = starnet("auto")
    assert "is captured yet" in net.plan(X).reason
    monkeypatch.setattr(graphs, "COPY_BYTES_S", 1e3)
    assert "copying (2, 3, 32, 32) costs more than" in net.plan(X).reason
    for _ in range(3):
        net(X)
    assert captures == []
    (reason,) = net.graphs.failed.values()  # later calls need not find it again
    assert reason in net.plan(X).reason


def sgd(net):
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.AdamW(net.parameters(), lr=0.05, fused=True).step()


def other_memory(net):
    net.head.weight.data = net.head.weight.data * 2


CHANGES = {
    "a weight in place": lambda net: net.head.weight.detach().mul_(2),
    "a state dict": lambda net: net.load_state_dict(starnet(False).state_dict()),
    "a fused optimizer": sgd,
    "another memory": other_memory,
    "another class": lambda net: setattr(net.stages[0][1].mlp, "__class__", Doubled),
    "another parameter": lambda net: setattr(net.head, "bias", nn.Parameter(torch.ones(3))),
    "another module": lambda net: setattr(net, "norm", nn.Identity()),
    "another head": lambda net: net.reset_classifier(5),
    "another activation": lambda net: setattr(net.stages[0][1].mlp, "act", "tanh"),
    "another padding": lambda net: setattr(net.stem.conv, "padding_mode", "reflect"),
    "another type": lambda net: net.half().float(),
    "modes": lambda net: (net.head.weight.data.mul_(2), net.eval()),
}


@torch.no_grad()
@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_network_is_captured_anew(name, captures):
    net = starnet(True)
    before = net(X)
    with torch.enable_grad():
        CHANGES[name](net)
    y = net(X)
    torch.testing.assert_close(y, defined(net, X))
    assert y.shape != before.shape or not torch.equal(y, before)
    assert len(captures) == 2
    net(X)
    assert [g.replays for g in captures] == [1, 2]


@torch.no_grad()
def test_another_layout_and_another_parameter_of_equal_value_are_captured_anew(captures):
    net = starnet(True)
    net.reset_classifier(8)  # as many as features
    net(X)
    net.head.weight.data = net.head.weight.data.t()
    torch.testing.assert_close(net(X), defined(net, X))
    assert len(captures) == 2
    net.head.weight = nn.Parameter(net.head.weight.detach().clone())
    net(X)
    net.head.weight.mul_(2)
    torch.testing.assert_close(net(X), defined(net, X))
    assert len(captures) == 4


@torch.no_grad()
def test_a_tensor_in_the_place_of_a_setting_is_a_change(captures):
    net = starnet(True)
    net.note = torch.zeros(2)
    net(X)
    net.note = torch.ones(2)
    net(X)
    assert len(captures) == 2


def test_a_graph_captured_in_inference_mode_serves_other_modes_too(captures):
    net = starnet(True)
    with torch.inference_mode():
        net(X)
    with torch.no_grad():
        torch.testing.assert_close(net(2 * X), defined(net, 2 * X))
    assert [g.replays for g in captures] == [2]


@torch.no_grad()
def test_graphs_of_a_network_share_memory_and_keep_folded_weights(captures):
    net = starnet(True)
    net(X)
    net(X[:1])
    assert captures[0].memory is captures[1].memory
    assert all(g.weights_stayed for g in captures)
    assert not versions.weights_stay()
    net.stages[0][1].recordings = {"kind": "launches"}
    net(X)
    (known,) = (c for c in net.graphs.captured.values() if len(c.source) == 2)
    net.stages[0][1].train().eval()  # which forgets them
    assert {"kind": "launches"} in known.recordings


@torch.no_grad()
def test_threads_get_results_of_their_own_inputs(captures, monkeypatch):
    net = starnet(True)
    inputs = [k * X for k in range(1, 5)]
    wanted = [defined(net, x) for x in inputs]
    net(X)
    replay = Recorded.replay

    def slow(self):
        time.sleep(0.002)  # the others would write their input now
        replay(self)

    monkeypatch.setattr(Recorded, "replay", slow)
    got = [[] for _ in inputs]
    start = threading.Barrier(len(inputs))

    def call(i):
        start.wait()
        with torch.no_grad():
            got[i].extend(net(inputs[i]) for _ in range(5))

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results, y in zip(got, wanted, strict=True):
        assert len(results) == 5
        for result in results:
            torch.testing.assert_close(result, y)


@torch.no_grad()
def test_graphs_are_of_the_very_network_and_not_of_its_replicas(captures):
    net = starnet(True)
    net(X)
    twin = copy.copy(net)  # shares the graphs
    twin._modules = dict(net._modules, norm=nn.Identity())
    torch.testing.assert_close(twin(X), defined(twin, X))
    torch.testing.assert_close(net(X), defined(net, X))
    replica = net._replicate_for_data_parallel()
    assert replica.plan(X).reason.startswith("the network is a replica of nn.DataParallel")


@torch.no_grad()
def test_a_compiler_sees_the_steps(captures):
    net = starnet(True)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), defined(net, X))
    assert captures == []


def test_calls_that_no_graph_serves_run_step_by_step_and_say_why(captures):
    net = starnet(True)
    assert net(X).requires_grad
    assert "gradients" in net.plan(X).reason
    with torch.no_grad():
        with use_backend("eager"):
            net(X)
            assert net.plan(X).reason == "the eager backend was asked for"
        assert net.plan(X.to("meta")).reason == "input is on 'meta', and graphs are CUDA's"
        seen = []
        handle = net.stem.register_forward_hook(lambda *_: seen.append(1))
        net(X)
        assert (net.plan(X).reason, seen) == ("a module has hooks", [1])
        handle.remove()
        with nn.modules.module.register_module_forward_hook(lambda *_: None):
            assert net.plan(X).reason == "a module has hooks"
        net.train()(X)
        assert net.plan(X).reason == "the network is in training mode"
        assert captures == []
        assert net.plan(X.requires_grad_()).reason == "the network is in training mode"
    traced = torch.fx.symbolic_trace(starnet(True))
    torch.testing.assert_close(traced(X), traced(X))
    assert captures == []
    assert starnet(False).plan(X) is None


@torch.no_grad()
def test_explain_tells_whether_a_graph_is_replayed(captures):
    net = starnet(True)
    rows = explain(net, X)
    assert rows[0].name == ""
    assert str(rows[0].plan) == "runs step by step: no graph of this kind of input is captured yet"
    assert len(rows) > 1
    net(X)
    (row,) = explain(net, X)
    assert str(row.plan) == "runs fused: CUDA graph"
    assert all(row.name for row in explain(starnet(False), X))


@torch.no_grad()
def test_a_failed_capture_is_told_once_and_not_tried_again(monkeypatch, captures):
    calls = []

    def fails(model, source, pool):
        calls.append(1)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "capture", fails)
    net = starnet(True)
    with pytest.warns(UserWarning, match="StarNet: a capture failed: operation not permitted"):
        torch.testing.assert_close(net(X), defined(net, X))
    torch.testing.assert_close(net(X), defined(net, X))
    assert len(calls) == 1
    assert net.plan(X).reason.startswith("a capture failed: operation not permitted")


@torch.no_grad()
def test_the_graph_used_longest_ago_goes(captures, monkeypatch):
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
    net = starnet(True)
    for batch in (1, 2, 1, 3, 1, 2):
        x = randn(batch, 3, 32, 32)
        torch.testing.assert_close(net(x), defined(net, x))
    assert [len(g.source) for g in captures] == [1, 2, 3, 2]
    assert len(net.graphs.captured) == 2


@torch.no_grad()
def test_copies_and_pickles_have_no_graphs(captures):
    net = starnet(True)
    net(X)
    twin = copy.deepcopy(net)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (twin, loaded):
        assert (other.graphs.always, len(other.graphs.captured)) == (True, 0)
        torch.testing.assert_close(other(X), net(X))
    assert "graphs" not in net.fuse().__dict__
    assert all("graph" not in name for name in net.state_dict())


def test_graph_is_true_false_or_auto():
    with pytest.raises(ValueError, match="graph must be True, False or 'auto', got 'yes'"):
        starnet("yes")
