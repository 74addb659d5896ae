"""export_onnx: the file decides as predict does, for every algorithm and space."""

import copy
import sys

import numpy as np
import onnxruntime
import pytest
import sb3_contrib as contrib
import stable_baselines3 as sb3
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch import nn

import starlayers.rl  # noqa: F401  (registers the star policies)
from starlayers import StarMLP
from starlayers.rl import parity
from starlayers.rl.export import export_onnx
from starlayers.rl.surgery import starify
from tests.rl.agents import BUFFERED, Env

BOX = spaces.Box(-2, 3, (3,), np.float32)
WIDE = spaces.Box(-np.inf, np.inf, (2, 3), np.float32)
DOUBLE = spaces.Box(-1, 2, (2, 2), np.float64)
BYTES = spaces.Box(0, 255, (3,), np.uint8)
CHOICE, CHOICES, SWITCHES = spaces.Discrete(4), spaces.MultiDiscrete([3, 4]), spaces.MultiBinary(3)
IMAGE = spaces.Box(0, 255, (36, 40, 3), np.uint8)
DICT = spaces.Dict(vector=BOX, image=IMAGE, choice=CHOICE, speed=DOUBLE)
SMALL = {"net_arch": [8]}


def build(algorithm, observation, action, policy="MlpPolicy", norm=False, **kwargs):
    """A small model that looks trained: no weight and no statistic is at its start."""
    torch.manual_seed(0)
    env = DummyVecEnv([lambda: Env(copy.deepcopy(observation), action)])
    if norm:
        keys = ["vector", "speed"] if isinstance(observation, spaces.Dict) else None
        env = VecNormalize(env, norm_obs_keys=keys, clip_obs=2.5)
        rng = np.random.default_rng(0)
        for rms in env.obs_rms.values() if keys else [env.obs_rms]:
            rms.mean = rng.normal(size=rms.mean.shape) * 100
            rms.var = rng.uniform(0.1, 9, size=rms.var.shape)
    if algorithm in BUFFERED:
        kwargs["buffer_size"] = 10
    kwargs["policy_kwargs"] = {**SMALL, **kwargs.pop("policy_kwargs", {})}
    if policy == "LinearPolicy":
        kwargs["policy_kwargs"] = {}
    model = algorithm(policy, env, device="cpu", **kwargs)
    with torch.no_grad():
        for p in model.policy.parameters():
            fan_in = p[0].numel() if p.ndim > 1 else 4
            p.add_(torch.randn_like(p) * 0.5 / fan_in**0.5)
        for name, buffer in model.policy.named_buffers():
            if "ra_" in name:
                buffer.add_(torch.rand_like(buffer))
    return model


def check(model, path, n=5):
    """The largest difference of the file and predict, on observations of our own."""
    stats, space = model.get_vec_normalize_env(), model.observation_space
    space.seed(1)
    samples = [space.sample() for _ in range(n)]
    stack = {k: np.stack([s[k] for s in samples]) for k in space} if space.shape is None else None
    obs = stack or np.stack([np.asarray(s) for s in samples])
    if stats is not None:  # samples of the space alone are all beyond the clip
        for rms, x in _normalised(stats, obs):
            x[1:] = rms.mean + np.sqrt(rms.var) * np.random.default_rng(2).normal(size=x[1:].shape)
    normalised = obs if stats is None else stats.normalize_obs(obs)
    want, _ = model.predict(normalised, deterministic=True)
    session = onnxruntime.InferenceSession(path)
    feed = obs if isinstance(obs, dict) else {"obs": obs}
    (got,) = session.run(["action"], feed)
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    return np.abs(got - want).max()


def _normalised(stats, obs):
    if not isinstance(obs, dict):
        return [(stats.obs_rms, obs)]
    return [(stats.obs_rms[key], obs[key]) for key in stats.norm_obs_keys]


