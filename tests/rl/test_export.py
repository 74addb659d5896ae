"""export_onnx: the file acts as predict does; what cannot be exported says why."""

import copy
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import sb3_contrib as contrib
import stable_baselines3 as sb3
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn

from starlayers import StarMLP
from starlayers.rl import export
from starlayers.rl.export import export_onnx
from starlayers.rl.surgery import starify
from tests.rl.exported import BOX, CHOICE, CHOICES, DICT, SWITCHES, WIDE, build, case, observe

needs_onnx = pytest.mark.export
#: a file for every kind of graph: tests/rl/test_onnx.py tries all cases without writing one
FILES = [
    "ppo",
    "ppo-double",
    "ppo-bytes",
    "ppo-discrete-multidiscrete",
    "ppo-multidiscrete-multibinary",
    "ppo-multibinary",
    "ppo-image",
    "ppo-squashed",
    "ars",
    "ars-discrete",
    "sac-sde",
    "tqc",
    "crossq",
    "qrdqn",
    "star-ppo-image",
    "star-trpo",
    "star-sac",
    "star-td3",
    "star-crossq",
    "star-dqn",
    "star-ars",
]
NORMED_FILES = ["ppo-wide-box", "ppo-double", "ppo-dict", "sac-dict", "td3", "star-a2c-dict"]


def difference(model, path, n=5):
    """The largest difference of the file and predict, on observations of our own."""
    inputs, expected = observe(model, n)
    (actions,) = onnxruntime.InferenceSession(path).run(["action"], inputs)
    assert (actions.dtype, actions.shape) == (expected.dtype, expected.shape)
    return np.abs(actions - expected).max()


@pytest.mark.parametrize(
    ("name", "norm"),
    [("star-ppo", False)]
    + [pytest.param(name, False, marks=needs_onnx) for name in FILES]
    + [pytest.param(name, True, marks=needs_onnx) for name in NORMED_FILES],
)
def test_the_file_acts_as_predict_does(tmp_path, name, norm):
    model = case(name, norm)
    path = export_onnx(model, tmp_path / "model.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    assert difference(model, path) <= 1e-5
    assert difference(model, path, n=1) <= 1e-5
    graph = onnx.load(path)
    assert [(entry.domain, entry.version) for entry in graph.opset_import] == [("", 18)]
    batch = graph.graph.input[0].type.tensor_type.shape.dim[0]
    assert batch.dim_param == "batch"


@needs_onnx
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


@needs_onnx
@pytest.mark.parametrize(
    ("action", "sizes", "policy"),
    [
        (CHOICE, [4], "MlpPolicy"),
        (CHOICES, [3, 4], "StarMlpPolicy"),
        (SWITCHES, [2, 2, 2], "MlpPolicy"),
    ],
)
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


@needs_onnx
@pytest.mark.parametrize(("policy", "layers"), [("MlpLstmPolicy", 2), ("StarMlpPolicy", 1)])
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


@needs_onnx
def test_given_statistics_replace_those_of_the_environment(tmp_path):
    model = build(sb3.PPO, WIDE, BOX)
    stats = build(sb3.PPO, WIDE, BOX, norm=True).get_vec_normalize_env()
    path = export_onnx(model, tmp_path / "m.onnx", vec_normalize=stats)
    obs = (stats.obs_rms.mean + np.ones((4, 2, 3))).astype(np.float32)
    (got,) = onnxruntime.InferenceSession(path).run(None, {"obs": obs})
    want, _ = model.predict(stats.normalize_obs(obs), deterministic=True)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert np.abs(got - model.predict(obs, deterministic=True)[0]).max() > 1e-2


@needs_onnx
def test_a_large_mean_keeps_the_digits_of_the_spread(tmp_path):
    model = build(sb3.PPO, WIDE, BOX, norm=True)
    rms = model.get_vec_normalize_env().obs_rms
    rms.mean, rms.var = np.full((2, 3), 1e6 + 0.3), np.full((2, 3), 0.04)
    assert difference(model, export_onnx(model, tmp_path / "m.onnx")) <= 1e-5


@needs_onnx
def test_statistics_that_are_switched_off_are_left_out(tmp_path):
    model = build(sb3.PPO, BOX, BOX, norm=True)
    model.get_vec_normalize_env().norm_obs = False
    assert difference(model, export_onnx(model, tmp_path / "m.onnx")) <= 1e-5


@needs_onnx
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
    assert difference(model, export_onnx(model, tmp_path / "m.onnx")) <= 1e-5


@needs_onnx
def test_star_layers_wide_enough_for_kernels_stay_portable(tmp_path):
    model = build(sb3.PPO, BOX, BOX, policy_kwargs={"net_arch": {"pi": [64], "vf": [8]}})
    model.policy.mlp_extractor.policy_net.append(StarMLP(64, 4096, act="relu"))
    assert difference(model, export_onnx(model, tmp_path / "m.onnx")) <= 1e-5


@needs_onnx
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
    """A policy that acts otherwise than its networks say."""

    def get_distribution(self, obs):
        distribution = super().get_distribution(obs)
        return self.action_dist.proba_distribution(-distribution.distribution.logits)


class Shifted(ActorCriticPolicy):
    def get_distribution(self, obs):
        mean = super().get_distribution(obs).distribution.mean
        return self.action_dist.proba_distribution(mean + 1e-3, self.log_std)


@needs_onnx
@pytest.mark.parametrize(("policy", "action"), [(Contrary, CHOICE), (Shifted, BOX)])
def test_a_mismatch_raises_and_leaves_no_file(tmp_path, policy, action):
    model = build(sb3.PPO, BOX, action, policy)
    (tmp_path / "m.onnx").write_bytes(b"the file before")
    with pytest.raises(RuntimeError, match=rf"differ by .* no file .*{policy.__name__}"):
        export_onnx(model, tmp_path / "m.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    assert (tmp_path / "m.onnx").read_bytes() == b"the file before"


def test_a_mismatch_leaves_the_old_file_and_the_modes(tmp_path, monkeypatch):
    model = build(sb3.PPO, BOX, BOX)
    model.policy.set_training_mode(True)
    written = []

    class Session:
        """Acts otherwise than the model does."""

        def __init__(self, path, providers):
            written.append((Path(path).read_bytes(), providers))

        def run(self, names, inputs):
            return [model.predict(inputs["obs"], deterministic=True)[0] + 2e-3]

    monkeypatch.setattr(export, "_write", lambda graph, path, opset: path.write_bytes(b"new"))
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    (tmp_path / "m.onnx").write_bytes(b"the file before")
    with pytest.raises(RuntimeError, match=r"differ by .* no file was written.* ActorCriticPolicy"):
        export_onnx(model, tmp_path / "m.onnx")
    assert written == [(b"new", ["CPUExecutionProvider"])]
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    assert (tmp_path / "m.onnx").read_bytes() == b"the file before"
    assert all(module.training for module in model.policy.modules())

    # and one that agrees replaces it
    exact = lambda self, names, inputs: [model.predict(inputs["obs"], deterministic=True)[0]]  # noqa: E731
    monkeypatch.setattr(Session, "run", exact)
    assert export_onnx(model, str(tmp_path / "m.onnx")) == tmp_path / "m.onnx"
    assert (tmp_path / "m.onnx").read_bytes() == b"new"


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
