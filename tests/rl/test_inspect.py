"""Inspector: parts and optimizers by name, a forward pass, and what it leaves behind."""

import pytest
import sb3_contrib as contrib
import stable_baselines3 as sb3
import torch
from gymnasium import spaces
from torch import nn

from starlayers.rl.inspect import Inspector, Network
from tests.rl.agents import BOX, PLANE
from tests.rl.agents import stock as build


@pytest.mark.parametrize(
    ("parameters", "trained", "trains"),
    [(1200, 1200, "yes"), (1200, 1000, "1,000 of them"), (1200, 0, "no"), (0, 0, "")],
)
def test_cells_of_the_table(parameters, trained, trains):
    network = Network("a", "B", ("c", "d"), parameters, trained, 2000, ("e", "f"), (3e-4, 0.5))
    expected = ("a", "B", "c, d", f"{parameters:,}", "2,000", "e, f", "0.0003, 0.5", trains)
    assert network.cells() == expected


def test_parts_and_optimizers():
    sac, ppo = Inspector(build(sb3.SAC)), Inspector(build(sb3.PPO))
    assert list(sac.parts) == ["actor", "critic", "critic_target"]
    assert list(sac.optimizers) == ["actor.optimizer", "critic.optimizer"]
    assert (list(ppo.parts), list(ppo.optimizers)) == ([], ["policy.optimizer"])
    assert (ppo.actor_critic, sac.actor_critic) == (True, False)
    p = ppo.policy.value_net.bias
    assert ppo.optimizers_of[id(p)] == [("policy.optimizer", pytest.approx(3e-4))]
    assert ppo.is_algorithm("PPO")
    assert ppo.is_algorithm("OnPolicyAlgorithm")
    assert not ppo.is_algorithm("TRPO")


def test_everything_is_restored_after_an_error():
    inspector = Inspector(build(contrib.CrossQ))
    policy, seed = inspector.policy, torch.get_rng_state()
    policy.train(True)
    before = [b.clone() for b in policy.buffers()]

    def disturb():
        with inspector.evaluation_mode():
            assert not any(m.training for m in policy.modules())
            torch.randn(3)
            for buffer in policy.buffers():
                buffer.add_(1)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        disturb()
    assert all(m.training for m in policy.modules())
    assert all(torch.equal(a, b) for a, b in zip(before, policy.buffers()))
    assert torch.equal(seed, torch.get_rng_state())


def test_observations_are_those_of_the_space():
    space = spaces.Dict(x=BOX, kind=spaces.Discrete(5))
    inspector = Inspector(build(sb3.PPO, space, policy="MultiInputPolicy"))
    first, second = inspector.observations(4), inspector.observations(4)
    assert {key: tuple(x.shape) for key, x in first.items()} == {"x": (4, 3), "kind": (4,)}
    assert all(torch.equal(first[key], second[key]) for key in first)
    flat = Inspector(build(sb3.PPO)).observations(2)
    assert flat.shape == (2, 3)
    assert not torch.equal(flat[0], flat[1])


def test_states_of_an_lstm():
    model = build(contrib.RecurrentPPO, lstm_hidden_size=16, n_lstm_layers=2)
    (hidden, cell), starts = Inspector(model).lstm_state(3)
    assert (hidden.shape, cell.shape, starts.shape) == ((2, 3, 16), (2, 3, 16), (3,))
    assert not any(x.any() for x in (hidden, cell, starts))
    assert Inspector(build(sb3.PPO)).lstm_state(3) == ()


@pytest.mark.parametrize("algorithm", [sb3.PPO, sb3.SAC, sb3.DQN, contrib.ARS])
def test_flops_are_two_per_weight_and_observation(algorithm):
    inspector = Inspector(build(algorithm, net_arch=[8, 8]))
    found = {network.name: network.flops for network in inspector.networks()}
    for name, module in inspector.policy.named_modules():
        if name in found:
            weights = [p.numel() for p in module.parameters() if p.ndim == 2]
            assert found[name] == 2 * sum(weights), name


def test_running_statistics_are_found_and_put_back():
    model = build(contrib.CrossQ, BOX, PLANE)
    inspector = Inspector(model)
    before = {name: b.clone() for name, b in inspector.policy.named_buffers()}
    with inspector.evaluation_mode():
        names = inspector.running_statistics()
        assert not any(m.training for m in inspector.policy.modules())
    assert names
    assert {name.split(".")[0] for name in names} == {"actor", "critic"}
    assert {name.rpartition(".")[2] for name in names} == {"ra_mean", "ra_var"}
    assert all(torch.equal(before[n], b) for n, b in inspector.policy.named_buffers())
    with Inspector(build(sb3.PPO)).evaluation_mode():
        assert Inspector(build(sb3.PPO)).running_statistics() == []


def test_parameters_outside_of_networks_are_rows_too():
    networks = {n.name: n for n in Inspector(build(sb3.PPO)).networks()}
    assert networks["log_std"].kind == "Parameter"
    assert (networks["log_std"].parameters, networks["log_std"].flops) == (2, 0)
    model = build(sb3.PPO)
    model.policy.register_module("unused", None)
    model.policy.register_module("empty", nn.Identity())
    names = [n.name for n in Inspector(model).networks()]
    assert "unused" not in names
    assert "empty" not in names


def test_the_learning_rate_of_ars_is_its_schedule():
    networks = list(Inspector(build(contrib.ARS)).networks())
    (network,) = (n for n in networks if n.trained)
    assert (network.name, network.optimizers) == ("action_net", ("ARS",))
    assert network.learning_rates == (0.02,)