SDE = {"use_sde": True}
CASES = {
    "ppo": (sb3.PPO, BOX, CHOICE),
    "ppo-wide-box": (sb3.PPO, WIDE, BOX),
    "ppo-double": (sb3.PPO, DOUBLE, DOUBLE),
    "ppo-bytes": (sb3.PPO, BYTES, BOX),
    "ppo-discrete-multidiscrete": (sb3.PPO, CHOICE, CHOICES),
    "ppo-multidiscrete-multibinary": (sb3.PPO, CHOICES, SWITCHES),
    "ppo-multibinary": (sb3.PPO, SWITCHES, CHOICE),
    "ppo-image": (sb3.PPO, IMAGE, CHOICE, "CnnPolicy"),
    "ppo-dict": (sb3.PPO, DICT, BOX, "MultiInputPolicy"),
    "ppo-unshared": (sb3.PPO, BOX, BOX, "MlpPolicy", {"share_features_extractor": False}),
    "a2c-sde": (sb3.A2C, BOX, BOX, "MlpPolicy", {}, SDE),
    "ppo-squashed": (sb3.PPO, BOX, BOX, "MlpPolicy", {"squash_output": True}, SDE),
    "trpo": (contrib.TRPO, BOX, BOX),
    "ars": (contrib.ARS, BOX, BOX),
    "ars-discrete": (contrib.ARS, BOX, CHOICE),
    "ars-linear": (contrib.ARS, BOX, BOX, "LinearPolicy"),
    "sac": (sb3.SAC, BOX, BOX),
    "sac-dict": (sb3.SAC, DICT, DOUBLE, "MultiInputPolicy"),
    "sac-sde": (sb3.SAC, BOX, BOX, "MlpPolicy", {}, SDE),
    "td3": (sb3.TD3, BOX, BOX),
    "ddpg": (sb3.DDPG, WIDE, BOX),
    "tqc": (contrib.TQC, BOX, BOX),
    "crossq": (contrib.CrossQ, BOX, BOX),
    "dqn": (sb3.DQN, BOX, CHOICE),
    "qrdqn": (contrib.QRDQN, BOX, CHOICE),
    "star-ppo": (sb3.PPO, BOX, CHOICE, "StarMlpPolicy", {"net_arch": [8, 8]}),
    "star-ppo-image": (sb3.PPO, IMAGE, CHOICE, "StarCnnPolicy"),
    "star-a2c-dict": (sb3.A2C, DICT, BOX, "StarMultiInputPolicy"),
    "star-trpo": (contrib.TRPO, BOX, BOX, "StarMlpPolicy", {"net": "star_residual"}),
    "star-sac": (sb3.SAC, BOX, BOX, "StarMlpPolicy", {"net": {"pi": "star", "qf": "product"}}),
    "star-td3": (sb3.TD3, BOX, BOX, "StarMlpPolicy", {"norm": "layer"}),
    "star-tqc": (contrib.TQC, BOX, BOX, "StarMlpPolicy"),
    "star-crossq": (contrib.CrossQ, BOX, BOX, "StarMlpPolicy"),
    "star-dqn": (sb3.DQN, BOX, CHOICE, "StarMlpPolicy", {"net": "simba"}),
    "star-qrdqn": (contrib.QRDQN, BOX, CHOICE, "StarMlpPolicy"),
    "star-ars": (contrib.ARS, BOX, BOX, "StarMlpPolicy"),
}
NORMED = (
    "ppo-wide-box",
    "ppo-double",
    "ppo-dict",
    "sac",
    "sac-dict",
    "td3",
    "dqn",
    "star-a2c-dict",
)


