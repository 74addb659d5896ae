"""Hardware, versions, command and date: the conditions of a measurement."""

import os
import platform
import shlex
import sys
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "torchvision", "triton", "timm", "transformers", "peft", "optuna", "cmaes")
PACKAGES += ("liger-kernel", "numpy", "stable-baselines3", "gymnasium", "mujoco", "starlayers")
PACKAGES += ("onnx", "onnxruntime", "openvino", "nncf")
HARDWARE = ("cpu", "cores", "threads", "gpu")


def environment() -> dict[str, Any]:
    """Return date, command, hardware and versions as one flat dictionary."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "date": date.today().isoformat(),
        "command": command(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **versions,
    }


def conditions(*, threads: int | None = None) -> dict[str, Any]:
    """Return the environment as the fields of a record: hardware, versions, command, date.

    `threads` replaces this process's number of threads where the work is done in others.
    """
    flat = environment()
    if threads is not None:
        flat["threads"] = threads
    hardware = {name: flat.pop(name) for name in HARDWARE}
    return {
        "hardware": hardware,
        "command": flat.pop("command"),
        "date": flat.pop("date"),
        "versions": flat,
    }


def command() -> str:
    """Return the command line of this process as one would type it in the repository's root.

    Results are committed, so that absolute paths of this machine are cut to their last part.
    """
    arguments = [Path(a).name if Path(a).is_absolute() else a for a in sys.argv]
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None:
        return shlex.join(["python", *arguments])
    return shlex.join(["python", "-m", spec.name.removesuffix(".__main__"), *arguments[1:]])


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
