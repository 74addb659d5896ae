"""Nets of the on-policy, off-policy and sb3-contrib policies, and the names of policies."""

import importlib.util
import inspect
import pickle
import subprocess
import sys

import cloudpickle
import pytest
import torch
from sb3_contrib import ARS, QRDQN, TQC, TRPO, CrossQ, MaskablePPO, RecurrentPPO
from sb3_contrib.crossq.policies import CrossQPolicy
from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import nn

import starlayers.rl
from starlayers.rl import StarCnnExtractor, StarCombinedExtractor, contrib
from starlayers.rl.base import image_and_dict
from starlayers.rl.registration import ALIASES, star_policies
from tests.rl.agents import (
    STEPS,
    Sampled,
    agent,
    algorithm,
    parameters,
)


def test_one_trunk_for_both_sides(tmp_path):
    model = agent("PPO", policy_kwargs={"share_trunk": True, "net_arch": [8]}).learn(STEPS)
    assert sum("mlp_extractor" in name for name, _ in model.policy.named_parameters()) == 2
    model.policy.save(tmp_path / "p.pt")
    assert type(model.policy).load(tmp_path / "p.pt").share_trunk
    with pytest.raises(ValueError, match=r"share_trunk=True needs equal sides.*\[8\].*\[4\]"):
        agent("PPO", policy_kwargs={"share_trunk": True, "net_arch": {"pi": [8], "vf": [4]}})


@pytest.mark.parametrize("net_arch", [[], [8], [8, 4], {"pi": [8], "vf": [4, 4]}])
def test_architectures_of_ones_own(net_arch):
    model = agent("PPO", policy_kwargs={"net_arch": net_arch}).learn(STEPS)
    arch = net_arch if isinstance(net_arch, dict) else {"pi": net_arch, "vf": net_arch}
    assert model.policy.mlp_extractor.latent_dim_pi == [3, *arch["pi"]][-1]
    assert model.policy.mlp_extractor.latent_dim_vf == [3, *arch["vf"]][-1]


@pytest.mark.parametrize("options", [{}, {"net": "mlp"}, {"norm": "layer"}, {"share_trunk": True}])
def test_acting_and_judging_use_the_same_trunks_together_and_apart(options):
    policy = agent("PPO", policy_kwargs={**options, "net_arch": [8, 4]}).policy
    x = torch.randn(5, 3)
    pi, vf = policy.mlp_extractor(x)
    torch.testing.assert_close(policy.mlp_extractor.forward_actor(x), pi)
    torch.testing.assert_close(policy.mlp_extractor.forward_critic(x), vf)
    assert torch.equal(pi, vf) is ("share_trunk" in options)
    torch.testing.assert_close(policy(x)[1], policy.predict_values(x))


def test_trpo_trains_actor_and_critic():
    model = agent("TRPO", policy_kwargs={"net_arch": [8, 8]})
    before = parameters(model)
    model.learn(STEPS)
    for name, p in model.policy.named_parameters():
        assert not torch.equal(p, before[name]), name


