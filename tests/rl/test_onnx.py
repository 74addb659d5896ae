"""DeterministicPolicy: the graph acts as predict does, for every algorithm and space."""

import numpy as np
import pytest
import sb3_contrib as contrib
import stable_baselines3 as sb3
import torch
from stable_baselines3.common.running_mean_std import RunningMeanStd

from starlayers.rl.onnx import MASKED, DeterministicPolicy, NormaliseObservation
from tests.rl.exported import (
    BOX,
    CASES,
    CHOICE,
    CHOICES,
    NORMED,
    SWITCHES,
    WIDE,
    build,
    case,
    observe,
)


def graph_of(model):
    model.policy.set_training_mode(False)
    return DeterministicPolicy(model.policy, model.get_vec_normalize_env())


@torch.no_grad()
def run(graph, inputs):
    names = [*graph.inputs, *graph.extra_inputs()]
    return [y.numpy() for y in graph(*(torch.as_tensor(inputs[name]) for name in names))]


@pytest.mark.parametrize(
    ("name", "norm"), [(n, False) for n in CASES] + [(n, True) for n in NORMED]
)
def test_the_graph_acts_as_predict_does(name, norm):
    model = case(name, norm)
    graph = graph_of(model)
    for n in (1, 5):
        inputs, expected = observe(model, n)
        (actions,) = run(graph, inputs)
        assert (actions.dtype, actions.shape) == (expected.dtype, expected.shape)
        assert np.abs(actions - expected).max() <= 1e-5


@pytest.mark.parametrize(
    ("action", "sizes"), [(CHOICE, [4]), (CHOICES, [3, 4]), (SWITCHES, [2, 2, 2])]
)
def test_masked_actions_are_not_taken(action, sizes):
    model = build(contrib.MaskablePPO, BOX, action, "StarMlpPolicy")
    graph = graph_of(model)
    assert (graph.choices, graph.extra_inputs()) == (sizes, ["action_masks"])
    obs = np.stack([BOX.sample() for _ in range(16)])
    masks = np.ones((16, sum(sizes)), dtype=bool)
    (free,) = run(graph, {"obs": obs, "action_masks": masks})
    np.put_along_axis(masks, free.reshape(16, -1) + np.cumsum([0, *sizes[:-1]]), False, 1)
    (actions,) = run(graph, {"obs": obs, "action_masks": masks})
    expected, _ = model.predict(obs, deterministic=True, action_masks=masks)
    np.testing.assert_array_equal(actions, expected)
    assert (actions != free).all()
    scores = graph.scores(torch.as_tensor(obs), torch.as_tensor(masks))[0]
    assert bool((scores[~torch.as_tensor(masks)] == MASKED).all())


@pytest.mark.parametrize("layers", [1, 2])
def test_lstm_states_go_in_and_out(layers):
    kwargs = {"lstm_hidden_size": 8, "n_lstm_layers": layers}
    model = build(contrib.RecurrentPPO, BOX, BOX, "StarMlpPolicy", policy_kwargs=kwargs)
    graph = graph_of(model)
    assert graph.extra_inputs() == ["hidden", "cell", "episode_start"]
    hidden = cell = np.zeros((layers, 3, 8), dtype=np.float32)
    state, start = None, np.ones(3, dtype=bool)
    rng = np.random.default_rng(0)
    for step in range(4):
        obs = rng.normal(size=(3, 3)).astype(np.float32)
        inputs = {"obs": obs, "hidden": hidden, "cell": cell, "episode_start": start.astype("f4")}
        action, hidden, cell = run(graph, inputs)
        expected, state = model.predict(obs, state, start, deterministic=True)
        for actual, wanted in zip((action, hidden, cell), (expected, *state), strict=True):
            np.testing.assert_allclose(actual, wanted, atol=1e-5)
        start = np.array([False, step == 1, False])


class Stats:
    """The part of `VecNormalize` that the formula needs."""

    clip_obs, epsilon = 2.0, 0.25


@pytest.mark.parametrize(
    ("dtype", "computed"),
    [
        ("float16", torch.float32),
        ("float32", torch.float32),
        ("uint8", torch.float32),
        ("int16", torch.float32),
        ("int32", torch.float64),  # more digits than single precision has
        ("int64", torch.float64),
        ("float64", torch.float64),
    ],
)
def test_normalisation_is_the_formula(dtype, computed):
    rms = RunningMeanStd(shape=(3,))
    rms.mean, rms.var = np.array([0.5, -1.0, 9.0]), np.array([0.75, 2.0, 15.75])
    module = NormaliseObservation(rms, Stats, np.dtype(dtype))
    assert module.std.dtype == computed
    x = np.array([[0, 1, 2], [3, 0, 19]], dtype=dtype)
    expected = np.clip((x.astype(float) - rms.mean) / np.sqrt(rms.var + 0.25), -2, 2)
    actual = module(torch.as_tensor(x))
    assert actual.dtype == torch.float32
    np.testing.assert_allclose(actual, expected, atol=1e-6)
    assert expected.max() == 2  # the clip takes part


def test_a_large_mean_keeps_the_digits_of_the_spread():
    rms = RunningMeanStd(shape=(1,))
    rms.mean, rms.var = np.array([1e6 + 0.3]), np.array([0.04])
    x = np.array([[1e6], [1e6 + 0.25], [1e6 + 0.5]], dtype=np.float32)
    actual = NormaliseObservation(rms, Stats, x.dtype)(torch.as_tensor(x))
    expected = np.clip((x.astype(float) - rms.mean) / np.sqrt(0.29), -2, 2)
    np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_statistics_that_do_not_fit():
    model = build(sb3.PPO, BOX, BOX)
    other = build(sb3.PPO, WIDE, BOX, norm=True).get_vec_normalize_env()
    words = r"shape \(2, 3\) for 'obs', but the model observes \(3,\); a wrapper that changes"
    with pytest.raises(ValueError, match=words):
        DeterministicPolicy(model.policy, other)
    other.norm_obs = False
    assert DeterministicPolicy(model.policy, other).statistics == {}


def test_policies_without_the_usual_networks():
    policy = build(sb3.PPO, BOX, CHOICE).policy
    graph = DeterministicPolicy(policy, None)
    del policy.mlp_extractor, policy.action_net
    words = (
        r"export_onnx: ActorCriticPolicy has none of the networks .*\(mlp_extractor, actor, q_net"
    )
    with pytest.raises(ValueError, match=words):
        graph(torch.zeros(1, 3))
