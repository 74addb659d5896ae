"""Folder of a training run: configuration, metrics, states, weights and figures."""

import json
import os
import shutil
import warnings
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from starlayers.vision.training.data import TrainData
from starlayers.vision.training.plots import plot_confusion, plot_curves
from starlayers.vision.weights import save_weights

#: settings that runs of earlier versions do not have; such a run goes on with those of now
NEW = ("norm_batches", "balance", "architecture")
#: settings that runs of earlier versions do not name -> what they did
EARLIER = {
    "accumulate": 1,
    "optimizer": "adamw",
    "layer_decay": 1.0,
    "freeze": 0,
    "resized_crop": 0.0,
    "erase": 0.0,
    "amp_dtype": "bfloat16",
    "sync_bn": False,
    "log_with": "none",
    "pretrained": False,
    **dict.fromkeys(("start", "mean", "std")),
}


class RunDir:
    """Folder of a run, in which every file under its final name is complete.

    Holds `config.json`, `metrics.jsonl` (a line per epoch), in `state/step_*` the newest saved
    state, and `best.safetensors`, the weights of the epoch with the highest test accuracy; at the
    end also `model.safetensors`, `curves.png` and `confusion.png`. `load_run` makes a network from
    it that predicts. Files are written under a temporary name and then renamed, so that a kill at
    any moment leaves a folder from which the run can be resumed.

    Args:
        path: the folder; it is made if missing.
        config: description of the run, values that JSON can hold.
        resume: go on with the run in the folder; without it a folder with a run is an error.

    Raises:
        FileExistsError: the folder has a run and `resume` is off.
        FileNotFoundError: `resume` is on and there is no run.
        ValueError: the run there has another configuration; the message lists the differences.

    Example:
        >>> import tempfile
        >>> run = RunDir(tempfile.mkdtemp() + "/run", {"epochs": 1})
        >>> RunDir.read_config(run.path)
        {'epochs': 1}
    """

    def __init__(
        self, path: str | os.PathLike[str], config: dict[str, Any], *, resume: bool = False
    ) -> None:
        self.path = Path(path)
        state = process_state()
        with state.main_process_first():
            if state.is_main_process:
                self._open(config, resume)

    def _open(self, config: dict[str, Any], resume: bool) -> None:
        config = json.loads(json.dumps(config))  # tuples become lists, as in the saved one
        if not resume:
            if (self.path / "config.json").is_file():
                raise FileExistsError(
                    f"{self.path} already has a run: resume it or name another folder"
                )
            self.path.mkdir(parents=True, exist_ok=True)
            self._write("config.json", json.dumps(config, indent=2) + "\n")
            return
        earlier = {key: value for key, value in EARLIER.items() if key in config}
        saved = earlier | self.read_config(self.path)
        differing = [
            f"{key} was {saved.get(key)!r}, now {config.get(key)!r}"
            for key in sorted(saved.keys() | config.keys())
            if saved.get(key) != config.get(key) and not (key in NEW and key not in saved)
        ]
        if differing:
            raise ValueError(f"the run in {self.path} has another recipe: {'; '.join(differing)}")

    @staticmethod
    def fresh_path(parent: str | os.PathLike[str]) -> Path:
        """Return a path under `parent` named by the time, the same in all processes.

        Example:
            >>> len(RunDir.fresh_path("runs").name)  # 20260131-235959
            15
        """
        process_state()  # set up before the broadcast
        name = [f"{datetime.now():%Y%m%d-%H%M%S}"]
        broadcast_object_list(name)
        return Path(parent) / name[0]

    @staticmethod
    def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
        """Read the configuration of the run in `path`.

        Raises:
            FileNotFoundError: no run in that folder.
        """
        file = Path(path) / "config.json"
        if not file.is_file():
            raise FileNotFoundError(f"no run to resume in {path} (no config.json)")
        return dict(json.loads(file.read_text()))

    @staticmethod
    def has_state(path: str | os.PathLike[str]) -> bool:
        """Return True if the run in `path` has saved a state, from which it can be resumed.

        Example:
            >>> RunDir.has_state("no/such/run")
            False
        """
        return bool(_states(Path(path)))

    def save(self, accelerator: Accelerator, step: int) -> None:
        """Save the state of all processes after `step`, then delete older states."""
        final = self.path / "state" / f"step_{step:08d}"
        partial = final.with_suffix(".partial")
        accelerator.save_state(str(partial), safe_serialization=True)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            for other in final.parent.iterdir():
                if other != final:
                    shutil.rmtree(other, ignore_errors=True)
        accelerator.wait_for_everyone()

    def load(self, accelerator: Accelerator) -> bool:
        """Load the newest complete state into the objects that `accelerator` prepared.

        Returns:
            False if there is no state.
        """
        states = _states(self.path)
        if states:
            accelerator.load_state(str(states[-1]))
        return bool(states)

    def metrics(self, up_to_step: int) -> list[dict[str, Any]]:
        """Read the metrics of the epochs that ended at `up_to_step` or before."""
        file = self.path / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.is_file() else []
        return [m for m in map(json.loads, lines) if m["step"] <= up_to_step]

    def write_metrics(self, history: list[dict[str, Any]]) -> None:
        """Write the metrics of all epochs so far."""
        self._write("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in history))

    def write_weights(self, name: str, model: nn.Module, data: TrainData) -> None:
        """Write the weights to a file from which `load_run` makes a network that predicts.

        The names of the classes, the normalisation and the size of the images are in it.
        """
        save_weights(
            model, self.path / name, data.classes, data.mean, data.std, tuple(data.shape[1:])
        )

    def finish(
        self,
        model: nn.Module,
        data: TrainData,
        history: list[dict[str, Any]],
        confusion: Tensor | None,
    ) -> None:
        """Write the weights and the figures of a finished run.

        Without matplotlib it warns and leaves the figures out; resuming the finished run draws
        them later.
        """
        self.write_weights("model.safetensors", model, data)
        try:
            plot_curves(history, self.path / "curves.png")
            if confusion is not None:
                plot_confusion(confusion, data.classes, self.path / "confusion.png")
        except ImportError as error:
            warnings.warn(f"no figures in {self.path}: {error}", stacklevel=2)

    def _write(self, name: str, text: str) -> None:
        partial = self.path / f"{name}.partial"
        partial.write_text(text)
        partial.rename(self.path / name)


def _states(path: Path) -> list[Path]:
    return sorted((path / "state").glob("step_????????"))


def process_state() -> PartialState:
    """Return accelerate's state of the processes, which may be several on a CPU too."""
    return PartialState(cpu=not torch.accelerator.is_available())
