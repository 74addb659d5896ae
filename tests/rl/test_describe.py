"""describe: the table of a model, and that the model stays as it is."""

import copy

import pytest
import sb3_contrib as contrib
import stable_baselines3 as sb3
import torch
from torch import nn

from starlayers.rl.describe import describe
from starlayers.rl.surgery import starify
from tests.rl.agents import ALGORITHMS, CHOICE, IMAGE
from tests.rl.agents import stock as build


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
