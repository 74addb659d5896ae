"""Accelerator of a recipe: devices, processes, precision and trackers."""

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import DataLoaderConfiguration

from starlayers.vision.training.recipe import TrainConfig
from starlayers.vision.training.rundir import RunDir, process_state


def make_accelerator(config: TrainConfig, run_dir: RunDir | None) -> Accelerator:
    """Return accelerate's view of devices and processes, with the precision and tracker.

    Raises:
        ValueError: the recipe needs a GPU or a folder, and there is none.
        ImportError: the tracker of the recipe is not installed.
    """
    cpu = process_state().device.type == "cpu"
    for asked, option in (
        (config.amp and config.amp_dtype == "float16", "amp_dtype='float16'"),
        (config.sync_bn, "sync_bn"),
    ):
        if asked and cpu:
            raise ValueError(
                f"{option} needs a GPU, and none is here; on a CPU "
                + ("take 'bfloat16'" if "float16" in option else "leave it out")
            )
    tracked = config.log_with != "none"
    if tracked and run_dir is None:
        raise ValueError(f"log_with={config.log_with!r} needs a run_dir")
    if tracked and config.log_with not in [t.value for t in get_available_trackers()]:
        raise ImportError(f"log_with={config.log_with!r}: pip install {config.log_with}")
    precision = {"bfloat16": "bf16", "float16": "fp16"}[config.amp_dtype]
    # accelerate keeps the precision of the first run in a process and refuses another one
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=precision if config.amp else "no",
        dataloader_config=DataLoaderConfiguration(use_stateful_dataloader=True),
        log_with=config.log_with if tracked else None,
        project_dir=run_dir.path if tracked and run_dir else None,
    )
    if tracked:
        accelerator.init_trackers(
            "tensorboard" if config.log_with == "tensorboard" else "starlayers"
        )
    return accelerator
