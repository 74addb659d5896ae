"""Inspector of a model's parts, and the table that describes it."""

import copy

import pytest
import sb3_contrib as contrib
import stable_baselines3 as sb3
import torch
from gymnasium import spaces
from torch import nn

from starlayers.rl.describe import describe
from starlayers.rl.inspect import Inspector, Network
from starlayers.rl.surgery import starify
from tests.rl.agents import ALGORITHMS, BOX, CHOICE, IMAGE, PLANE
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


# --- describe: the table of a model, and that the model stays as it is


@pytest.mark.parametrize("policy", ["MlpPolicy", "StarMlpPolicy"])
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: a.__name__)
def test_a_healthy_model_has_no_problems(algorithm, policy):
    model = build(algorithm, policy=policy)
    found = describe(model, strict=True)
    assert found.problems == ()
    assert (found.algorithm, found.policy) == (algorithm.__name__, type(model.policy).__name__)
    total = sum(p.numel() for p in model.policy.parameters())
    assert sum(n.parameters for n in found.networks) == total
    for network in found.networks:
        target = "_target" in network.name
        assert network.trained == (0 if target else network.parameters)
        assert not (target and network.optimizers)
        if network.kind not in ("Parameter", "FlattenExtractor"):
            assert network.flops > 0
        if network.trained:
            assert network.learning_rates == (pytest.approx(model.lr_schedule(1.0)),)
    text = str(found)
    assert "no problems found" in text
    assert all(network.name in text for network in found.networks)


@pytest.mark.parametrize("algorithm", [sb3.PPO, sb3.TD3, contrib.QRDQN, contrib.CrossQ])
def test_starified_models_are_healthy(algorithm):
    model = build(algorithm, net_arch=[8, 8])
    before = describe(model)
    after = describe(starify(model))
    assert after.problems == ()
    assert [n.name for n in after.networks] == [n.name for n in before.networks]
    assert sum(n.trained for n in after.networks) > sum(n.trained for n in before.networks)


@pytest.mark.parametrize("algorithm", [sb3.PPO, sb3.SAC, sb3.TD3, sb3.DQN, contrib.TQC])
@pytest.mark.parametrize("policy", ["StarCnnPolicy", "CnnPolicy"])
def test_image_models_are_healthy(algorithm, policy):
    options = {"features_extractor_kwargs": {"features_dim": 8}}
    assert describe(build(algorithm, IMAGE, policy=policy, **options)).problems == ()


def test_the_table_of_ppo():
    found = describe(build(sb3.PPO, action=CHOICE))
    rows = {n.name: n for n in found.networks}
    assert list(rows) == [
        "pi_features_extractor",
        "mlp_extractor.policy_net",
        "mlp_extractor.value_net",
        "action_net",
        "value_net",
    ]
    assert rows["pi_features_extractor"].shared == ("vf_features_extractor",)
    assert rows["pi_features_extractor"].flops == 0
    assert rows["mlp_extractor.policy_net"].flops == 2 * 3 * 8
    assert rows["action_net"].flops == 2 * 8 * 4
    assert rows["action_net"].parameters == 8 * 4 + 4
    assert rows["action_net"].optimizers == ("policy.optimizer",)
    lines = str(found).splitlines()
    assert lines[0].startswith("PPO with ActorCriticPolicy: 109 parameters, 109 trained; FLOPs per")
    assert lines[1].split() == (
        ["network", "class", "shared", "with", "parameters", "FLOPs", "optimizer", "lr", "trains"]
    )
    assert lines[5].split() == (
        ["action_net", "Linear", "36", "64", "policy.optimizer", "0.0003", "yes"]
    )


