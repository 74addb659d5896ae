"""Example run as users run it: to the end, killed, stopped with Ctrl-C, resumed, on two processes.

Starting Python and importing takes longer than training, so the quick tests run the example in this
process, and the one that kills it in a fork of a process that has imported everything.
"""

import io
import json
import os
import random
import re
import runpy
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from starlayers.commands.vision import build, train_command
from starlayers.vision import STARNETS
from starlayers.vision.training import RunDir

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "vision_starnet.py"
STEPS = 69  # three epochs of 23
RECIPE = [
    *("--data", "digits", "--epochs", "3", "--batch-size", "64", "--save-every", "5"),
    *("--seed", "4", "--crop", "1", "--randaugment", "1", "--mixup", "0.2", "--cutmix", "0.5"),
    *("--ema", "0.9", "--drop-path", "0.2"),
]
PATIENCE_S = 300


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def command(*args: object) -> list[str]:
    return [sys.executable, str(EXAMPLE), *map(str, args)]


def finished_numbers(folder: Path) -> tuple[list[dict[str, float]], bytes]:
    """Metrics and weights, which must be equal in two runs."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["seconds"]
    return lines, (folder / "model.safetensors").read_bytes()


def saved_step(folder: Path) -> int:
    return max((int(p.name[5:]) for p in (folder / "state").glob("step_????????")), default=0)


def wait_until(condition, alive) -> None:
    give_up = time.monotonic() + PATIENCE_S
    while not condition():
        assert alive(), "the run ended early"
        assert time.monotonic() < give_up
        time.sleep(0.001)


def run_here(*args: object) -> str:
    """Run the example in this process, on one thread, and return its output."""
    output, argv, threads = io.StringIO(), sys.argv, torch.get_num_threads()
    sys.argv = [str(EXAMPLE), *map(str, args)]
    torch.set_num_threads(1)  # the last bits of sums depend on it
    try:
        with redirect_stdout(output), redirect_stderr(output):
            runpy.run_path(str(EXAMPLE), run_name="__main__")
    finally:
        sys.argv = argv
        torch.set_num_threads(threads)
    return output.getvalue()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    return folder, run_here(*RECIPE, "--out", folder)


def test_an_undisturbed_run_prints_and_saves_its_results(undisturbed):
    folder, output = undisturbed
    lines, _ = finished_numbers(folder)
    assert [(line["epoch"], line["step"]) for line in lines] == [(1, 23), (2, 46), (3, 69)]
    accuracy = lines[-1]["test_accuracy"]
    assert accuracy * 360 == pytest.approx(round(accuracy * 360), abs=1e-9)
    assert accuracy > 0.3
    assert right_by_hand(folder) == round(accuracy * 360)
    assert "starnet_s050: 385,002 parameters; data: scikit-learn digits\n" in output
    assert f"test accuracy {accuracy:.2%} after 3 epochs, " in output
    assert f"weights and plots in {folder}\n" in output
    for i, line in enumerate(lines, 1):
        shown = f"epoch {i}: train loss {line['train_loss']:.4f}, test accuracy "
        assert shown + f"{line['test_accuracy']:.2%}" in output
    assert {p.name for p in folder.iterdir()} == {
        *("config.json", "metrics.jsonl", "best.safetensors", "model.safetensors", "state"),
        *("curves.png", "confusion.png", "feature-maps.png"),
    }
    config = json.loads((folder / "config.json").read_text())
    assert (config["model"], config["data"], config["drop_path"]) == ("starnet_s050", "digits", 0.2)
    assert (config["path"], config["size"]) == (None, 64)
    assert (config["mixup"], config["ema"], config["seed"]) == (0.2, 0.9, 4)


def test_ctrl_c_finishes_the_step_and_tells_the_command_that_resumes(
    tmp_path, undisturbed, monkeypatch
):
    folder, save = tmp_path / "run", RunDir.save

    def save_and_interrupt(self, accelerator, step):
        save(self, accelerator, step)
        if step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "save", save_and_interrupt)
        output = run_here(*RECIPE, "--out", folder)
    assert output.endswith(
        f"stopped; go on with: python examples/vision_starnet.py --resume {folder}\n"
    )
    assert saved_step(folder) == 6
    assert not (folder / "model.safetensors").exists()
    run_here("--resume", folder)
    assert finished_numbers(folder) == finished_numbers(undisturbed[0])


def run_example(args: list[str], log: str) -> None:
    """Run the example in this process, a fork of one that has imported torch already."""
    with open(log, "a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    torch.set_num_threads(1)  # as the undisturbed run
    sys.argv = [str(EXAMPLE), *args]
    runpy.run_path(str(EXAMPLE), run_name="__main__")


def start(args: list[object], folder: Path):
    context = get_context("forkserver")
    # the imports take longer than the training
    context.set_forkserver_preload(["sklearn.datasets", "starlayers.commands.vision"])
    log = folder.with_suffix(".log")
    process = context.Process(target=run_example, args=([str(a) for a in args], str(log)))
    process.start()
    return process


def kill_at(args: list[object], folder: Path, condition) -> None:
    process = start(args, folder)
    wait_until(condition, process.is_alive)
    process.kill()
    process.join(PATIENCE_S)
    assert process.exitcode == -signal.SIGKILL


def resume_to_the_end(folder: Path) -> None:
    process = start(["--resume", folder], folder)
    process.join(PATIENCE_S)
    assert process.exitcode == 0, folder.with_suffix(".log").read_text()


# the seed draws the saved step after which the kill comes, and how long after it
@pytest.mark.parametrize(
    "seeds", [(0,), pytest.param((1, 2, 3, 4), marks=pytest.mark.slow)], ids=["once", "four_times"]
)
def test_kill_9_and_resume_give_the_undisturbed_run(tmp_path, undisturbed, seeds):
    folder = tmp_path / "run"
    args: list[object] = [*RECIPE, "--out", folder]
    reached = 0
    for n, seed in enumerate(seeds):
        draw = random.Random(seed)
        # repeated kills come one after the other, all of them before the end
        last = (STEPS - 10) * (n + 1) // len(seeds)
        step = draw.randint(min(reached + 1, last), last)
        pause = draw.uniform(0, 0.15)

        def late_enough(step=step, pause=pause):
            return saved_step(folder) >= step and not time.sleep(pause)

        kill_at(args, folder, late_enough)
        assert not (folder / "model.safetensors").exists()
        reached = saved_step(folder)
        assert step <= reached < STEPS
        args = ["--resume", folder]
    resume_to_the_end(folder)
    assert finished_numbers(folder) == finished_numbers(undisturbed[0])
    assert {p.name for p in (folder / "state").iterdir()} == {f"step_{STEPS:08d}"}


@pytest.mark.slow
def test_kill_9_before_the_first_state(tmp_path, undisturbed):
    folder = tmp_path / "run"
    kill_at([*RECIPE, "--out", folder], folder, (folder / "config.json").exists)
    assert saved_step(folder) == 0
    resume_to_the_end(folder)
    assert finished_numbers(folder) == finished_numbers(undisturbed[0])


@pytest.mark.slow
def test_kill_9_while_a_state_is_written(tmp_path, undisturbed):
    folder = tmp_path / "run"

    def writing():
        return list((folder / "state").glob("step_0000002?.partial/*"))

    kill_at([*RECIPE, "--out", folder], folder, writing)
    assert 15 <= saved_step(folder) < STEPS
    resume_to_the_end(folder)
    assert finished_numbers(folder) == finished_numbers(undisturbed[0])


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_reaches_the_workers_too(tmp_path, undisturbed):
    folder = tmp_path / "run"
    process = subprocess.Popen(
        # a worker, because the interrupt reaches it too
        command(*RECIPE, "--workers", 1, "--out", folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_until(lambda: saved_step(folder) >= 10, lambda: process.poll() is None)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of its processes
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err
    assert f"stopped; go on with: python examples/vision_starnet.py --resume {folder}\n" in out
    assert "test accuracy" not in out.splitlines()[-1]
    assert 10 <= saved_step(folder) < STEPS
    resume_to_the_end(folder)
    assert finished_numbers(folder) == finished_numbers(undisturbed[0])


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_share_one_run(tmp_path, accumulate):
    folder = tmp_path / "runs"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    args = [
        *("--data", "digits", "--epochs", "2", "--ema", "0.9", "--crop", "1", "--seed", "1"),
        *("--batch-size", str(32 // accumulate), "--accumulate", str(accumulate)),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    tmp_path.joinpath("runs").mkdir()
    done = subprocess.run(
        [*torchrun, "--nproc_per_node", "2", str(EXAMPLE), *args],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (run,) = folder.iterdir()  # one folder, named by the time
    lines, _ = finished_numbers(run)
    # 1437 images in batches of 32 on 2 processes: 22 steps an epoch, as with 64 on one
    assert [(line["epoch"], line["step"]) for line in lines] == [(1, 22), (2, 44)]
    for line in lines:
        right = line["test_accuracy"] * 360
        assert right == pytest.approx(round(right), abs=1e-9)
    assert right_by_hand(run) == round(lines[-1]["test_accuracy"] * 360)
    assert (run / "confusion.png").is_file()
    # the training accuracy counts the images of both processes
    seen = lines[-1]["train_accuracy"] * 22 * 64
    assert seen == pytest.approx(round(seen), abs=1e-2)
    assert len(re.findall(r"after 2 epochs", done.stdout)) == 1  # printed once, not per process


def right_by_hand(run: Path) -> int:
    """Count the test images (of 360) that the saved weights classify right."""
    from safetensors.torch import load_file

    from starlayers.datasets.images import load_images

    data = load_images("digits")
    model = build("starnet_s050", data).eval()
    model.load_state_dict(load_file(run / "model.safetensors"))
    images, labels = data.test.tensors
    with torch.inference_mode():
        logits = model((images / 255 - data.mean[0]) / data.std[0])
    return int((logits.argmax(1) == labels).sum())


def test_an_unknown_model_is_told_the_names(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--model", "starnet_s9", "--data", "digits"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert ended.value.code not in (0, None)
    message = capsys.readouterr().err
    assert "invalid choice: 'starnet_s9'" in message
    assert all(name in message for name in STARNETS)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_a_run_is_refused_and_kept(tmp_path):
    folder, empty = tmp_path / "run", tmp_path / "empty"
    RunDir(folder, {"epochs": 3})
    (folder / "model.safetensors").write_bytes(b"weights")
    empty.mkdir()

    def contents():
        return {p.name: p.read_bytes() for p in folder.iterdir()}

    before = contents()
    with pytest.raises(FileExistsError, match=f"{folder} already has a run"):
        train_command(["--data", "digits", "--out", str(folder)])
    with pytest.raises(FileNotFoundError, match=f"no run to resume in {empty}"):
        train_command(["--data", "digits", "--resume", str(empty)])
    assert contents() == before
    assert list(empty.iterdir()) == []


@pytest.mark.parametrize(
    ("side", "stem_stride", "kernel_size"), [(28, 1, 3), (95, 1, 3), (96, 2, 7)]
)
def test_small_images_get_smaller_strides_and_kernels(side, stem_stride, kernel_size):
    data = SimpleNamespace(shape=(1, side, side), classes=("a", "b", "c"))
    net = build("starnet_s050", data, 0.1)
    assert net.stem.conv.stride == (stem_stride, stem_stride)
    assert [stage[0].conv.stride[0] for stage in net.stages] == [2, 2, 2, 2]
    assert net.stages[0][1].pre.conv.kernel_size == (kernel_size, kernel_size)
    assert (net.in_chans, net.num_classes) == (1, 3)
    assert net.stages[-1][-1].drop_path.p == pytest.approx(0.1)
