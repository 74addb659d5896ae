"""The folder of a run: configuration, metrics, weights, pictures, and states to resume from."""

import json
import os
import shutil
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor

__all__ = ["RunDir", "process_state"]


class RunDir:
    """A run's folder; whatever is in it under its final name is complete.

    Holds `config.json`, `metrics.jsonl` (a line per epoch), `state/step_*` while the run goes on,
    and at its end `model.safetensors`, `curves.png` and `confusion.png`. Files are written beside
    their final name and then renamed, so that a kill at any moment leaves a usable folder.

    Args:
        path: the folder, made when missing.
        config: what describes the run, as JSON-able values.
        resume: continue in a folder that has a run; without it such a folder is an error.

    Raises:
        FileExistsError: the folder has a run and `resume` is off.
        FileNotFoundError: `resume` is on and there is no run.
        ValueError: the run there has another configuration; the message lists what differs.

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
        config = json.loads(json.dumps(config))  # tuples become lists, as they will be when read
        if not resume:
            if (self.path / "config.json").is_file():
                raise FileExistsError(
                    f"{self.path} already has a run: resume it or name another folder"
                )
            self.path.mkdir(parents=True, exist_ok=True)
            self._write("config.json", json.dumps(config, indent=2) + "\n")
            return
        there = self.read_config(self.path)
        keys = sorted(there.keys() | config.keys())
        differ = [k for k in keys if there.get(k) != config.get(k)]
        if differ:
            lines = [f"{k} was {there.get(k)!r}, now {config.get(k)!r}" for k in differ]
            raise ValueError(f"the run in {self.path} has another recipe: {'; '.join(lines)}")

    @staticmethod
    def fresh_path(parent: str | os.PathLike[str]) -> Path:
        """A folder under `parent` named by the time, the same in all processes of a run."""
        process_state()
        name = [f"{datetime.now():%Y%m%d-%H%M%S}"]
        broadcast_object_list(name)
        return Path(parent) / name[0]

    @staticmethod
    def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
        """The configuration a run folder was made with.

        Raises:
            FileNotFoundError: no run in that folder.
        """
        file = Path(path) / "config.json"
        if not file.is_file():
            raise FileNotFoundError(f"no run to resume in {path} (no config.json)")
        config: dict[str, Any] = json.loads(file.read_text())
        return config

    def save(self, accelerator: Accelerator, step: int) -> None:
        """Save the state of all processes after `step`, then drop older states."""
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
        """Load the newest complete state into what `accelerator` prepared; False without one."""
        states = sorted((self.path / "state").glob("step_????????"))
        if states:
            accelerator.load_state(str(states[-1]))
        return bool(states)

    def metrics(self, up_to_step: int) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl` of epochs that ended by `up_to_step`."""
        file = self.path / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.is_file() else []
        return [m for m in map(json.loads, lines) if m["step"] <= up_to_step]

    def write_metrics(self, history: list[dict[str, Any]]) -> None:
        """Write all lines of `metrics.jsonl`."""
        self._write("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in history))

    def finish(
        self,
        weights: dict[str, Tensor],
        history: list[dict[str, Any]],
        confusion: Tensor | None,
        classes: Sequence[str],
    ) -> None:
        """Write the weights and the pictures of a finished run."""
        from safetensors.torch import save_file

        partial = self.path / "model.safetensors.partial"
        # cloned, because safetensors refuses tensors that share memory, as tied weights do
        dense = torch.contiguous_format
        save_file(
            {k: v.detach().cpu().clone(memory_format=dense) for k, v in weights.items()}, partial
        )
        partial.rename(self.path / "model.safetensors")
        _plot_curves(history, self.path / "curves.png")
        if confusion is not None:
            _plot_confusion(confusion, classes, self.path / "confusion.png")

    def _write(self, name: str, text: str) -> None:
        partial = self.path / f"{name}.partial"
        partial.write_text(text)
        partial.rename(self.path / name)


def process_state() -> PartialState:
    """accelerate's view of the processes of this run, set up also for several on a CPU.

    Example:
        >>> process_state().num_processes
        1
    """
    return PartialState(cpu=not torch.accelerator.is_available())


def _plot_curves(history: list[dict[str, Any]], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    epochs = [line["epoch"] for line in history]
    for axes, metric in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for part in ("train", "test"):
            axes.plot(epochs, [line[f"{part}_{metric}"] for line in history], "o-", label=part)
        axes.set(xlabel="epoch", ylabel=metric, xticks=epochs if len(epochs) <= 20 else None)
        axes.legend()
    _save_figure(figure, file)


def _plot_confusion(confusion: Tensor, classes: Sequence[str], file: Path) -> None:
    from matplotlib.figure import Figure

    n = len(classes)
    side = min(4 + 0.4 * n, 24)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    share = confusion / confusion.sum(1, keepdim=True).clamp_min(1)
    image = axes.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="true", title="share of each true class")
    axes.set_xticks(range(n), classes, rotation=45, ha="right")
    axes.set_yticks(range(n), classes)
    if n <= 20:
        for i, j in torch.nonzero(confusion).tolist():
            colour = "white" if share[i, j] > 0.5 else "black"
            text = f"{share[i, j]:.2f}".lstrip("0")
            axes.text(j, i, text, ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(image, shrink=0.8)
    _save_figure(figure, file)


def _save_figure(figure: Any, file: Path) -> None:
    partial = file.with_suffix(".partial.png")
    figure.savefig(partial, dpi=120)
    partial.rename(file)
