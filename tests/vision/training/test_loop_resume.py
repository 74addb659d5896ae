"""Resumed runs against undisturbed ones."""

import os
import signal

import pytest
import torch

from starlayers.vision.training import TrainConfig, train
from starlayers.vision.training.rundir import RunDir

from .util import (
    RECIPE,
    assert_same_run,
    call_at_step,
    numbers,
    run,
    tiny_data,
    tiny_model,
    weights,
)

STEPS = 15  # three epochs of five


class Crash(Exception):
    pass


def crash():
    raise Crash


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Function from a recipe to (result, folder) of a whole run, each trained once."""
    done = {}

    def get(**recipe):
        key = tuple(recipe.items())
        if key not in done:
            folder = tmp_path_factory.mktemp("undisturbed") / "run"
            done[key] = run(folder, **recipe), folder
        return done[key]

    return get


def states(folder):
    return sorted(int(p.name.split("_")[1]) for p in (folder / "state").iterdir())


# 2 saves a state anyway, 5 ends an epoch, 6 begins one
@pytest.mark.parametrize(
    "step", [2, 5, 6, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3, 9, 10, 14))]
)
def test_an_interrupted_run_goes_on_to_the_same_numbers(tmp_path, undisturbed, step):
    handler = signal.getsignal(signal.SIGINT)
    stopped = run(tmp_path / "run", model=call_at_step(tiny_model(), step, interrupt))
    assert signal.getsignal(signal.SIGINT) is handler
    assert not stopped.finished
    assert len(stopped.history) == step // 5  # an interrupt in the last step ends the epoch
    assert states(tmp_path / "run") == [step]
    assert not (tmp_path / "run" / "model.safetensors").exists()
    model = tiny_model(seed=99)  # the state brings the weights
    resumed = run(tmp_path / "run", model=model, resume=True)
    assert signal.getsignal(signal.SIGINT) is handler
    want, folder = undisturbed()
    assert_same_run(resumed, want, tmp_path / "run", folder)
    assert states(tmp_path / "run") == [STEPS]
    assert numbers(resumed.history)[: step // 5] == numbers(stopped.history)


def test_an_interrupt_in_the_very_last_step_finishes_the_run(tmp_path, undisturbed):
    result = run(tmp_path / "run", model=call_at_step(tiny_model(), STEPS, interrupt))
    assert_same_run(result, undisturbed()[0], tmp_path / "run", undisturbed()[1])


def test_an_interrupt_while_validating_ends_after_the_epoch(tmp_path, undisturbed):
    model, calls = tiny_model(), []

    def hook(module, *_):
        if not module.training and not calls:
            calls.append(1)
            interrupt()

    model.register_forward_hook(hook)
    stopped = run(tmp_path / "run", model=model)
    assert (stopped.finished, len(stopped.history), states(tmp_path / "run")) == (False, 1, [5])
    resumed = run(tmp_path / "run", resume=True)
    assert_same_run(resumed, undisturbed()[0], tmp_path / "run", undisturbed()[1])


def test_a_second_interrupt_stops_at_once(tmp_path, undisturbed):
    def twice():
        interrupt()
        interrupt()

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", model=call_at_step(tiny_model(), 8, twice))
    assert signal.getsignal(signal.SIGINT) is handler
    resumed = run(tmp_path / "run", resume=True)
    assert_same_run(resumed, undisturbed()[0], tmp_path / "run", undisturbed()[1])


@pytest.mark.parametrize(
    ("step", "saved"),
    [
        (1, []),
        (4, [2]),
        (6, [5]),
        pytest.param(8, [6], marks=pytest.mark.slow),
        pytest.param(11, [10], marks=pytest.mark.slow),
    ],
)
def test_a_crash_loses_only_what_came_after_the_last_state(tmp_path, undisturbed, step, saved):
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(Crash):
        run(tmp_path / "run", model=call_at_step(tiny_model(), step, crash))
    assert signal.getsignal(signal.SIGINT) is handler
    assert (states(tmp_path / "run") if saved else []) == saved
    # without a state the caller's weights count, as in the example, which seeds them
    resumed = run(tmp_path / "run", model=tiny_model(0 if not saved else 99), resume=True)
    assert_same_run(resumed, undisturbed()[0], tmp_path / "run", undisturbed()[1])


def test_stopped_again_and_again(tmp_path, undisturbed):
    folder = tmp_path / "run"
    for i, (step, action) in enumerate(
        [(3, interrupt), (2, crash), (4, interrupt), (3, interrupt)]
    ):
        model = call_at_step(tiny_model(i), step, action)
        try:
            assert not run(folder, model=model, resume=i > 0).finished
        except Crash:
            assert action is crash
    resumed = run(folder, model=tiny_model(9), resume=True)
    assert_same_run(resumed, undisturbed()[0], folder, undisturbed()[1])


ONECYCLE = {"schedule": "onecycle", "warmup": 0.3}
OTHER_RECIPES = [({"workers": 1, "amp": True}, 3), ({**ONECYCLE, "ema": 0.0}, 7)]
ONE_BY_ONE = [({"workers": 1}, 7), ({"amp": True}, 7), (ONECYCLE, 3), ({"ema": 0.0}, 3)]


@pytest.mark.parametrize(
    ("recipe", "step"),
    OTHER_RECIPES + [pytest.param(*case, marks=pytest.mark.slow) for case in ONE_BY_ONE],
    ids=str,
)
def test_other_recipes_resume_too(tmp_path, undisturbed, recipe, step):
    stopped = run(tmp_path / "run", model=call_at_step(tiny_model(), step, interrupt), **recipe)
    assert not stopped.finished
    resumed = run(tmp_path / "run", model=tiny_model(99), resume=True, **recipe)
    assert_same_run(resumed, undisturbed(**recipe)[0], tmp_path / "run", undisturbed(**recipe)[1])


def test_metrics_written_before_a_lost_state_are_not_doubled(tmp_path, undisturbed, monkeypatch):
    save = RunDir.save

    def no_state_at_the_end_of_epoch_two(self, accelerator, step):
        if step == 10:
            raise Crash
        save(self, accelerator, step)

    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "save", no_state_at_the_end_of_epoch_two)
        with pytest.raises(Crash):
            run(tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert (len(lines), states(tmp_path / "run")) == (2, [8])
    resumed = run(tmp_path / "run", resume=True)
    assert_same_run(resumed, undisturbed()[0], tmp_path / "run", undisturbed()[1])
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_kill_between_the_last_state_and_the_weights(tmp_path, undisturbed, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "finish", lambda *_: crash())
        with pytest.raises(Crash):
            run(tmp_path / "run")
    assert states(tmp_path / "run") == [STEPS]
    resumed = run(tmp_path / "run", resume=True)
    want, folder = undisturbed()
    assert numbers(resumed.history) == numbers(want.history)
    saved, wanted = weights(tmp_path / "run"), weights(folder)
    assert all(torch.equal(saved[k], wanted[k]) for k in wanted)
    assert (tmp_path / "run" / "curves.png").is_file()
    assert (tmp_path / "run" / "confusion.png").is_file()
    assert torch.equal(resumed.confusion, want.confusion)


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    first = run(tmp_path / "run")
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    again = run(tmp_path / "run", model=tiny_model(99), resume=True)
    assert again.finished
    assert again.history == first.history  # with its seconds
    assert again.test_accuracy == first.test_accuracy
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before


def test_seconds_go_on_counting(tmp_path):
    stopped = run(tmp_path / "run", model=call_at_step(tiny_model(), 7, interrupt))
    resumed = run(tmp_path / "run", resume=True)
    assert resumed.seconds > stopped.seconds > 0
    counted = [h["seconds"] for h in resumed.history]
    assert counted == sorted(counted)


def test_without_a_folder_nothing_is_written_and_an_interrupt_still_stops(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = train(
        call_at_step(tiny_model(), 7, interrupt), tiny_data(), TrainConfig(**RECIPE), progress=False
    )
    assert (result.finished, len(result.history)) == (False, 1)
    assert list(tmp_path.iterdir()) == []
