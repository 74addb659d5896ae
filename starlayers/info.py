"""Facts for bug reports: versions, devices, and the code path of typical layers."""

import os
import platform
import shutil
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from starlayers.backend import backend_name
from starlayers.modules import StarMLP
from starlayers.surgery.report import aligned

__all__ = ["as_text", "collect"]

PACKAGES = (
    "starlayers",
    "torch",
    "triton",
    "torchvision",
    "timm",
    "transformers",
    "accelerate",
    "stable-baselines3",
    "sb3-contrib",
    "optuna",
    "onnx",
    "onnxruntime",
)

#: star MLPs whose code path is reported: (channels, rows, gradients)
LAYERS = ((64, 8, False), (64, 65536, False), (64, 65536, True), (512, 4096, True))


def collect() -> dict[str, Any]:
    """Collect what a bug report needs, as values that JSON can hold.

    Returns:
        `packages` (name -> version, `None` if not installed), `platform`, `devices`, `compilers`
        (name -> first line of `--version`, `None` if not found), `backend` (the one asked for, or
        the error it causes), `auto` (for typical star MLPs: what runs, and why it is not a fused
        kernel) and `models` (the published StarNets; empty without `starlayers[vision]`).

    Example:
        >>> facts = collect()
        >>> facts["packages"]["starlayers"], facts["auto"][0]["runs"]
        ('0.1.0', 'eager')
    """
    return {
        "packages": {"python": platform.python_version(), **_versions()},
        "platform": {"system": platform.platform(), "processor": platform.machine()},
        "devices": _devices(),
        "compilers": _compilers(),
        "backend": _backend(),
        "auto": [_code_path(device, *layer) for device in _usable() for layer in LAYERS],
        "models": _models(),
    }


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return versions


def _devices() -> list[dict[str, Any]]:
    devices: list[dict[str, Any]] = [
        {"device": "cpu", "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    ]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        devices.append(
            {
                "device": f"cuda:{i}",
                "name": properties.name,
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "capability": f"{properties.major}.{properties.minor}",
            }
        )
    return devices


def _usable() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _compilers() -> dict[str, str | None]:
    """Compilers that Inductor and Triton would call, and the toolkits PyTorch was built with."""
    found: dict[str, str | None] = {
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }
    for name in (os.environ.get("CC", "cc"), os.environ.get("CXX", "c++"), "nvcc"):
        found[name] = _first_line(name)
    return found


def _first_line(command: str) -> str | None:
    path = shutil.which(command)
    if path is None:
        return None
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{path}: {error}"
    return (done.stdout or done.stderr).strip().partition("\n")[0]


def _backend() -> str:
    try:
        return backend_name()
    except ValueError as error:
        return str(error)


def _code_path(device: str, dim: int, rows: int, gradients: bool) -> dict[str, Any]:
    """Code path of `StarMLP(dim)` on `rows` rows: "fused" or "eager", and the reason for eager."""
    kind = torch.float32 if device == "cpu" else torch.bfloat16
    layer = StarMLP(dim, device=device, dtype=kind)
    with torch.set_grad_enabled(gradients):
        try:
            reason = layer.plan(torch.empty(rows, dim, device=device, dtype=kind)).reason or None
        except (RuntimeError, ValueError) as error:  # the backend asked for cannot serve
            reason = str(error)
    return {
        "layer": f"StarMLP({dim})",
        "rows": rows,
        "device": device,
        "dtype": str(kind).removeprefix("torch."),
        "gradients": gradients,
        "runs": "fused" if reason is None else "eager",
        "reason": reason,
    }


def _models() -> list[dict[str, Any]]:
    try:  # vision has dependencies of its own
        from starlayers.vision.cost import multiply_adds
        from starlayers.vision.models import MODELS, STARNETS
    except ImportError:
        return []
    models = []
    for name, build in MODELS.items():
        model = build(device="meta")
        models.append(
            {
                "model": name,
                "parameters_m": round(sum(p.numel() for p in model.parameters()) / 1e6, 2),
                "macs_m_at_224": round(multiply_adds(model) / 1e6),
                "weights": STARNETS[name].hub_id,
            }
        )
    return models


def as_text(facts: dict[str, Any]) -> str:
    """Return the facts of `collect` as text."""
    lines: list[str] = []
    for title in ("packages", "platform", "compilers"):
        missing = "not installed" if title == "packages" else "not found"
        rows = [[key, missing if v is None else v] for key, v in facts[title].items()]
        lines += [title, *_columns(rows)]
    lines += ["devices", *_columns(row.values() for row in facts["devices"])]
    lines += [f"backend {facts['backend']}, in which run"]
    paths = [
        [
            f"{row['layer']}, {row['rows']} rows, {row['dtype']} on {row['device']}"
            f"{', training' if row['gradients'] else ''}",
            row["runs"] + (f": {row['reason']}" if row["reason"] else ""),
        ]
        for row in facts["auto"]
    ]
    lines += _columns(paths)
    if facts["models"]:
        head = ("model", "parameters M", "MACs M at 224x224", "pretrained weights")
        rows = [["-" if v is None else v for v in row.values()] for row in facts["models"]]
        lines += ["models", *_columns([head, *rows])]
    else:
        lines += ["models need pip install 'starlayers[vision]'"]
    return "\n".join(lines)


def _columns(rows: Iterable[Iterable[Any]]) -> list[str]:
    return [f"  {line}" for line in aligned(rows)]
