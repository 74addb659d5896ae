"""StarNets whose training steps are CUDA graphs, with a stand-in for CUDA's on the CPU."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from starlayers import explain, use_backend
from starlayers.vision import StarNet, graphs, training_graph
from tests.helpers import randn

X, LABELS = randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 0])


class Replayed(torch.autograd.Function):
    """A step in the memory of its capture, as `torch.cuda.make_graphed_callables` makes it."""

    @staticmethod
    def forward(ctx, stand, x, *parameters):
        ctx.stand = stand
        stand.forwards += 1
        stand.x.copy_(x)
        with torch.enable_grad():
            stand.y = graphs.run(stand.model, stand.x)
        return stand.result.copy_(stand.y.detach()).detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        stand = ctx.stand
        for g, now in zip(stand.gradients, torch.autograd.grad(stand.y, stand.wanted, dy)):
            g.copy_(now)
        made = iter(stand.gradients)
        needs = ctx.needs_input_grad[2:]
        return (None, None, *(next(made).detach() if need else None for need in needs))


class Stand:
    def __init__(self, model, x):
        self.model, self.x, self.forwards = model, x, 0
        self.autocast = torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()
        self.wanted = [p for p in model.parameters() if p.requires_grad]
        for _ in range(3):
            y = graphs.run(model, x + torch.rand(1))
            torch.autograd.grad(y.sum(), self.wanted)
        self.result = y.detach().clone()
        self.gradients = [torch.zeros_like(p) for p in self.wanted]

    def __call__(self, x):
        return Replayed.apply(self, x, *self.model.parameters())


@pytest.fixture
def stands(monkeypatch):
    """Let networks on the CPU be captured; returns what stands for their graphs."""
    made = []

    def make(model, x):
        made.append(Stand(model, x))
        return made[-1]

    monkeypatch.setattr(training_graph, "make_graphed", make)
    monkeypatch.setattr(graphs, "DEVICES", {"cpu"})
    return made


def starnet(**options):
    torch.manual_seed(1)
    return StarNet(8, (1,), stage_strides=(2,), num_classes=3, **options)


def step(net, x=X, labels=LABELS):
    loss = F.cross_entropy(net(x), labels)
    loss.backward()
    return loss.detach()


def same_networks(one, other):
    for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


def same_gradients(one, other):
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_a_captured_network_trains_as_one_that_is_not(stands):
    net, twin = starnet(), starnet()
    assert net.graph_training(X) is net
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (net, twin)]
    for k in range(4):
        for m, optimizer in zip((net, twin), optimizers, strict=True):
            step(m, X + k)
            optimizer.step()
            optimizer.zero_grad()
    assert stands[0].forwards == 4
    same_networks(net, twin)


def test_capturing_leaves_buffers_gradients_and_random_numbers_as_they_were(stands):
    net = starnet()
    before, state = copy.deepcopy(net), torch.get_rng_state()
    net.graph_training(X)
    same_networks(net, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in net.parameters())


def test_a_step_is_a_change_of_the_statistics_that_others_can_see(stands):
    net = starnet().graph_training(X)
    stands[0].model = starnet()  # as kernels do: nothing that PyTorch counts happens to the network
    counters = [m.num_batches_tracked for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [b._version for b in counters]
    stands[0].wanted = list(stands[0].model.parameters())
    step(net)
    assert all(b._version > v for b, v in zip(counters, before, strict=True))
    assert len(counters) == 5


def test_gradients_accumulate_and_may_be_kept(stands):
    net, twin = starnet().graph_training(X), starnet()
    for k in range(3):
        step(net, X + k)
        step(twin, X + k)
    same_gradients(net, twin)
    kept = [p.grad for p in net.parameters()]
    values = [g.clone() for g in kept]
    net.zero_grad()
    step(net, 2 * X)
    assert all(map(torch.equal, kept, values))
    assert stands[0].forwards == 4


def test_gradients_may_be_set_to_zero_between_forward_and_backward(stands):
    net, twin = starnet().graph_training(X), starnet()
    for k in range(3):
        for m in (net, twin):
            loss = F.cross_entropy(m(X + k), LABELS)
            m.zero_grad(set_to_none=False)
            loss.backward()
    same_gradients(net, twin)


def test_a_second_forward_before_the_backward_runs_step_by_step(stands):
    net, twin = starnet().graph_training(X), starnet()
    for m in (net, twin):
        first, second = m(X), m(2 * X)
        if m is net:
            assert net.plan(X).reason == "the backward of the step before is still to come"
        second.sum().backward()
        first.square().sum().backward()
    same_gradients(net, twin)
    assert stands[0].forwards == 1
    step(net)
    assert stands[0].forwards == 2


def test_a_result_that_is_gone_needs_no_backward(stands):
    net = starnet().graph_training(X)
    for _ in range(2):
        net(X)
    assert stands[0].forwards == 2


def test_results_are_kept_and_a_late_second_backward_raises(stands):
    net = starnet().graph_training(X)
    first = net(X)
    value = first.detach().clone()
    first.sum().backward(retain_graph=True)
    net(2 * X)
    assert torch.equal(first, value)
    with pytest.raises(RuntimeError, match="StarNet: this backward comes after a later forward"):
        first.sum().backward()


def test_other_calls_run_step_by_step_and_say_why(stands):
    net = starnet().graph_training(X)
    assert str(net.plan(X)) == "runs fused: CUDA graph"
    (row,) = explain(net, X)
    assert str(row.plan) == "runs fused: CUDA graph"

    def reason(x=X):
        net(x)
        return net.plan(x).reason

    assert reason(X[:2]) == "another kind of input was captured"
    assert reason(X.clone().requires_grad_()).startswith("gradients of the parameters, and only")
    with torch.no_grad():
        assert reason().startswith("gradients of the parameters, and only")
    with torch.autocast("cpu", torch.bfloat16):
        assert reason() == "another kind of input was captured"
    with use_backend("eager"):
        assert reason() == "the eager backend was asked for"
    assert stands[0].forwards == 0
    net.eval()(X)
    assert net.plan(X) is None
    assert reason_of(net.train()) == ""
    assert reason_of(copy.copy(net)).startswith("the network is not as it was captured")


def reason_of(net):
    return net.plan(X).reason


CHANGES = {
    "another type": lambda net: net.double(),
    "another head": lambda net: net.reset_classifier(5),
    "frozen": lambda net: net.head.requires_grad_(False),
    "a hook": lambda net: net.stem.register_forward_hook(lambda *_: None),
    "dropout": lambda net: setattr(net, "drop_rate", 0.5),
    "a norm in eval mode": lambda net: net.norm.eval(),
    "another memory": lambda net: setattr(net.head.bias, "data", torch.ones(3)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_network_runs_step_by_step_until_it_is_captured_anew(name, stands):
    net = starnet().graph_training(X)
    CHANGES[name](net)
    x = X.to(net.head.weight.dtype)
    net(x)
    reason = net.plan(x).reason
    assert reason.endswith("call graph_training again") or "another kind" in reason
    assert stands[0].forwards == 0
    if name != "a hook":
        net.graph_training(x)(x).sum().backward()
        assert stands[1].forwards == 1


def test_frozen_parameters_get_no_gradient(stands):
    net = starnet()
    net.stem.requires_grad_(False)
    step(net.graph_training(X))
    assert stands[0].forwards == 1
    assert all(p.grad is None for p in net.stem.parameters())
    assert net.head.weight.grad.abs().sum() > 0


def test_autocast_is_captured_without_its_cache(stands):
    with torch.autocast("cpu", torch.bfloat16):
        net = starnet().graph_training(X)
        assert net(X).dtype == torch.bfloat16
    assert stands[0].autocast == (True, False)
    assert stands[0].forwards == 1


def test_copies_are_not_captured_and_state_dicts_are_the_same(stands):
    net = starnet().graph_training(X)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    for other in (copy.deepcopy(net), torch.load(file, weights_only=False)):
        assert other.plan(X).reason == "this copy of the network was not captured"
        step(other)
    assert stands[0].forwards == 0
    assert net.state_dict().keys() == starnet().state_dict().keys()


def test_what_cannot_be_captured_raises_and_leaves_the_network_as_it_was(stands, monkeypatch):
    net = starnet()
    replica = net._replicate_for_data_parallel()
    for changed, words in (
        (starnet().eval(), "the network is in eval mode"),
        (starnet().requires_grad_(False), "no parameter wants a gradient"),
        (replica, "a replica of nn.DataParallel"),
    ):
        with pytest.raises(RuntimeError, match=f"no CUDA graph of training: .*{words}"):
            changed.graph_training(X)
    before = copy.deepcopy(net)

    def fails(model, x):
        graphs.run(model, x)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(training_graph, "make_graphed", fails)
    with pytest.raises(RuntimeError, match="not permitted"):
        net.graph_training(X)
    same_networks(net, before)
    assert net.plan(X) is None


def test_a_network_on_the_cpu_has_no_graphs():
    with pytest.raises(RuntimeError, match="input is a Tensor on 'cpu', and graphs are CUDA's"):
        starnet().graph_training(X)
