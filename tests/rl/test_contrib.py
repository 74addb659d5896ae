"""Star policies of sb3-contrib: LSTMs, ARS, and the norms of CrossQ."""

import pytest
import torch
from torch import nn

from tests.rl.agents import (
    STEPS,
    agent,
)


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
