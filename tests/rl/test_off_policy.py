"""Heads and critics of the off-policy algorithms."""

import torch
from torch import nn

from tests.rl.agents import (
    STEPS,
    agent,
)


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
