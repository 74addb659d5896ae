"""DeterministicPolicy: the graph acts as predict does, for every algorithm and space."""

import numpy as np
import pytest
import sb3_contrib as contrib
import stable_baselines3 as sb3
import torch
from gymnasium import spaces
from stable_baselines3.common.running_mean_std import RunningMeanStd

from starlayers.rl import parity
from starlayers.rl.onnx import MASKED, DeterministicPolicy, NormaliseObservation
from starlayers.rl.parity import check_parity, random_inputs, to_tensors
from tests.rl.exported import (
    BOX,
    BYTES,
    CASES,
    CHOICE,
    CHOICES,
    DICT,
    DOUBLE,
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
    return [y.numpy() for y in graph(*(torch.as_tensor(inputs[name]) for name in graph.names))]


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
    assert (graph.choices, graph.names) == (sizes, ["obs", "action_masks"])
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
    assert graph.names == ["obs", "hidden", "cell", "episode_start"]
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


# --- comparison of a session with predict: random inputs, differences, and what must raise


class Session:
    """Runs the graph in PyTorch, and changes one of its outputs."""

    def __init__(self, graph, change=lambda y: y, output=0):
        self.graph, self.change, self.output, self.sizes = graph, change, output, []

    @torch.no_grad()
    def run(self, names, inputs):
        outputs = [y.numpy() for y in self.graph(*to_tensors(self.graph, inputs))]
        outputs[self.output] = self.change(outputs[self.output])
        self.sizes.append(len(next(iter(inputs.values()))))
        return outputs


def compared(model, change=lambda y: y, output=0):
    graph = graph_of(model)
    session = Session(graph, change, output)
    check_parity(model, graph, session, model.get_vec_normalize_env())
    return session.sizes


def test_a_session_that_agrees_is_tried_with_every_batch_size():
    assert compared(build(sb3.PPO, BOX, BOX)) == [1, 2, 7, 64]
    # with statistics, samples of the space and samples around the mean
    assert compared(build(sb3.PPO, WIDE, BOX, norm=True)) == [1, 1, 2, 2, 7, 7, 64, 64]


@pytest.mark.parametrize(
    ("action", "change"),
    [
        (BOX, lambda y: y + 4e-5),
        (BOX, lambda y: y - 4e-5),
        (BOX, lambda y: y * np.nan),
        (BOX, lambda y: y[:, :2]),
        (BOX, lambda y: y.astype(np.float64)),
        (CHOICE, lambda y: (y + 1) % 4),
    ],
)
def test_a_session_that_differs_raises(action, change):
    model = build(sb3.PPO, BOX, action)
    words = r"differ by (inf|nan|[\d.e-]+) on 1 random observations, more than 1e-05; no file"
    with pytest.raises(RuntimeError, match=words):
        compared(model, change)


@pytest.mark.parametrize("output", [1, 2])
def test_states_of_an_lstm_are_compared(output):
    model = build(
        contrib.RecurrentPPO, BOX, CHOICE, "StarMlpPolicy", policy_kwargs={"lstm_hidden_size": 4}
    )
    assert compared(model) == [1, 2, 7, 64]
    with pytest.raises(RuntimeError, match="differ by"):
        compared(model, lambda y: y + 1e-3, output)


@pytest.mark.parametrize(
    ("expected", "actual", "largest", "choices", "difference"),
    [
        ([0, 0], [1, 0], 0.0, [3], 5e-8),  # a tie to rounding
        ([0, 0], [2, 0], 0.0, [3], 0.5),  # 1 of 2, the largest score
        ([0, 0], [2, 0], 100.0, [3], 0.1),  # or of a tenth of the largest number inside
    ],
)
def test_choices_differ_by_their_scores(expected, actual, largest, choices, difference):
    scores = np.array([[1.0, 1.0 + 1e-7, 0.0], [2.0, 0.0, -1e8]], dtype=np.float32)
    arrays = np.array(expected), np.array(actual)
    assert parity._difference(*arrays, scores, largest, choices) == pytest.approx(
        difference, rel=0.3
    )


def test_small_scores_are_compared_as_they_are():
    scores = np.array([[0.01, 0.005, 0.01]], dtype=np.float32)
    found = parity._difference(np.array([0]), np.array([1]), scores, 0.0, [3])
    assert found == pytest.approx(0.5, rel=1e-5)
    zeros = np.zeros((1, 3), np.float32)
    assert parity._difference(np.array([0]), np.array([1]), zeros, 0.0, [3]) == 0


def test_limits_are_pinned():
    assert (parity.TOLERANCE, parity.BATCHES, parity.LARGE) == (1e-5, (1, 2, 7, 64), 1000)


def test_several_choices_have_scores_of_their_own():
    scores = np.array([[0.0, 4.0, 1.0, 3.0, 2.0]], dtype=np.float32)
    expected, actual = np.array([[1, 1]]), np.array([[1, 2]])
    assert parity._difference(expected, actual, scores, 0.0, [2, 3]) == 0.25


@pytest.mark.parametrize(
    ("value", "largest", "difference"),
    [(0.5, 0.0, 4e-5), (4.0, 0.0, 1e-5), (4.0, 30.0, 1e-5), (4.0, 80.0, 5e-6), (0.0, 0.0, 4e-5)],
)
def test_values_differ_relative_to_the_largest_number(value, largest, difference):
    values = np.array([[value], [0.0]], dtype=np.float64)
    found = parity._difference(values, values - 4e-5, values, largest, [])
    assert found == pytest.approx(difference, rel=1e-3)


def test_shapes_and_types_must_be_equal():
    x = np.zeros((2, 1), np.float32)
    for other in (x[:1], x.astype(np.float64), x[:, 0]):
        assert parity._difference(x, other, x, 0.0, []) == np.inf
    assert parity._difference(x, x, x, 0.0, []) == 0


def test_random_inputs_are_of_the_space():
    model = build(sb3.PPO, DICT, BOX, "MultiInputPolicy")
    graph = graph_of(model)
    first, second = (list(random_inputs(graph, (3, 2))) for _ in range(2))
    assert [len(inputs["vector"]) for inputs in first] == [3, 2]
    for a, b in zip(first, second):
        for key, space in graph.inputs.items():
            np.testing.assert_array_equal(a[key], b[key])  # the same each time
            assert all(space.contains(x) for x in a[key])
            assert a[key].dtype == space.dtype


def test_unbounded_spaces_are_sampled_in_a_range():
    graph = graph_of(build(sb3.PPO, WIDE, BOX))
    ((inputs),) = random_inputs(graph, (64,))
    assert np.abs(inputs["obs"]).max() < parity.LARGE
    bounded = graph_of(build(sb3.PPO, spaces.Box(900, 2000, (3,)), BOX))
    ((inputs),) = random_inputs(bounded, (64,))
    x = inputs["obs"]
    assert x.max() <= parity.LARGE
    assert (x[x > 10] >= 900).all()


@pytest.mark.parametrize("space", [WIDE, DOUBLE])
def test_inputs_around_the_mean(space):
    model = build(sb3.PPO, space, BOX, norm=True)
    graph, rms = graph_of(model), model.get_vec_normalize_env().obs_rms
    plain, around = random_inputs(graph, (512,))
    assert around["obs"].dtype == space.dtype
    z = (around["obs"] - rms.mean) / np.sqrt(rms.var)
    np.testing.assert_allclose(z.mean(0), 0, atol=0.4)
    np.testing.assert_allclose(z.std(0), 2, rtol=0.2)
    assert np.abs((plain["obs"] - rms.mean) / np.sqrt(rms.var)).max() > 10


def test_bytes_around_the_mean_are_bytes():
    model = build(sb3.PPO, BYTES, BOX, norm=True)
    rms = model.get_vec_normalize_env().obs_rms
    rms.mean, rms.var = np.array([0.0, 100.0, 255.0]), np.array([4.0, 4.0, 4.0])
    _, around = random_inputs(graph_of(model), (256,))
    x = around["obs"]
    assert x.dtype == np.uint8
    assert (x[:, 0].min(), x[:, 2].max()) == (0, 255)
    assert x[:, 0].max() < 20
    assert x[:, 2].min() > 235
    assert abs(x[:, 1].mean() - 100) < 1


def test_random_masks_allow_something():
    model = build(contrib.MaskablePPO, BOX, CHOICES)
    ((inputs),) = random_inputs(graph_of(model), (200,))
    masks = inputs["action_masks"]
    assert (masks.shape, masks.dtype) == ((200, 7), np.bool_)
    assert masks[:, :3].any(1).all()
    assert masks[:, 3:].any(1).all()
    assert 0.4 < masks.mean() < 0.8
    starts = build(contrib.RecurrentPPO, BOX, CHOICE, "StarMlpPolicy")
    ((inputs),) = random_inputs(graph_of(starts), (200,))
    assert inputs["hidden"].shape == inputs["cell"].shape == (1, 200, 256)
    assert set(np.unique(inputs["episode_start"])) == {0.0, 1.0}
    for state in (inputs["hidden"], inputs["cell"]):
        assert -1 <= state.min() < -0.9
        assert 0.9 < state.max() <= 1