@pytest.mark.parametrize(
    ("name", "norm"), [(n, False) for n in CASES] + [(n, True) for n in NORMED]
)
def test_the_file_decides_as_predict_does(tmp_path, name, norm):
    algorithm, observation, action, *rest = CASES[name]
    policy, policy_kwargs, kwargs = [*rest, *("MlpPolicy", {}, {})[len(rest) :]]
    model = build(
        algorithm, observation, action, policy, norm, policy_kwargs=policy_kwargs, **kwargs
    )
    path = export_onnx(model, tmp_path / "model.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    assert check(model, path) <= 1e-5
    assert check(model, path, n=1) <= 1e-5


def test_inputs_have_the_names_and_types_of_the_space(tmp_path):
    model = build(sb3.PPO, DICT, BOX, "MultiInputPolicy")
    session = onnxruntime.InferenceSession(export_onnx(model, tmp_path / "m.onnx"))
    found = {i.name: (i.type, i.shape[1:]) for i in session.get_inputs()}
    assert found == {
        "vector": ("tensor(float)", [3]),
        "image": ("tensor(uint8)", [3, 36, 40]),
        "choice": ("tensor(int64)", []),
        "speed": ("tensor(double)", [2, 2]),
    }
    assert [o.name for o in session.get_outputs()] == ["action"]


@pytest.mark.parametrize(
    ("action", "sizes"), [(CHOICE, [4]), (CHOICES, [3, 4]), (SWITCHES, [2, 2, 2])]
)
@pytest.mark.parametrize("policy", ["MlpPolicy", "StarMlpPolicy"])
def test_masks_are_an_input(tmp_path, action, sizes, policy):
    model = build(contrib.MaskablePPO, BOX, action, policy)
    session = onnxruntime.InferenceSession(export_onnx(model, tmp_path / "m.onnx"))
    obs = np.stack([BOX.sample() for _ in range(64)])
    free = np.ones((64, sum(sizes)), dtype=bool)
    (unmasked,) = session.run(None, {"obs": obs, "action_masks": free})
    taken = unmasked.reshape(64, -1) + np.cumsum([0, *sizes[:-1]])
    masks = free.copy()
    np.put_along_axis(masks, taken, False, 1)
    (got,) = session.run(None, {"obs": obs, "action_masks": masks})
    want, _ = model.predict(obs, deterministic=True, action_masks=masks)
    np.testing.assert_array_equal(got, want)
    assert (got != unmasked).all()


@pytest.mark.parametrize("policy", ["MlpLstmPolicy", "StarMlpPolicy"])
@pytest.mark.parametrize("layers", [1, 2])
def test_the_states_of_an_lstm_go_in_and_out(tmp_path, policy, layers):
    kwargs = {"lstm_hidden_size": 8, "n_lstm_layers": layers}
    model = build(contrib.RecurrentPPO, BOX, BOX, policy, policy_kwargs=kwargs, norm=True)
    session = onnxruntime.InferenceSession(export_onnx(model, tmp_path / "m.onnx"))
    hidden = cell = np.zeros((layers, 3, 8), dtype=np.float32)
    state, start = None, np.ones(3, dtype=bool)
    stats = model.get_vec_normalize_env()
    rng = np.random.default_rng(0)
    for step in range(4):
        obs = (stats.obs_rms.mean + rng.normal(size=(3, 3))).astype(np.float32)
        feed = {"obs": obs, "hidden": hidden, "cell": cell, "episode_start": start.astype("f4")}
        action, hidden, cell = session.run(["action", "next_hidden", "next_cell"], feed)
        want, state = model.predict(stats.normalize_obs(obs), state, start, deterministic=True)
        np.testing.assert_allclose(action, want, atol=1e-5)
        np.testing.assert_allclose(hidden, state[0], atol=1e-5)
        np.testing.assert_allclose(cell, state[1], atol=1e-5)
        start = np.array([False, step == 1, False])


def test_given_statistics_replace_those_of_the_environment(tmp_path):
    model = build(sb3.PPO, WIDE, BOX)
    stats = build(sb3.PPO, WIDE, BOX, norm=True).get_vec_normalize_env()
    path = export_onnx(model, tmp_path / "m.onnx", vec_normalize=stats)
    obs = (stats.obs_rms.mean + np.ones((4, 2, 3))).astype(np.float32)
    (got,) = onnxruntime.InferenceSession(path).run(None, {"obs": obs})
    want, _ = model.predict(stats.normalize_obs(obs), deterministic=True)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert np.abs(got - model.predict(obs, deterministic=True)[0]).max() > 1e-2


def test_a_large_mean_keeps_the_digits_of_the_spread(tmp_path):
    model = build(sb3.PPO, WIDE, BOX, norm=True)
    rms = model.get_vec_normalize_env().obs_rms
    rms.mean, rms.var = np.full((2, 3), 1e6 + 0.3), np.full((2, 3), 0.04)
    assert check(model, export_onnx(model, tmp_path / "m.onnx")) <= 1e-5


def test_statistics_that_are_switched_off_are_left_out(tmp_path):
    model = build(sb3.PPO, BOX, BOX, norm=True)
    model.get_vec_normalize_env().norm_obs = False
    assert check(model, export_onnx(model, tmp_path / "m.onnx")) <= 1e-5


@pytest.mark.parametrize(
    ("algorithm", "action", "product"),
    [(sb3.PPO, CHOICE, 0), (sb3.SAC, BOX, 4), (contrib.QRDQN, CHOICE, 0)],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_starified_policies(tmp_path, algorithm, action, product):
    options = {"net_arch": [8, 8]}
    model = starify(build(algorithm, BOX, action, policy_kwargs=options), product=product)
    with torch.no_grad():
        for p in model.policy.parameters():  # the gates begin at zero
            p.add_(torch.randn_like(p) * 0.2)
    assert check(model, export_onnx(model, tmp_path / "m.onnx")) <= 1e-5


def test_star_layers_wide_enough_for_kernels_stay_portable(tmp_path):
    model = build(sb3.PPO, BOX, BOX, policy_kwargs={"net_arch": {"pi": [64], "vf": [8]}})
    model.policy.mlp_extractor.policy_net.append(StarMLP(64, 4096, act="relu"))
    assert check(model, export_onnx(model, tmp_path / "m.onnx")) <= 1e-5


def test_the_model_is_as_it_was(tmp_path):
    model = build(contrib.CrossQ, BOX, BOX)
    model.policy.set_training_mode(True)
    before = copy.deepcopy(model.policy.state_dict())
    modes = [m.training for m in model.policy.modules()]
    state, drawn, space = torch.get_rng_state(), np.random.get_state()[1], model.observation_space
    position = space.np_random.bit_generator.state
    export_onnx(model, tmp_path / "m.onnx")
    assert modes == [m.training for m in model.policy.modules()]
    assert all(torch.equal(v, before[k]) for k, v in model.policy.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert (drawn == np.random.get_state()[1]).all()
    assert position == space.np_random.bit_generator.state


class Contrary(ActorCriticPolicy):
    """A policy that decides otherwise than its networks say."""

    def get_distribution(self, obs):
        distribution = super().get_distribution(obs)
        return self.action_dist.proba_distribution(-distribution.distribution.logits)


class Shifted(ActorCriticPolicy):
    def get_distribution(self, obs):
        mean = super().get_distribution(obs).distribution.mean
        return self.action_dist.proba_distribution(mean + 1e-3, self.log_std)


@pytest.mark.parametrize(("policy", "action"), [(Contrary, CHOICE), (Shifted, BOX)])
def test_a_mismatch_raises_and_leaves_no_file(tmp_path, policy, action):
    model = build(sb3.PPO, BOX, action, policy)
    (tmp_path / "m.onnx").write_bytes(b"the file before")
    with pytest.raises(RuntimeError, match=rf"differ by .* no file .*{policy.__name__}"):
        export_onnx(model, tmp_path / "m.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    assert (tmp_path / "m.onnx").read_bytes() == b"the file before"


def test_equal_scores_are_no_mismatch():
    scores = np.array([[1.0, 1.0 + 1e-7, 0.0], [2.0, 0.0, 0.0]], dtype=np.float32)
    want, got = np.array([0, 0]), np.array([1, 0])
    assert parity._difference(want, got, scores, 0.0, [3]) < 1e-6
    assert parity._difference(want, np.array([2, 0]), scores, 0.0, [3]) == 0.5
    assert parity._difference(want, got.astype(np.int32), scores, 0.0, [3]) == np.inf
    values = np.float32([[0.5], [4.0]])
    assert parity._difference(values, values + 4e-5, values, 0.0, []) == pytest.approx(1e-5, rel=0.01)


def test_what_cannot_be_exported_says_why(tmp_path):
    path = tmp_path / "m.onnx"
    model = build(sb3.PPO, BOX, BOX)
    with pytest.raises(TypeError, match=r"such as PPO, got Linear"):
        export_onnx(nn.Linear(2, 2), path)
    with pytest.raises(TypeError, match=r"must be a VecNormalize, got str"):
        export_onnx(model, path, vec_normalize="stats.pkl")
    other = build(sb3.PPO, WIDE, BOX, norm=True).get_vec_normalize_env()
    with pytest.raises(
        ValueError, match=r"shape \(2, 3\) for 'obs', but the model observes \(3,\)"
    ):
        export_onnx(model, path, vec_normalize=other)
    named = spaces.Dict(action=BOX, vector=BOX)
    with pytest.raises(ValueError, match=r"rename the observation \['action'\]"):
        export_onnx(build(sb3.PPO, named, BOX, "MultiInputPolicy"), path)
    for missing in ("onnx", "onnxruntime", "onnxscript"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, missing, None)
            with pytest.raises(
                ImportError, match=rf"{missing}: pip install 'starlayers\[deploy\]'"
            ):
                export_onnx(model, path)
    assert not list(tmp_path.iterdir())
