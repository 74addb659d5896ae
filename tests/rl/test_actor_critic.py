"""Trunks of policy and value: one stack, one trunk, or two."""

import pytest
import torch

from tests.rl.agents import (
    STEPS,
    agent,
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
