"""Faults that raise no error, each made by hand and found by `describe`."""

import copy

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
from starlayers.rl.checks import CHECKS, first_three, is_orthogonal
from starlayers.rl.describe import describe
from tests.rl.agents import CHOICE, ON_POLICY_CLASSES, PLANE
from tests.rl.agents import stock as build


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
    problem(model, "no optimizer has mlp_extractor.policy_net.2.weight, mlp_extractor.policy_net.2")


def test_an_optimizer_over_layers_that_are_gone():
    model = build(sb3.PPO)
    model.policy.mlp_extractor.policy_net[0] = nn.Linear(3, 8)
    added, gone = describe(model).problems
    assert "no optimizer has mlp_extractor.policy_net.0.weight" in added
    assert "policy.optimizer has 2 tensors that are no longer in the policy" in gone
    model.policy.mlp_extractor.policy_net[0].bias = None
    assert "has 2 tensors" in describe(model).problems[1]
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
    assert "no optimizer has critic.qf0.0.features_extractor_gain" in found[0]


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
    problem(model, f"{part} and {part}_target differ", f"{part}.2.weight (", "against", "(8, 8)")


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
    words = ("the value updates of TRPO skip mlp_extractor.stack.weight0", "StarActorCriticPolicy")
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
    problem(model, "ortho_init=True", "re-initialised the branches of features_extractor.star,")
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


@pytest.mark.parametrize("algorithm", ON_POLICY_CLASSES, ids=lambda a: a.__name__)
@pytest.mark.parametrize("norm", [nn.BatchNorm1d, BatchRenorm1d, nn.Dropout])
def test_batch_statistics_on_policy(algorithm, norm):
    kwargs = {"norm": (lambda _: nn.Dropout(0.1)) if norm is nn.Dropout else norm}
    model = build(algorithm, features_extractor_class=Normed, features_extractor_kwargs=kwargs)
    problem(model, f"features_extractor.norm ({norm.__name__})", algorithm.__name__)


class FreeDropout(nn.Module):
    """A layer whose name alone tells of dropout."""

    def forward(self, x):
        return x


def test_a_layer_without_a_rate_drops_nothing():
    kwargs = {"norm": lambda _: FreeDropout()}
    model = build(sb3.PPO, features_extractor_class=Normed, features_extractor_kwargs=kwargs)
    assert describe(model).problems == ()


def test_trpo_with_nothing_to_train():
    model = build(contrib.TRPO)
    model.policy.requires_grad_(False)
    assert describe(model).problems == ()


def test_one_tensor_that_is_gone():
    model = build(sb3.PPO)
    model.policy.value_net.bias = None
    problem(model, "policy.optimizer has a tensor that is no longer in the policy, of shape (1,):")


def test_parameters_that_nobody_has_to_train():
    model = build(sb3.PPO)
    model.policy.value_net.bias = nn.Parameter(torch.zeros(1), requires_grad=False)
    (gone,) = describe(model).problems
    assert "has a tensor" in gone
    # ARS has no optimizer, and targets follow by copies
    assert describe(build(contrib.ARS)).problems == ()


def test_long_lists_are_cut():
    assert first_three(["a"]) == "a"
    assert first_three(["a", "b", "c"]) == "a, b, c"
    assert first_three(["a", "b", "c", "d"]) == "a, b, c and 1 more"
    assert first_three(list("abcdef")) == "a, b, c and 3 more"


@pytest.mark.parametrize("shape", [(8, 8), (3, 8), (8, 3)])
@pytest.mark.parametrize(
    ("gain", "expected"), [(2**0.5, True), (1.0, True), (0.01, True), (0.5, False), (1.1, False)]
)
def test_orthogonal_matrices_are_known_by_the_gains_of_sb3(shape, gain, expected):
    weight = nn.init.orthogonal_(torch.empty(shape), gain)
    assert is_orthogonal(weight) is expected
    assert not is_orthogonal(weight + 0.02 * gain)


def test_a_network_without_its_like_in_the_target():
    model = build(sb3.DQN)
    del model.policy.q_net_target.q_net[2]
    words = "q_net.2.weight (4, 8) against nothing, q_net.2.bias (4,) against nothing"
    assert any(words in sentence for sentence in describe(model).problems)


def test_every_check_is_made():
    names = [check.__name__ for check in CHECKS]
    assert names == [
        "without_optimizer",
        "removed_tensors",
        "stale_references",
        "different_targets",
        "trpo_skips",
        "unsaved_options",
        "reinitialised_stars",
        "train_eval_differences",
        "uncopied_statistics",
    ]