@pytest.mark.parametrize(
    ("options", "stacked"),
    [
        ({}, True),
        ({"norm": "none"}, True),
        ({"activation_fn": "relu"}, True),
        ({"norm": "layer"}, False),
        ({"net": {"vf": "mlp"}}, False),
        ({"net": "mlp"}, False),
        ({"net_arch": {"pi": [8], "vf": [4]}}, False),
        ({"net_arch": []}, False),
        ({"share_trunk": True}, False),
        ({"share_features_extractor": False}, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["PPO", "MaskablePPO", "TRPO"])
def test_policy_and_value_are_one_stack_where_they_can_be(name, options, stacked):
    stack = agent(name, policy_kwargs=options).policy.mlp_extractor.stack
    assert (stack is not None) is (stacked and name != "TRPO")
    if stack is not None:
        assert stack.act == options.get("activation_fn", "tanh")


# --- heads and critics of the off-policy algorithms


def test_the_product_critic_takes_part_in_each_algorithm_that_has_one():
    for name in ("SAC", "TD3", "DDPG", "TQC"):
        model = agent(name, policy_kwargs={"net": {"pi": "mlp", "qf": "product"}, "net_arch": [8]})
        assert type(model.critic.qf0[0]).__name__ == "ProductTrunk"
        before = model.critic.qf0[0].action.weight.clone()
        model.learn(STEPS)
        assert not torch.equal(model.critic.qf0[0].action.weight, before)
    both = agent("SAC", policy_kwargs={"net": "product"})  # the actor sees no action: a star
    assert type(both.actor.latent_pi[0]).__name__ == "PackedStar"


def test_heads_have_an_output_for_each_choice():
    assert agent("DQN", policy_kwargs={"net_arch": [8]}).q_net.q_net[1].out_features == 3
    options = {"net_arch": [8], "n_quantiles": 5}
    network = agent("QRDQN", policy_kwargs=options).policy.quantile_net
    assert network.quantile_net[1].out_features == 3 * 5
    critic = agent("TQC", policy_kwargs={**options, "n_critics": 3}).critic
    assert [q[1].out_features for q in critic.q_networks] == [5, 5, 5]
    assert [name for name, _ in critic.named_children() if "qf" in name] == ["qf0", "qf1", "qf2"]
    td3 = agent("TD3", policy_kwargs={"net_arch": [8]}).actor.mu
    assert (td3[1].out_features, type(td3[2])) == (2, nn.Tanh)


@pytest.mark.parametrize("name", ["SAC", "TD3", "CrossQ"])
def test_an_actor_is_saved_by_itself(name, tmp_path):
    actor = agent(name, policy_kwargs={"net_arch": [8]}).policy.actor
    actor.save(tmp_path / "actor.pt")
    loaded = type(actor).load(tmp_path / "actor.pt", device="cpu")
    assert (loaded.spec, list(loaded.state_dict())) == (actor.spec, list(actor.state_dict()))
    assert all(torch.equal(v, actor.state_dict()[k]) for k, v in loaded.state_dict().items())


# --- star policies of sb3-contrib: LSTMs, ARS, and the norms of CrossQ


def test_lstms_of_ones_own_size_come_back(tmp_path):
    model = agent("RecurrentPPO", policy_kwargs={"lstm_hidden_size": 7, "net_arch": [8]})
    model.policy.save(tmp_path / "p.pt")
    loaded = type(model.policy).load(tmp_path / "p.pt", device="cpu")
    assert loaded.lstm_actor.hidden_size == 7


def test_crossq_norms_are_those_it_knows():
    from sb3_contrib.common.torch_layers import BatchRenorm1d

    model = agent("CrossQ", policy_kwargs={"net_arch": [8, 8]})
    norms = [m for m in model.policy.modules() if "Norm" in type(m).__name__]
    norms += [m for m in model.policy.modules() if isinstance(m, BatchRenorm1d)]
    assert {type(m) for m in norms} == {BatchRenorm1d}
    # before each layer and behind the last, in the actor and in both critics
    assert len(set(norms)) == 3 * 3
    before = [m.ra_mean.clone() for m in norms]
    model.learn(STEPS)
    assert all(not torch.equal(m.ra_mean, b) for m, b in zip(norms, before))
    # between updates the critics use their running statistics
    assert not any(m.training for m in model.critic.modules() if isinstance(m, BatchRenorm1d))
    bare = agent("CrossQ", policy_kwargs={"net_arch": [8], "batch_norm": False})
    assert not any(isinstance(m, BatchRenorm1d) for m in bare.policy.modules())
    bare.learn(STEPS)


def test_lstm_options_are_all_saved(tmp_path):
    options = {
        "lstm_hidden_size": 7,
        "n_lstm_layers": 2,
        "shared_lstm": True,
        "enable_critic_lstm": False,
        "lstm_kwargs": {"dropout": 0.1},
        "net_arch": [8],
    }
    policy = agent("RecurrentPPO", policy_kwargs=options).policy
    policy.save(tmp_path / "p.pt")
    loaded = type(policy).load(tmp_path / "p.pt", device="cpu")
    assert (loaded.lstm_actor.num_layers, loaded.lstm_actor.dropout) == (2, 0.1)
    assert loaded.lstm_critic is None
    saved = loaded._get_constructor_parameters()
    assert {key: saved[key] for key in options} == {**options, "net_arch": [8]}


@pytest.mark.parametrize("squash", [True, False])
def test_actions_of_ars_end_in_a_tanh_or_not(squash, tmp_path):
    options = {"squash_output": squash, "net_arch": [8]}
    policy = agent("ARS", action="box", policy_kwargs=options).policy
    assert isinstance(policy.action_net[-1], nn.Tanh) is squash
    policy.save(tmp_path / "p.pt")
    assert type(policy).load(tmp_path / "p.pt", device="cpu").squash_output is squash
    discrete = agent("ARS", policy_kwargs=options).policy
    assert not discrete.squash_output
    assert not any(isinstance(m, nn.Tanh) for m in discrete.action_net)


def test_crossq_options_reach_its_norms():
    from sb3_contrib.common.torch_layers import BatchRenorm1d

    options = {"batch_norm_momentum": 0.2, "batch_norm_eps": 0.1, "renorm_warmup_steps": 9}
    for kwargs, expected in (({}, (0.01, 0.001, 100_000)), (options, (0.2, 0.1, 9))):
        policy = agent("CrossQ", policy_kwargs={**kwargs, "net_arch": [8]}).policy
        norms = [m for m in policy.modules() if isinstance(m, BatchRenorm1d)]
        assert {(m.momentum, m.eps, int(m.warmup_steps)) for m in norms} == {expected}
        widths = [m.num_features for m in policy.critic.qf0 if isinstance(m, BatchRenorm1d)]
        assert widths == [8]
    empty = agent("CrossQ", policy_kwargs={"net_arch": {"pi": [], "qf": [8]}}).policy
    assert len(empty.actor.latent_pi) == 1


# --- names of policies, with and without sb3-contrib, and what the package needs


FLAT = {
    PPO: "StarPPOPolicy",
    A2C: "StarPPOPolicy",
    TRPO: "StarActorCriticPolicy",
    MaskablePPO: "StarMaskablePolicy",
    RecurrentPPO: "StarRecurrentPolicy",
    SAC: "StarSACPolicy",
    TD3: "StarTD3Policy",
    DDPG: "StarTD3Policy",
    TQC: "StarTQCPolicy",
    CrossQ: "StarCrossQPolicy",
    DQN: "StarDQNPolicy",
    QRDQN: "StarQRDQNPolicy",
    ARS: "StarARSPolicy",
}


def policy_class(name):
    return getattr(starlayers.rl, name, None) or getattr(contrib, name)


def test_names_are_pinned():
    assert tuple(ALIASES.values()) == ("StarMlpPolicy", "StarCnnPolicy", "StarMultiInputPolicy")
    twins = [name for name in starlayers.rl.__all__ if "Cnn" in name or "MultiInput" in name]
    assert len([name for name in twins if name.endswith("Policy")]) == 10
    assert len(contrib.__all__) == 14


@pytest.mark.parametrize("algorithm", FLAT, ids=lambda a: a.__name__)
def test_every_algorithm_knows_its_policies_by_name(algorithm):
    flat = policy_class(FLAT[algorithm])
    assert algorithm.policy_aliases["StarMlpPolicy"] is flat
    # SB3's own names are still there
    assert {"MlpPolicy", "MlpLstmPolicy"} & set(algorithm.policy_aliases)
    if algorithm in (CrossQ, ARS):
        assert not {"StarCnnPolicy", "StarMultiInputPolicy"} & set(algorithm.policy_aliases)
        return
    for part, extractor in (("Cnn", StarCnnExtractor), ("MultiInput", StarCombinedExtractor)):
        name = f"{FLAT[algorithm].removesuffix('Policy')}{part}Policy"
        policy = algorithm.policy_aliases[f"Star{part}Policy"]
        assert policy is policy_class(name)
        assert issubclass(policy, flat)
        assert policy.base_extractor is extractor
        # as a class of its own file: pickle and SB3's zip files refer to it by name
        assert (policy.__name__, policy.__qualname__) == (name, name)
        assert policy.__module__ == flat.__module__
        for dumps in (pickle.dumps, cloudpickle.dumps):
            assert pickle.loads(dumps(policy)) is policy
            assert name.encode() in dumps(policy)
        assert policy.__doc__.splitlines()[0].endswith(f"behind a `{extractor.__name__}`.")
        assert f'("Star{part}Policy", env' in policy.__doc__


def test_the_classes_of_a_users_own_policy():
    class StarMinePolicy(starlayers.rl.StarDQNPolicy):
        pass

    images, dictionaries = image_and_dict(StarMinePolicy, "mine.DQN")
    assert [p.__name__ for p in (images, dictionaries)] == [
        "StarMineCnnPolicy",
        "StarMineMultiInputPolicy",
    ]
    assert images.__module__ == __name__
    assert "from mine import DQN\n" in images.__doc__


@pytest.mark.parametrize(
    ("policy", "discrete", "buffer"),
    [("StarPPOPolicy", True, False), ("StarSACPolicy", False, True), ("StarDQNPolicy", True, True)],
)
def test_examples_have_actions_and_settings_of_the_algorithm(policy, discrete, buffer):
    images, dictionaries = image_and_dict(getattr(starlayers.rl, policy), "mine.Algorithm")
    assert f"discrete={discrete})" in images.__doc__
    assert f"discrete_actions={discrete})" in dictionaries.__doc__
    for twin in (images, dictionaries):
        assert ("env, buffer_size=100, device" in twin.__doc__) is buffer


def test_each_algorithm_has_a_table_of_its_own():
    tables = [algorithm.policy_aliases for algorithm in FLAT]
    assert len({id(table) for table in tables}) == len(tables) == 13


def test_without_contrib_sb3_has_all_of_its_names(monkeypatch):
    spec = importlib.util.find_spec
    monkeypatch.setattr(
        "starlayers.rl.registration.find_spec",
        lambda name: None if "contrib" in name else spec(name),
    )
    assert set(star_policies()) == {PPO, A2C, SAC, TD3, DDPG, DQN}


def test_stable_baselines3_is_all_that_it_needs():
    code = """
import sys
for name in ("einops", "sb3_contrib", "ale_py", "imageio", "rich", "tqdm", "typer", "cv2"):
    sys.modules[name] = None
sys.modules["stable_baselines3"] = None
try:
    import starlayers.rl
except ImportError as error:
    print(error)
del sys.modules["stable_baselines3"]
import starlayers.rl
from stable_baselines3 import PPO
print(PPO("StarMlpPolicy", "CartPole-v1", device="cpu").policy.mlp_extractor.stack)
print([m for m in sys.modules if m.startswith(("starlayers.vision", "starlayers.nlp"))])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "starlayers.rl needs stable_baselines3: pip install 'starlayers[rl]'",
        "StarStack(2, 4, [44, 44], act='tanh')",
        "[]",
    ], done.stderr


def test_renormalisation_has_the_defaults_of_crossq():
    theirs = inspect.signature(CrossQPolicy).parameters
    actor = object.__new__(contrib.StarCrossQActor)
    norm = actor.renorm({})
    assert norm.keywords == {
        "momentum": theirs["batch_norm_momentum"].default,
        "eps": theirs["batch_norm_eps"].default,
        "warmup_steps": theirs["renorm_warmup_steps"].default,
    }
    off = actor.renorm({"batch_norm": False})
    assert off is None


def test_names_are_each_algorithms_own():
    assert TD3.policy_aliases is not algorithm("DDPG").policy_aliases
    assert {"MlpPolicy", "StarMlpPolicy"} <= set(DQN.policy_aliases) & set(SAC.policy_aliases)
    assert "StarCnnPolicy" not in algorithm("CrossQ").policy_aliases
    assert isinstance(
        agent("PPO", env=DummyVecEnv([Sampled])).policy, PPO.policy_aliases["MlpPolicy"]
    )
