"""Gradient checkpointing changes memory only: values, gradients and statistics stay."""

import copy

import pytest
import torch
from torch import nn

from starlayers.vision.recompute import recompute

from .util import assert_same_tensors, grads, image, snapshot, tiny


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5))


def step(run, module, x):
    torch.manual_seed(2)
    x = x.clone().requires_grad_()
    y = run(x)
    y.square().sum().backward()
    return {"y": y.detach(), "x": x.grad, **grads(module), **snapshot(module)}


def test_recompute_equals_a_plain_call():
    plain, checkpointed, x = net(), net(), image(5, 4)
    for _ in range(3):
        want = step(plain, plain, x)
        got = step(lambda x: recompute(checkpointed, x), checkpointed, x)
        assert_same_tensors(got, want)
    assert checkpointed[1].num_batches_tracked == 3


def test_without_the_guard_statistics_would_move_twice():
    # the reason recompute exists, and proof that the test above can fail
    plain, x = net(), image(5, 4)
    twice = copy.deepcopy(plain)
    step(plain, plain, x)
    step(lambda x: torch.utils.checkpoint.checkpoint(twice, x, use_reentrant=False), twice, x)
    assert (plain[1].num_batches_tracked, twice[1].num_batches_tracked) == (1, 2)


def test_cumulative_average_statistics():
    plain = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, momentum=None))
    checkpointed = copy.deepcopy(plain)
    for seed in (1, 2):
        x = image(5, 4, seed=seed)
        want = step(plain, plain, x)
        assert_same_tensors(step(lambda x: recompute(checkpointed, x), checkpointed, x), want)


def test_norms_that_track_nothing_stay_that_way():
    plain = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, track_running_stats=False))
    checkpointed, x = copy.deepcopy(plain), image(5, 4)
    want = step(plain, plain, x)
    assert_same_tensors(step(lambda x: recompute(checkpointed, x), checkpointed, x), want)
    assert checkpointed[1].track_running_stats is False


class FailsSecondTime(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.calls = nn.BatchNorm1d(4), 0

    def forward(self, x):
        self.calls += 1
        if self.calls == 2:
            raise RuntimeError("second run")
        return self.bn(x).tanh()


def test_an_error_in_the_second_run_leaves_tracking_on():
    module = FailsSecondTime()
    y = recompute(module, image(5, 4).requires_grad_())
    with pytest.raises(RuntimeError, match="second run"):
        y.sum().backward()
    assert module.bn.track_running_stats is True
    assert module.bn.num_batches_tracked == 1


def test_second_order_gradients():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh()).double()

    def second_order(run):
        x = image(5, 4, dtype=torch.float64).requires_grad_()
        (dx,) = torch.autograd.grad(run(x).square().sum(), x, create_graph=True)
        (ddx,) = torch.autograd.grad(dx.square().sum(), x)
        return ddx

    want = second_order(module)
    assert want.abs().max() > 1e-3
    torch.testing.assert_close(second_order(lambda x: recompute(module, x)), want)


def test_two_backwards_through_one_graph():
    plain, checkpointed, x = net().eval(), net().eval(), image(5, 4)
    for run in (plain, lambda x: recompute(checkpointed, x)):
        loss = run(x).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
    assert_same_tensors(grads(checkpointed), grads(plain))


OPTIONS = {
    "plain": {},
    "drop_path": {"drop_path_rate": 0.5},
    "dropout": {"drop_rate": 0.5},
    "no_head": {"num_classes": 0},
}


def train_step(model, x, run):
    torch.manual_seed(3)
    x = x.clone().requires_grad_()
    out = run(model, x)
    sum(o.square().mean() for o in out).backward()
    outputs = {f"y{i}": o.detach() for i, o in enumerate(out)}
    return {**outputs, "x": x.grad, **{f"d{k}": v for k, v in grads(model).items()}}


RUNS = {
    "forward": lambda model, x: [model(x)],
    "features": lambda model, x: [model.forward_features(x)],
    "intermediates": lambda model, x: model.forward_intermediates(x, intermediates_only=True),
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_starnet_with_checkpointing_equals_without(options, train, run):
    plain, checkpointed = (tiny(**options).train(train) for _ in range(2))
    checkpointed.set_grad_checkpointing()
    for seed in (1, 2):
        x = image(4, 3, 16, 16, seed=seed)
        want = train_step(plain, x, run)
        assert_same_tensors(train_step(checkpointed, x, run), want)
        assert_same_tensors(snapshot(checkpointed), snapshot(plain))
    assert plain.stages[0][0].bn.num_batches_tracked == (9 if train else 7)


@pytest.mark.usefixtures("fuse_everything")
def test_starnet_with_checkpointing_and_the_fused_op():
    plain, checkpointed, x = tiny(), tiny(), image(4, 3, 16, 16)
    checkpointed.set_grad_checkpointing()
    want = train_step(plain, x, RUNS["forward"])
    assert_same_tensors(train_step(checkpointed, x, RUNS["forward"]), want)
    assert_same_tensors(snapshot(checkpointed), snapshot(plain))


def test_stages_run_twice_only_where_gradients_are_wanted():
    model, x, runs = tiny(), image(4, 3, 16, 16), []
    model.stages[1][0].register_forward_hook(lambda *_: runs.append(1))
    model(x).sum().backward()
    assert len(runs) == 1
    model.set_grad_checkpointing()
    runs.clear()
    model(x).sum().backward()
    assert len(runs) == 2
    runs.clear()
    with torch.no_grad():
        model(x)
    assert len(runs) == 1
    model.set_grad_checkpointing(False)
    runs.clear()
    model(x).sum().backward()
    assert len(runs) == 1


def test_checkpointing_keeps_less():
    def kept(model):
        sizes = []

        def pack(t):
            sizes.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(image(2, 3, 32, 32))
        return sum(sizes)

    model = tiny(depths=(4, 4))
    everything = kept(model)
    model.set_grad_checkpointing()
    assert kept(model) < everything / 3
