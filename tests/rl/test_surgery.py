"""Swapping star gates into agents of stable-baselines3 and sb3-contrib."""

import copy
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
import stable_baselines3 as sb3
import torch
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

import starlayers
from starlayers.rl.surgery import GROUP, ProductTerm, revert, starified, starify
from starlayers.surgery import gate_parameters, gate_sizes, report
from starlayers.surgery.gates import gate_of
from starlayers.surgery.install import installed
from tests.rl.agents import CONTINUOUS, algorithm, but_for

ON_POLICY = ("PPO", "A2C", "TRPO", "MaskablePPO", "RecurrentPPO")
DISCRETE = ("DQN", "QRDQN")
ALL = (*ON_POLICY, *CONTINUOUS, *DISCRETE, "ARS")
SITES = dict.fromkeys(ALL, 4) | {"SAC": 10, "TD3": 12, "DDPG": 8, "TQC": 10, "CrossQ": 5, "ARS": 2}


def make(name, policy=None, steps=64, **policy_kwargs):
    """A small agent that has trained for a moment."""
    options = {"learning_rate": 0.01} if name not in ("ARS", "TRPO") else {}
    if name == "ARS":
        options = {"n_delta": 2}
    elif name in ON_POLICY:
        options |= {"n_steps": 32} | ({"n_epochs": 2} if "PPO" in name else {})
    else:
        options |= {"learning_starts": 20, "buffer_size": 200, "batch_size": 16}
    if name in DISCRETE:
        options |= {"target_update_interval": 20, "tau": 0.5}
    if policy is None:
        policy_kwargs = {"net_arch": [16, 16], **policy_kwargs}
        policy = "MlpLstmPolicy" if name == "RecurrentPPO" else "MlpPolicy"
        if name == "RecurrentPPO":
            policy_kwargs["lstm_hidden_size"] = 8
    env = "Pendulum-v1" if name in CONTINUOUS else "CartPole-v1"
    warnings.simplefilter("ignore", UserWarning)
    kwargs = {"policy_kwargs": policy_kwargs, "seed": 0, "device": "cpu"}
    return learn(algorithm(name)(policy, env, **kwargs, **options), steps)


def learn(model, steps):
    return model.learn(steps, **{"use_masking": False} if "Maskable" in repr(model) else {})


def outputs(model):
    """Actions, values, and log-probabilities of actions, of online and target networks."""
    policy = model.policy
    space = policy.observation_space
    rng = np.random.default_rng(0)
    obs = rng.normal(size=(32, *space.shape)).astype(np.float32)
    x, found = torch.as_tensor(obs), [torch.as_tensor(model.predict(obs, deterministic=True)[0])]
    torch.manual_seed(0)
    with torch.no_grad():
        actions = torch.as_tensor(np.stack([policy.action_space.sample() for _ in obs]))
        for name in ("q_net", "q_net_target", "quantile_net", "quantile_net_target", "action_net"):
            if hasattr(policy, name) and not hasattr(policy, "value_net"):
                found.append(getattr(policy, name)(x))
        for name in ("critic", "critic_target"):
            if hasattr(policy, "actor") and hasattr(policy, name):
                found += list(getattr(policy, name)(x, found[0].reshape(32, -1)))
        if hasattr(policy, "actor_target"):
            found += [policy.actor(x), policy.actor_target(x)]
        elif hasattr(policy, "actor"):
            found += policy.actor.action_log_prob(x)
        elif hasattr(policy, "lstm_actor"):
            state = (torch.zeros(1, 1, 8), torch.zeros(1, 1, 8))
            actions = torch.zeros(32)
            found += policy.evaluate_actions(x, actions, RNNStates(state, state), torch.zeros(32))
        elif hasattr(policy, "value_net"):
            found += policy.evaluate_actions(x, torch.zeros(32))
    return found


def apart(a, b):
    return max(float((x.double() - y.double()).abs().max()) for x, y in zip(a, b, strict=True))


def optimizers(model):
    found = [vars(module).get("optimizer") for module in model.policy.modules()]
    return [optimizer for optimizer in found if optimizer is not None]


def continued(model, buffer):
    """Train on, from the same seed, environment and replay buffer."""
    if buffer is not None:
        model.replay_buffer = copy.deepcopy(buffer)
    model.set_random_seed(3)
    return learn(model, 64)


