"""Whether an exported graph acts as the model it came from."""

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecNormalize
from torch import Tensor, nn

from starlayers.rl.onnx import MASKED, Decision

__all__ = ["check_parity", "samples", "tensors"]

Array = npt.NDArray[Any]
Arrays = dict[str, Array]

TOLERANCE = 1e-5
BATCHES = (1, 2, 7, 64)
#: bounds beyond this are no range that observations fill
LARGE = 1e3


def check_parity(model: Any, decision: Decision, session: Any, stats: VecNormalize | None) -> None:
    """Raise where a session of onnxruntime and `predict` differ on random observations."""
    for feed in samples(decision, BATCHES):
        obs: Any = {k: feed[k] for k in decision.inputs}
        obs = obs if decision.is_dict else obs["obs"]
        obs = obs if stats is None else stats.normalize_obs(obs)
        known: dict[str, Any] = {"deterministic": True}
        if decision.maskable:
            known["action_masks"] = feed["action_masks"]
        if decision.recurrent:
            known["state"] = (feed["hidden"], feed["cell"])
            known["episode_start"] = feed["episode_start"]
        action, state = model.predict(obs, **known)
        pairs = list(zip([action, *(state or ())], session.run(None, feed), strict=True))
        scores, inside = _inside(decision, tensors(decision, feed))
        # the action first; the state of an LSTM is no choice between scores
        gap = max(
            _gap(want, got, scores, inside, decision.heads if i == 0 else [])
            for i, (want, got) in enumerate(pairs)
        )
        if not gap <= TOLERANCE:  # NaN is a mismatch too
            raise RuntimeError(
                f"export_onnx: onnxruntime and predict differ by {gap:.3g} on {len(action)} random "
                f"observations, more than {TOLERANCE}; no file was written. The graph follows the "
                f"networks of {type(model.policy).__name__}, not a predict or get_distribution of "
                "its own"
            )


def _inside(decision: Decision, args: tuple[Tensor, ...]) -> tuple[Array, float]:
    """The scores, and the largest number on the way to them, whose rounding reaches the action."""
    largest = [0.0]

    def hook(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point():
            largest.append(float(output.abs().max()))

    handles = [m.register_forward_hook(hook) for m in decision.policy.modules()]
    try:
        with torch.no_grad():
            return decision.scores(*args)[0].cpu().numpy(), max(largest)
    finally:
        for handle in handles:
            handle.remove()


def _gap(want: Array, got: Array, scores: Array, inside: float, heads: list[int]) -> float:
    """The largest difference, relative above 1 or where far larger numbers cancelled.

    Discrete actions differ by their scores: at a tie rounding decides, and both are right.
    """
    if want.shape != got.shape or want.dtype != got.dtype:
        return float("inf")
    size = inside / 10
    if heads:
        starts = np.cumsum([0, *heads[:-1]])
        want, got = (
            np.take_along_axis(scores, x.reshape(len(x), -1).astype(np.int64) + starts, 1)
            for x in (want, got)
        )
        size = max(size, float(np.abs(scores[scores > MASKED]).max()))
    else:
        size = max(size, 1.0, float(np.abs(want).max()))
    return float(np.abs(want - got).max() / max(size, 1e-30))


def tensors(decision: Decision, feed: Arrays) -> tuple[Tensor, ...]:
    """Inputs on the device of the policy."""
    device = decision.policy.device
    return tuple(torch.as_tensor(x, device=device) for x in feed.values())


def samples(decision: Decision, sizes: tuple[int, ...]) -> Iterator[Arrays]:
    """Random inputs; with statistics also such that the normalised values spread."""
    rng = np.random.default_rng(0)
    inputs = copy.deepcopy(decision.inputs)
    for i, space in enumerate(inputs.values()):
        space.seed(i)
    for n in sizes:
        for spread in (False, True) if decision.normalised else (False,):
            feed = {}
            for key, space in inputs.items():
                x = np.stack([np.asarray(space.sample()) for _ in range(n)])
                rms = decision.normalised.get(key)
                if spread and rms is not None:
                    x = rms.mean + 2 * np.sqrt(rms.var) * rng.standard_normal(x.shape)
                elif x.dtype.kind == "f":
                    x = np.where(np.abs(x) > LARGE, rng.standard_normal(x.shape), x)
                if isinstance(space, spaces.Box) and x.dtype != space.dtype:
                    kind = space.dtype
                    x = x if kind.kind == "f" else np.clip(np.rint(x), space.low, space.high)
                feed[key] = x.astype(space.dtype)
            if decision.maskable:
                masks = [rng.random((n, size)) > 0.5 for size in decision.heads]
                for mask in masks:
                    mask[np.arange(n), rng.integers(mask.shape[1], size=n)] = True
                feed["action_masks"] = np.concatenate(masks, 1)
            if decision.recurrent:
                lstm = decision.policy.lstm_actor
                shape = (lstm.num_layers, n, lstm.hidden_size)
                for name in ("hidden", "cell"):
                    feed[name] = rng.uniform(-1, 1, shape).astype(np.float32)
                feed["episode_start"] = (rng.random(n) > 0.5).astype(np.float32)
            yield feed
