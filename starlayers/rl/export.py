"""Export of trained policies to ONNX, to run without PyTorch or SB3."""

import os
import tempfile
import warnings
from pathlib import Path

import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecNormalize

from starlayers.rl.inspect import Inspector
from starlayers.rl.onnx import DeterministicPolicy
from starlayers.rl.parity import check_parity, random_inputs, to_tensors


def export_onnx(
    model: BaseAlgorithm,
    path: str | os.PathLike[str],
    *,
    vec_normalize: VecNormalize | None = None,
    opset: int = 18,
) -> Path:
    """Write the deterministic `predict` of a model to a verified ONNX file.

    The graph takes observations as the environment gives them (images channel first, as
    `model.observation_space`) and returns the action that `env.step` takes: the statistics of
    `VecNormalize`, SB3's preprocessing, the masks of MaskablePPO and the scaling or clipping of
    actions are all inside. Before the file is written, its actions are compared with `predict` on
    random observations; where two actions have the same score to rounding, either passes.

    Inputs, with a free batch size: "obs" (batch, ...), or one input per key of a Dict space, in
    the type of the space; "action_masks" (batch, choices), bool, for MaskablePPO; "hidden" and
    "cell" (layers, batch, size), zeros at first, and "episode_start" (batch,), 1 at the first step
    of an episode, for RecurrentPPO. Outputs: "action" (batch, ...); "next_hidden", "next_cell".

    Args:
        model: any algorithm of stable-baselines3 or sb3-contrib.
        path: of the file. It is written to a temporary name first and then replaced.
        vec_normalize: the statistics; by default those of the model's environment, if any. A model
            that was loaded without its environment has none: pass them.
        opset: version of the ONNX operators.

    Returns:
        The path.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is missing.
        TypeError: not a model of stable-baselines3, or not a `VecNormalize`.
        ValueError: a policy without the usual networks, statistics of another shape, or a key of
            the observation with the name of another input or output.
        RuntimeError: onnxruntime and `predict` differ by more than 1e-5, relative to the largest of
            1, the action, and a tenth of any number inside the network, whose rounding reaches
            the action; no file is written.

    Example:
        >>> import numpy as np, onnxruntime, tempfile
        >>> from stable_baselines3 import PPO
        >>> model = PPO("StarMlpPolicy", "CartPole-v1", device="cpu")
        >>> obs = np.zeros((1, 4), np.float32)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     session = onnxruntime.InferenceSession(export_onnx(model, f"{folder}/agent.onnx"))
        >>> action, _ = model.predict(obs, deterministic=True)
        >>> bool(session.run(["action"], {"obs": obs})[0] == action)
        True
    """
    inspector = Inspector(model, "export_onnx")
    if vec_normalize is not None and not isinstance(vec_normalize, VecNormalize):
        raise TypeError(
            f"export_onnx: vec_normalize must be a VecNormalize, got {type(vec_normalize).__name__}"
        )
    try:
        import onnx  # noqa: F401
        import onnxruntime  # type: ignore[import-untyped]
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"export_onnx needs {error.name}: pip install 'starlayers[deploy]'"
        ) from error

    stats = model.get_vec_normalize_env() if vec_normalize is None else vec_normalize
    path = Path(path)
    with inspector.evaluation_mode():
        graph = DeterministicPolicy(model.policy, stats)
        graph.training = False
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
            temporary = Path(folder) / path.name
            _write(graph, temporary, opset)
            session = onnxruntime.InferenceSession(temporary, providers=["CPUExecutionProvider"])
            check_parity(model, graph, session, stats)
            os.replace(temporary, path)
    return path


def _write(graph: DeterministicPolicy, path: Path, opset: int) -> None:
    """Write the graph to an ONNX file, with a free batch size."""
    outputs = ["action"] + ["next_hidden", "next_cell"] * graph.recurrent
    names = graph.names + outputs
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"export_onnx: rename the observation {repeated}, which the graph also needs"
        )
    batch = torch.export.Dim("batch")
    shapes = [{1 if name in ("hidden", "cell") else 0: batch} for name in graph.names]
    args = to_tensors(graph, next(random_inputs(graph, (2,))))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            graph,
            args,
            path,
            input_names=graph.names,
            output_names=outputs,
            dynamic_shapes={"args": tuple(shapes)},
            # the tracing exporter would record fused kernels, which ONNX does not have
            dynamo=True,
            external_data=False,
            opset_version=opset,
            verbose=False,
        )
