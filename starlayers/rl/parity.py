"""Comparison of an exported ONNX graph with the model it came from."""

import copy
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecNormalize
from torch import Tensor, nn

from starlayers.rl.onnx import MASKED, DeterministicPolicy

Array = npt.NDArray[Any]
Arrays = dict[str, Array]

#: largest difference of an action, relative to the largest of 1 and the action itself
TOLERANCE = 1e-5
#: sizes of the batches that are compared
BATCHES = (1, 2, 7, 64)
#: bounds of a space beyond this are no range that observations fill
LARGE = 1e3


def check_parity(
    model: Any, graph: DeterministicPolicy, session: Any, stats: VecNormalize | None
) -> None:
    """Raise a RuntimeError if an onnxruntime session differs from `predict`."""
    for inputs in random_inputs(graph, BATCHES):
        obs: Any = {key: inputs[key] for key in graph.inputs}
        obs = obs if graph.is_dict else obs["obs"]
        obs = obs if stats is None else stats.normalize_obs(obs)
        kwargs: dict[str, Any] = {"deterministic": True}
        if graph.maskable:
            kwargs["action_masks"] = inputs["action_masks"]
        if graph.recurrent:
            kwargs["state"] = (inputs["hidden"], inputs["cell"])
            kwargs["episode_start"] = inputs["episode_start"]
        action, state = model.predict(obs, **kwargs)
        outputs = zip([action, *(state or ())], session.run(None, inputs), strict=True)
        scores, largest = _scores_and_largest(graph, to_tensors(graph, inputs))
        # only the action, which comes first, is a choice between scores: LSTM states are not
        difference = max(
            _difference(expected, actual, scores, largest, graph.choices if i == 0 else [])
            for i, (expected, actual) in enumerate(outputs)
        )
        if not difference <= TOLERANCE:  # NaN is a mismatch too
            raise RuntimeError(
                f"export_onnx: onnxruntime and predict differ by {difference:.3g} on {len(action)} "
                f"random observations, more than {TOLERANCE}; no file was written. The graph "
                f"follows the networks of {type(model.policy).__name__}, not a predict or "
                "get_distribution of its own"
            )


def _scores_and_largest(
    graph: DeterministicPolicy, args: tuple[Tensor, ...]
) -> tuple[Array, float]:
    """Return the scores, and the largest number in the network on the way to them.

    Rounding of that number, which may cancel later, reaches the action.
    """
    largest = [0.0]

    def record(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point():
            largest.append(float(output.abs().max()))

    with torch.no_grad(), ExitStack() as hooks:
        for module in graph.policy.modules():
            hooks.enter_context(module.register_forward_hook(record))
        return graph.scores(*args)[0].cpu().numpy(), max(largest)


def _difference(
    expected: Array, actual: Array, scores: Array, largest: float, choices: list[int]
) -> float:
    """Return the largest difference, relative to a scale of at least 1.

    The scale is the largest of 1, the values, and a tenth of `largest`, the largest number inside
    the network. Discrete actions are compared by their scores, without the 1: at a tie rounding
    decides, and either action is right. Another shape or dtype is an infinite difference.
    """
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        return float("inf")
    scale = largest / 10
    if choices:
        starts = np.cumsum([0, *choices[:-1]])
        expected, actual = (
            np.take_along_axis(scores, x.reshape(len(x), -1).astype(np.int64) + starts, 1)
            for x in (expected, actual)
        )
        scale = max(scale, float(np.abs(scores[scores > MASKED]).max()))
    else:
        scale = max(scale, 1.0, float(np.abs(expected).max()))
    return float(np.abs(expected - actual).max() / max(scale, 1e-30))


def to_tensors(graph: DeterministicPolicy, inputs: Arrays) -> tuple[Tensor, ...]:
    """Copy inputs to tensors on the device of the policy."""
    device = graph.policy.device
    return tuple(torch.as_tensor(x, device=device) for x in inputs.values())


def random_inputs(graph: DeterministicPolicy, sizes: tuple[int, ...]) -> Iterator[Arrays]:
    """Yield random inputs of every batch size.

    With statistics each size comes twice: samples of the space, most of which normalise to beyond
    the clip, and samples around the running mean.
    """
    rng = np.random.default_rng(0)
    observation_spaces = copy.deepcopy(graph.inputs)
    for i, space in enumerate(observation_spaces.values()):
        space.seed(i)
    for n in sizes:
        for around_mean in (False, True) if graph.statistics else (False,):
            inputs = {}
            for key, space in observation_spaces.items():
                rms = graph.statistics.get(key) if around_mean else None
                inputs[key] = _random_observations(space, rms, n, rng)
            if graph.maskable:
                inputs["action_masks"] = _random_masks(graph.choices, n, rng)
            if graph.recurrent:
                lstm = graph.policy.lstm_actor
                shape = (lstm.num_layers, n, lstm.hidden_size)
                for name in ("hidden", "cell"):
                    inputs[name] = rng.uniform(-1, 1, shape).astype(np.float32)
                inputs["episode_start"] = (rng.random(n) > 0.5).astype(np.float32)
            yield inputs


def _random_observations(space: Any, rms: Any, n: int, rng: np.random.Generator) -> Array:
    """Sample a space, or around the running mean `rms.mean` if there is one."""
    x = np.stack([np.asarray(space.sample()) for _ in range(n)])
    if rms is not None:
        x = rms.mean + 2 * np.sqrt(rms.var) * rng.standard_normal(x.shape)
    elif x.dtype.kind == "f":
        x = np.where(np.abs(x) > LARGE, rng.standard_normal(x.shape), x)
    if isinstance(space, spaces.Box) and x.dtype != space.dtype and space.dtype.kind != "f":
        x = np.clip(np.rint(x), space.low, space.high)
    return x.astype(space.dtype)


def _random_masks(choices: list[int], n: int, rng: np.random.Generator) -> Array:
    """Draw masks that allow each value with probability 0.5, and at least one."""
    masks = [rng.random((n, size)) > 0.5 for size in choices]
    for mask in masks:
        mask[np.arange(n), rng.integers(mask.shape[1], size=n)] = True
    return np.concatenate(masks, 1)