def same(a, b):
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("name", ALL)
def test_the_swap_changes_nothing_and_keeps_the_moments(name):
    model = make(name)
    before, steps = outputs(model), model.num_timesteps
    own = dict(model.policy.named_parameters())
    state = {p: dict(s) for o in optimizers(model) for p, s in o.state.items()}
    assert starify(model) is model
    assert apart(before, outputs(model)) == 0.0
    assert len(report(model.policy).replaced) == SITES[name]
    ids = {id(p) for p in model.policy.parameters()}
    assert all(id(p) in ids for p in own.values())
    held = [p for o in optimizers(model) for g in o.param_groups for p in g["params"]]
    if name == "ARS":
        assert len(model.weights) == model.n_params == len(model.policy.parameters_to_vector())
    else:
        assert state
        for optimizer in optimizers(model):
            old, new = optimizer.param_groups
            assert new["name"] == GROUP
            assert {k: v for k, v in new.items() if k not in ("params", "name")} == {
                k: v for k, v in old.items() if k != "params"
            }
            for p, kept in optimizer.state.items():
                assert all(value is kept[key] for key, value in state[p].items())
    targets = [m for n, m in model.policy.named_children() if n.endswith("_target")]
    of_targets = {id(p) for target in targets for p in target.parameters()}
    assert len({id(p) for p in held}) == len(held)
    if name != "ARS":
        gates = [p for p in gate_parameters(model.policy) if id(p) not in of_targets]
        assert {id(p) for p in gates} <= {id(p) for p in held}
        assert not of_targets & {id(p) for p in held}
    for alias in ("actor", "critic", "actor_target", "critic_target", "q_net", "quantile_net"):
        if hasattr(model, alias):
            assert getattr(model, alias) is getattr(model.policy, alias)
    assert model.num_timesteps == steps
    parameters = list(model.policy.parameters())
    assert list(starify(model).policy.parameters()) == parameters


@pytest.mark.parametrize("name", but_for(ALL, ("PPO", "TD3", "ARS")))
def test_save_load_and_training_goes_on(name, tmp_path):
    model = starify(make(name), gate="low_rank=2")
    continued(model, None)
    sizes = gate_sizes(model.policy)
    still = {path for path, size in sizes.items() if size == 0}
    # the first update of a low-rank gate moves `up`; a target network follows its online network
    assert not still, still
    model.save(tmp_path / "model.zip")
    loaded = algorithm(name).load(tmp_path / "model.zip", env=model.env.envs[0], device="cpu")
    assert apart(outputs(model), outputs(loaded)) == 0.0
    for a, b in zip(optimizers(model), optimizers(loaded), strict=True):
        a, b = a.state_dict(), b.state_dict()
        assert a["param_groups"] == b["param_groups"]
        assert all(same(a["state"][i], b["state"][i]) for i in a["state"])
    model.policy.save(tmp_path / "policy.pth")
    base = type(model.policy).__bases__[1]
    again = starified(base).load(tmp_path / "policy.pth", device="cpu")
    assert same(again.state_dict(), model.policy.state_dict())
    for copied in (copy.deepcopy(model.policy), pickle.loads(pickle.dumps(model.policy))):
        assert same(copied.state_dict(), model.policy.state_dict())
    buffer = copy.deepcopy(getattr(model, "replay_buffer", None))
    continued(model, buffer), continued(loaded, buffer)
    assert same(model.policy.state_dict(), loaded.policy.state_dict())
    assert starify(loaded) is loaded