def test_star_trunks_are_counted_one_by_one():
    joint = build(sb3.PPO, policy="StarMlpPolicy", net_arch=[8, 8])
    stack = next(n for n in describe(joint).networks if n.name == "mlp_extractor.stack")
    assert (stack.kind, stack.flops) == ("StarStack", 2 * 2 * (3 * 16 + 8 * 16))
    model = build(contrib.TRPO, policy="StarMlpPolicy", net_arch=[8, 8])
    rows = {n.name: n for n in describe(model).networks}
    assert rows["mlp_extractor.policy_net"].flops == 2 * (3 * 16 + 8 * 16)
    assert rows["mlp_extractor.value_net"].flops == rows["mlp_extractor.policy_net"].flops
    shared = build(sb3.PPO, policy="StarMlpPolicy", net_arch=[8], share_trunk=True)
    rows = {n.name: n for n in describe(shared).networks}
    assert rows["mlp_extractor.policy_net"].shared == ("mlp_extractor.value_net",)


def test_an_lstm_is_counted():
    rows = {n.name: n for n in describe(build(contrib.RecurrentPPO, lstm_hidden_size=16)).networks}
    assert rows["lstm_actor"].flops == 2 * 4 * 16 * (3 + 16)


@pytest.mark.parametrize("share", [False, True])
def test_who_shares_an_extractor_of_sac(share):
    options = {"features_extractor_kwargs": {"features_dim": 8}}
    model = build(sb3.SAC, IMAGE, policy="CnnPolicy", share_features_extractor=share, **options)
    rows = {n.name: n for n in describe(model).networks}
    extractor = rows["actor.features_extractor"]
    assert extractor.shared == (("critic.features_extractor",) if share else ())
    assert extractor.optimizers == ("actor.optimizer",)
    assert ("critic.features_extractor" in rows) is not share
    assert rows["critic_target.features_extractor"].trained == 0


def test_frozen_parameters_and_rates_show():
    model = build(sb3.PPO)
    model.policy.value_net.weight.requires_grad_(False)
    model.policy.optimizer.param_groups[0]["lr"] = 0.5
    found = describe(model)
    row = next(n for n in found.networks if n.name == "value_net")
    assert (row.parameters, row.trained, row.learning_rates) == (9, 1, (0.5,))
    assert "1 of them" in str(found)
    assert found.problems == ()


@pytest.mark.parametrize("algorithm", [sb3.PPO, contrib.CrossQ], ids=lambda a: a.__name__)
def test_the_model_is_as_it_was(algorithm):
    model = build(algorithm)
    model.policy.set_training_mode(True)
    modes = [m.training for m in model.policy.modules()]
    before = copy.deepcopy(model.policy.state_dict())
    seed = torch.get_rng_state()
    position = model.observation_space.np_random.bit_generator.state
    describe(model)
    assert modes == [m.training for m in model.policy.modules()]
    assert all(torch.equal(v, before[k]) for k, v in model.policy.state_dict().items())
    assert torch.equal(seed, torch.get_rng_state())
    assert position == model.observation_space.np_random.bit_generator.state
    assert all(p.grad is None for p in model.policy.parameters())


def test_other_objects_are_refused():
    with pytest.raises(TypeError, match="such as PPO, got Linear"):
        describe(nn.Linear(2, 2))


def test_a_compiled_policy_is_described_as_it_was():
    for algorithm in (sb3.SAC, sb3.PPO):
        model = build(algorithm, policy="StarMlpPolicy")
        before = describe(model)
        model.policy = torch.compile(model.policy)
        after = describe(model)
        assert (after.networks, after.problems) == (before.networks, ())


def test_both_problems_are_in_the_message():
    model = build(sb3.PPO)
    model.policy.value_net.bias = nn.Parameter(torch.zeros(1))
    description = describe(model)
    assert len(description.problems) == 2
    assert "2 problems\n- no optimizer" in str(description)
    with pytest.raises(ValueError, match=r"^PPO:\n- no optimizer has value_net.bias.*\n- policy"):
        describe(model, strict=True)


def test_columns_are_aligned():
    lines = str(describe(build(sb3.PPO))).splitlines()[1:-1]
    for column in ("class", "shared with", "optimizer"):  # to the left
        starts = lines[0].index(column)
        assert all(line[starts - 2 : starts] in ("  ", "") for line in lines)
    ends = lines[0].index("parameters") + len("parameters")  # to the right
    assert all(line[ends - 1] != " " and line[ends : ends + 2] == "  " for line in lines)
