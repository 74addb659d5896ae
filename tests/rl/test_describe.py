"""describe: the table of a model, and the visible form of each silent failure."""

import copy

import numpy as np
import pytest
import sb3_contrib as contrib
import stable_baselines3 as sb3
import torch
from gymnasium import spaces
from sb3_contrib.common.torch_layers import BatchRenorm1d
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

import starlayers.rl
from starlayers import StarMLP, StarOp
from starlayers.rl.describe import describe
from starlayers.rl.surgery import starify
from tests.rl.agents import BUFFERED, Env

BOX = spaces.Box(-1, 1, (3,), np.float32)
PLANE = spaces.Box(-1, 1, (2,), np.float32)
CHOICE = spaces.Discrete(4)
IMAGE = spaces.Box(0, 255, (3, 36, 36), np.uint8)


def build(algorithm, observation=BOX, action=PLANE, policy="MlpPolicy", **policy_kwargs):
    if algorithm in (sb3.DQN, contrib.QRDQN):
        action = CHOICE
    if algorithm is contrib.MaskablePPO:
        action = CHOICE
    if algorithm is contrib.RecurrentPPO and policy == "MlpPolicy":
        policy = "MlpLstmPolicy"
    kwargs = {"buffer_size": 10} if algorithm in BUFFERED else {}
    kwargs["policy_kwargs"] = {"net_arch": [8], **policy_kwargs}
    return algorithm(policy, Env(observation, action), device="cpu", **kwargs)


ON_POLICY = [sb3.PPO, sb3.A2C, contrib.TRPO, contrib.MaskablePPO, contrib.RecurrentPPO]
ALGORITHMS = [*ON_POLICY, *BUFFERED, contrib.ARS]


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


def problem(model, *parts):
    """The one problem of a model, which names all parts."""
    (sentence,) = describe(model).problems
    for part in parts:
        assert part in sentence
    with pytest.raises(ValueError, match=f"{type(model).__name__}:\n- ") as raised:
        describe(model, strict=True)
    assert sentence in str(raised.value)
    assert f"1 problem\n- {sentence}" in str(describe(model))


def test_a_layer_added_behind_the_optimizer():
    model = build(sb3.PPO)
    model.policy.mlp_extractor.policy_net.append(nn.Linear(8, 8))
    problem(
        model, "no optimizer owns mlp_extractor.policy_net.2.weight, mlp_extractor.policy_net.2"
    )


def test_an_optimizer_over_layers_that_are_gone():
    model = build(sb3.PPO)
    model.policy.mlp_extractor.policy_net[0] = nn.Linear(3, 8)
    added, gone = describe(model).problems
    assert "no optimizer owns mlp_extractor.policy_net.0.weight" in added
    assert "policy.optimizer owns 2 tensors" in gone
    assert "(8, 3), (8,)" in gone


def test_parameters_that_sac_leaves_out_by_name():
    """A shared extractor is the actor's; the critic's optimizer skips all that has its name."""

    class Critic(nn.Linear):
        def __init__(self):
            super().__init__(5, 8)
            self.features_extractor_gain = nn.Parameter(torch.ones(8))

        def forward(self, x):
            return super().forward(x) * self.features_extractor_gain

    model = build(sb3.SAC, share_features_extractor=True)
    for critic in (model.critic, model.critic_target):
        critic.qf0[0] = Critic()
    named = model.critic.named_parameters()
    kept = [p for name, p in named if "features_extractor" not in name]
    model.critic.optimizer = torch.optim.Adam(kept)
    found = describe(model).problems
    assert "no optimizer owns critic.qf0.0.features_extractor_gain" in found[0]


@pytest.mark.parametrize(
    ("algorithm", "name"),
    [(sb3.SAC, "critic"), (sb3.TD3, "actor_target"), (sb3.DQN, "q_net"), (contrib.TQC, "actor")],
)
def test_an_alias_left_behind(algorithm, name):
    model = build(algorithm)
    setattr(model, name, copy.deepcopy(getattr(model.policy, name)))
    problem(model, f"model.{name} is no longer policy.{name}")
    model._create_aliases()
    assert describe(model).problems == ()


class Normed(BaseFeaturesExtractor):
    """Flat features behind a norm of the user's."""

    def __init__(self, observation_space, norm=nn.BatchNorm1d):
        super().__init__(observation_space, 3)
        self.flatten, self.norm = nn.Flatten(), norm(3)

    def forward(self, observations):
        return self.norm(self.flatten(observations))


def normed(algorithm, norm):
    kwargs = {"features_extractor_class": Normed, "features_extractor_kwargs": {"norm": norm}}
    return build(algorithm, **kwargs)


def test_statistics_left_behind():
    model = normed(sb3.SAC, nn.BatchNorm1d)
    assert describe(model).problems == ()
    norm = model.policy.critic.features_extractor.norm
    norm.running_mean = norm.running_mean.clone()
    problem(model, "model.batch_norm_stats holds statistics that are no longer in the policy")