@pytest.mark.slow
def test_a_fresh_process_loads_it(tmp_path):
    model = starify(make("SAC"), product=4)
    model.save(tmp_path / "model.zip")
    code = (
        "import sys, numpy as np, starlayers, stable_baselines3\n"
        f"model = stable_baselines3.SAC.load({str(tmp_path / 'model.zip')!r}, device='cpu')\n"
        "action = model.predict(np.ones(3), deterministic=True)[0].tolist()\n"
        "print(type(model.policy).__name__, action)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    action = model.predict(np.ones(3), deterministic=True)[0].tolist()
    assert done.stdout.split(maxsplit=1) == ["StarifiedSACPolicy", f"{action}\n"], done.stderr


class Extractor(BaseFeaturesExtractor):
    """Two linear layers with running statistics."""

    def __init__(self, space):
        super().__init__(space, 8)
        self.net = nn.Sequential(
            nn.Linear(space.shape[0], 8), nn.BatchNorm1d(8), nn.Linear(8, 16), nn.ReLU(),
            nn.Linear(16, 8), nn.ReLU(),
        )  # fmt: skip

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("PPO", False),
        ("SAC", True),
        pytest.param("PPO", True, marks=pytest.mark.slow),
        pytest.param("RecurrentPPO", True, marks=pytest.mark.slow),
        pytest.param("MaskablePPO", False, marks=pytest.mark.slow),
        pytest.param("SAC", False, marks=pytest.mark.slow),
        pytest.param("TD3", True, marks=pytest.mark.slow),
        pytest.param("TD3", False, marks=pytest.mark.slow),
        pytest.param("TQC", True, marks=pytest.mark.slow),
    ],
)
def test_features_extractors_shared_or_not(name, share, tmp_path):
    model = make(name, share_features_extractor=share, features_extractor_class=Extractor)
    before = outputs(model)
    starify(model)
    assert apart(before, outputs(model)) == 0.0
    continued(model, None)
    assert all(gate_sizes(model.policy).values())
    if share and name in ("SAC", "TQC"):
        actor, critic = (model.policy.actor, model.policy.critic)
        gates = {id(p) for p in gate_parameters(actor.features_extractor)}
        groups = [{id(p) for p in m.optimizer.param_groups[1]["params"]} for m in (actor, critic)]
        assert gates <= groups[0]
        assert not gates & groups[1]
    for stats in ("batch_norm_stats_target", "actor_batch_norm_stats_target"):
        if hasattr(model, stats):
            now = {t.data_ptr() for t in model.policy.state_dict().values()}
            held = [t.data_ptr() for t in getattr(model, stats)]
            assert held
            assert now.issuperset(held)
    model.policy.save(tmp_path / "policy.pth")
    model.policy = type(model.policy).load(tmp_path / "policy.pth", device="cpu")
    assert model.policy.share_features_extractor is share
    model.save(tmp_path / "model.zip")
    loaded = algorithm(name).load(tmp_path / "model.zip", device="cpu")
    assert apart(outputs(loaded), outputs(model)) == 0.0


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("SAC", None),
        *(pytest.param(n, None, marks=pytest.mark.slow) for n in CONTINUOUS if n != "SAC"),
        *(pytest.param(n, "StarMlpPolicy", marks=pytest.mark.slow) for n in ("SAC", "TD3", "TQC")),
    ],
)
def test_product_term(name, policy, tmp_path):
    model = make(name, policy) if policy is None else make(name, policy, width=16, depth=2)
    before = outputs(model)
    starify(model, product=5)
    assert apart(before, outputs(model)) == 0.0
    critic = model.policy.critic
    assert critic.q_networks == [m for n, m in critic.named_children() if n.startswith("qf")]
    assert all(type(q) is ProductTerm for q in critic.q_networks)
    assert starify(model, product=9).policy.critic.q_networks[0].state.out_features == 5
    continued(model, None)
    critics = [c for n in ("critic", "critic_target") if (c := getattr(model.policy, n, None))]
    assert all(q.head.weight.any() for c in critics for q in c.q_networks)
    model.save(tmp_path / "model.zip")
    loaded = algorithm(name).load(tmp_path / "model.zip", env=model.env.envs[0], device="cpu")
    assert apart(outputs(model), outputs(loaded)) == 0.0
    model.policy.save(tmp_path / "policy.pt")
    alone = type(model.policy).load(tmp_path / "policy.pt", device="cpu")
    assert same(alone.state_dict(), model.policy.state_dict())
    buffer = copy.deepcopy(model.replay_buffer)
    continued(model, buffer), continued(loaded, buffer)
    assert same(model.policy.state_dict(), loaded.policy.state_dict())
    with pytest.warns(UserWarning, match="product terms of the critics were not zero"):
        revert(model)
    continued(model, None)


def test_gates_first_and_a_product_later(tmp_path):
    model = continued(starify(make("TD3"), include="critic", gate="scale"), None)
    assert {p.split(".")[0] for p in gate_sizes(model.policy)} == {"critic", "critic_target"}
    before = outputs(model)
    starify(model, product=4, gate="low_rank=2")
    assert apart(before, outputs(model)) == 0.0
    assert len(report(model.policy).replaced) == 12
    # what begins with random numbers begins alike in the targets
    actors = [model.policy.actor, model.policy.actor_target]
    new = [[gate_of(star).state_dict() for _, _, star in installed(actor)] for actor in actors]
    assert len(new[0]) == 2
    assert all(map(same, *new))
    for terms in zip(model.policy.critic.q_networks, model.policy.critic_target.q_networks):
        for part in ("state", "action", "head"):
            assert same(*(getattr(term, part).state_dict() for term in terms))
    continued(model, None).save(tmp_path / "model.zip")
    loaded = sb3.TD3.load(tmp_path / "model.zip", env=model.env.envs[0], device="cpu")
    buffer = copy.deepcopy(model.replay_buffer)
    continued(model, buffer), continued(loaded, buffer)
    assert same(model.policy.state_dict(), loaded.policy.state_dict())


@pytest.mark.parametrize("name", but_for(ALL, ("PPO", "SAC", "ARS")))
def test_revert(name):
    model = make(name)
    before, kwargs, kind = outputs(model), model.policy_kwargs, type(model.policy)
    keys = list(model.policy.state_dict())
    revert(starify(model, product=3 if name in CONTINUOUS else 0))
    assert apart(before, outputs(model)) == 0.0
    assert (model.policy_kwargs, model.policy_class) == (kwargs, kind)
    assert type(model.policy) is kind
    assert list(model.policy.state_dict()) == keys
    assert all(len(o.param_groups) == 1 for o in optimizers(model))
    continued(starify(model), None)
    with pytest.warns(UserWarning, match="gates were not zero"):
        revert(model)
    owned = {p for o in optimizers(model) for p in o.param_groups[0]["params"]}
    assert all(p in owned for o in optimizers(model) for p in o.state)
    continued(model, None)
    with pytest.raises(ValueError, match="has changed nothing"):
        revert(model)


def test_learning_rates_reach_the_gates():
    model = sb3.PPO(
        "MlpPolicy", "CartPole-v1", n_steps=64, learning_rate=lambda left: left, device="cpu"
    )
    starify(model).learn(96)
    (rate, of_gates) = (group["lr"] for group in model.policy.optimizer.param_groups)
    assert rate == of_gates < 1


def test_refusals():
    with pytest.raises(TypeError, match=r"Linear; starlayers\.surgery\.starify takes"):
        starify(nn.Linear(1, 1))
    ppo = make("PPO", steps=0)
    with pytest.raises(TypeError, match=r"use starlayers\.rl\.starify\(model\)"):
        starlayers.starify(ppo)
    with pytest.raises(ValueError, match="product=8 needs critics of states and actions"):
        starify(ppo, product=8)
    with pytest.raises(ValueError, match="product must be at least 1, got -2"):
        starify(ppo, product=-2)
    with pytest.raises(TypeError, match=r"starify: product must be an integer, got 1.5"):
        starify(ppo, product=1.5)
    with pytest.raises(ValueError, match="unknown gate 'wide'"):
        starify(ppo, gate="wide")
    with pytest.raises(ValueError, match="include pattern 'encoder' matches none"):
        starify(ppo, include="encoder")
    star = sb3.PPO("StarMlpPolicy", "CartPole-v1", device="cpu")
    with pytest.raises(ValueError, match=r"no plain MLP in this Star\w+Policy: no activation"):
        starify(star)
    ppo.policy = torch.compile(ppo.policy)
    with pytest.raises(ValueError, match="is a OptimizedModule, no policy"):
        starify(ppo)


class GatedExtractor(BaseFeaturesExtractor):
    """A gated MLP, which has its product already."""

    def __init__(self, space):
        super().__init__(space, 4)
        self.gate_proj, self.up_proj = nn.Linear(4, 8), nn.Linear(4, 8)
        self.down_proj, self.act_fn = nn.Linear(8, 4), nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def test_only_plain_mlps_get_gates():
    model = starify(make("PPO", steps=0, features_extractor_class=GatedExtractor))
    owners = {path.split(".")[0] for path in gate_sizes(model.policy)}
    assert owners == {"mlp_extractor"}
    assert not gate_parameters(model.policy.features_extractor)