@pytest.mark.parametrize("algorithm", [sb3.DQN, contrib.QRDQN], ids=lambda a: a.__name__)
def test_a_target_with_other_layers(algorithm):
    model = build(algorithm)
    part = "q_net" if algorithm is sb3.DQN else "quantile_net"
    net = getattr(getattr(model.policy, part), part)
    model.policy.optimizer.add_param_group({"params": (added := nn.Linear(8, 8)).parameters()})
    net.insert(1, added)
    problem(model, f"{part} and {part}_target differ", f"{part}.2.weight (", "beside", "(8, 8)")


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.value = nn.Linear(3, 8), nn.Linear(3, 8)

    def forward(self, x):
        return self.gate(x).sigmoid() * self.value(x)


class GatedExtractor(BaseFeaturesExtractor):
    def __init__(self, observation_space):
        super().__init__(observation_space, 8)
        self.net = Gated()

    def forward(self, observations):
        return self.net(observations)


def test_trpo_and_tensors_that_actor_and_critic_share():
    words = ("the value updates of TRPO spare mlp_extractor.stack.weight0", "StarActorCriticPolicy")
    problem(build(contrib.TRPO, policy=starlayers.rl.StarPPOPolicy), *words)


@pytest.mark.parametrize("action", [PLANE, CHOICE, spaces.MultiBinary(3)])
def test_trpo_and_parameters_called_value(action):
    options = {"features_extractor_class": GatedExtractor}
    model = build(contrib.TRPO, action=action, **options)
    name = "features_extractor.net.value"
    problem(model, "the policy update of TRPO skips", f"{name}.weight, {name}.bias: ", "'value'")
    assert describe(build(sb3.PPO, action=action, **options)).problems == ()


def test_policy_load_forgets_what_is_not_shared(tmp_path):
    model = build(sb3.PPO, share_features_extractor=False)
    problem(model, "share_features_extractor=False", "ActorCriticPolicy comes back with True")
    model.policy.save(tmp_path / "policy.pt")
    loaded = type(model.policy).load(tmp_path / "policy.pt", device="cpu")
    assert loaded.share_features_extractor is True
    star = build(sb3.PPO, policy="StarMlpPolicy", share_features_extractor=False)
    assert describe(star).problems == ()
    problem(build(sb3.SAC, share_features_extractor=True), "SACPolicy comes back with False")


class StarFeatures(BaseFeaturesExtractor):
    """A star that begins as a plain layer, made without the library's extractors."""

    def __init__(self, observation_space, layer=StarOp, offset=1.0):
        super().__init__(observation_space, 8)
        self.star = layer(3, 8, offset=offset)
        self.out = nn.Linear(3, 8) if layer is StarMLP else nn.Identity()
        nn.init.zeros_(self.star.f2.weight)

    def forward(self, observations):
        return self.out(self.star(observations))


@pytest.mark.parametrize("algorithm", [sb3.PPO, contrib.MaskablePPO], ids=lambda a: a.__name__)
@pytest.mark.parametrize("layer", [StarOp, StarMLP])
def test_ortho_init_overwrites_stars(algorithm, layer):
    options = {"features_extractor_class": StarFeatures}
    given = {"features_extractor_kwargs": {"layer": layer}}
    model = build(algorithm, **options, **given)
    assert model.policy.features_extractor.star.f2.weight.any()
    problem(model, "ortho_init=True", "features_extractor.star anew")
    assert describe(build(algorithm, **options, **given, ortho_init=False)).problems == ()
    given["features_extractor_kwargs"] = {"layer": layer, "offset": 0.0}
    assert describe(build(algorithm, **options, **given)).problems == ()


def test_crossq_with_another_batch_norm():
    assert describe(normed(contrib.CrossQ, nn.LayerNorm)).problems == ()
    assert describe(normed(contrib.CrossQ, BatchRenorm1d)).problems == ()
    found = describe(normed(contrib.CrossQ, nn.BatchNorm1d)).problems
    assert len(found) == 2
    for part, sentence in zip(("actor", "critic"), found):
        assert f"{part}.features_extractor.norm (BatchNorm1d) always uses" in sentence


@pytest.mark.parametrize("algorithm", [sb3.SAC, sb3.TD3, sb3.DQN], ids=lambda a: a.__name__)
def test_targets_without_the_statistics(algorithm):
    assert describe(normed(algorithm, nn.BatchNorm1d)).problems == ()
    problem(normed(algorithm, BatchRenorm1d), "the target never gets", "norm.ra_mean", "'running_'")


@pytest.mark.parametrize("algorithm", ON_POLICY, ids=lambda a: a.__name__)
@pytest.mark.parametrize("norm", [nn.BatchNorm1d, BatchRenorm1d, nn.Dropout])
def test_batch_statistics_on_policy(algorithm, norm):
    kwargs = {"norm": (lambda _: nn.Dropout(0.1)) if norm is nn.Dropout else norm}
    model = build(algorithm, features_extractor_class=Normed, features_extractor_kwargs=kwargs)
    problem(model, f"features_extractor.norm ({norm.__name__})", algorithm.__name__)


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


def test_trpo_with_nothing_to_train():
    model = build(contrib.TRPO)
    model.policy.requires_grad_(False)
    assert describe(model).problems == ()
