"""The reinforcement-learning examples in their short form."""

import re
import runpy
import sys
from pathlib import Path

import imageio
import numpy as np
import pytest
import stable_baselines3
import typer
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

EXAMPLES = Path(__file__).parents[2] / "examples"
STORIES = ("rl_cartpole", "rl_pendulum_sac", "rl_pong", "rl_swap_trained")
FINAL_SEED = 2_000_000


@pytest.fixture(autouse=True)
def _own_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def example(name: str) -> dict:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def assert_written(folder: Path, printed: str, evaluations: int) -> None:
    assert f"in {folder}" in " ".join(printed.split())
    curve = np.load(folder / "evaluations.npz")
    assert len(curve["timesteps"]) == evaluations
    assert imageio.v3.imread(folder / "curve.png").std() > 0
    film = imageio.v3.imread(folder / "agent.gif")
    assert len(film) > 10
    assert not np.array_equal(film[0], film[10])


@pytest.mark.slow
def test_cartpole(tmp_path, capsys):
    main = example("rl_cartpole")["main"]
    mean = main(steps=1024, out=tmp_path / "run")
    printed = capsys.readouterr().out
    size = re.search(r"^star: ([\d,]+) parameters, 1,024 steps in ", printed, re.M)[1]
    mlp = PPO("MlpPolicy", "CartPole-v1").policy
    of_mlp = sum(p.numel() for p in mlp.parameters())
    assert int(size.replace(",", "")) == pytest.approx(of_mlp, rel=0.05)
    assert f"mean return of 20 new episodes {mean:.1f}" in printed
    assert_written(tmp_path / "run", printed, evaluations=5)

    # what was saved does what was measured, and a seed gives the same run again
    model = PPO.load(tmp_path / "run" / "model.zip")
    env = make_vec_env("CartPole-v1", 20, FINAL_SEED)
    assert evaluate_policy(model, env, 20)[0] == pytest.approx(mean)
    assert main(steps=1024, out=tmp_path / "again") == mean
    with pytest.raises(ValueError, match="unknown net 'stat'"):
        main(net="stat", out=tmp_path / "other")


def test_cartpole_stops_when_it_is_solved(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        stable_baselines3.common.callbacks,
        "evaluate_policy",
        lambda model, env, n_eval_episodes, **_: ([500.0] * n_eval_episodes,) * 2,
    )
    example("rl_cartpole")["main"](steps=5120, out=tmp_path / "run")
    printed = capsys.readouterr().out
    assert "1,024 steps" in printed
    assert_written(tmp_path / "run", printed, evaluations=1)


@pytest.mark.slow
def test_pendulum(tmp_path, capsys):
    main = example("rl_pendulum_sac")["main"]
    mean = main(steps=300, out=tmp_path / "run")
    printed = capsys.readouterr().out
    assert "product critic: 9,118 parameters, 300 steps" in printed
    assert f"mean return of 20 new episodes {mean:.1f}" in printed
    assert_written(tmp_path / "run", printed, evaluations=10)
    model = SAC.load(tmp_path / "run" / "model.zip")
    assert type(model.critic.qf0[0]).__name__ == "ProductTrunk"
    env = make_vec_env("Pendulum-v1", 20, FINAL_SEED)
    assert evaluate_policy(model, env, 20)[0] == pytest.approx(mean)
    mlp = SAC("MlpPolicy", "Pendulum-v1", policy_kwargs={"net_arch": [64, 64]}).critic
    assert sum(p.numel() for p in mlp.parameters()) == pytest.approx(9118, rel=0.01)


@pytest.mark.slow
def test_a_swap_in_training(tmp_path, capsys):
    main = example("rl_swap_trained")["main"]
    found = main(steps=2048, swap_at=1024, out=tmp_path / "run")
    printed = capsys.readouterr().out
    assert (found["logits"], found["values"]) == (0.0, 0.0)
    assert found["before"] == found["after"]
    assert "swapped after 1,024 steps, seed 0" in printed
    assert "moments of Adam kept: True" in printed
    assert "the same one by one: True" in printed
    assert_written(tmp_path / "run", printed, evaluations=25)

    # training went on: every gate has moved, and what was saved has them
    sizes = re.search(r"mean \|gate\| by now: (.*)", printed)[1].split(", ")
    assert len(sizes) == 4
    assert all(float(size.split()[1]) > 0 for size in sizes)
    loaded = PPO.load(tmp_path / "run" / "model.zip", device="cpu")
    mean, _ = evaluate_policy(loaded, make_vec_env("CartPole-v1", 20, FINAL_SEED), 20)
    assert mean == pytest.approx(found["final"])
    # an agent of one's own can be the start
    PPO("MlpPolicy", "CartPole-v1", n_steps=32, batch_size=32).save(tmp_path / "plain.zip")
    found = main(steps=2048, swap_at=512, model=tmp_path / "plain.zip", out=tmp_path / "own")
    assert found["logits"] == 0.0
    with pytest.raises(typer.BadParameter, match="swap_at=9, steps=9"):
        main(steps=9, swap_at=9)


@pytest.mark.slow
def test_pong(tmp_path, monkeypatch, capsys):
    story = example("rl_pong")
    played = []

    def few_steps(model, env, n_eval_episodes, **given):  # a game has thousands
        states = env.reset()
        actions, _ = model.predict(states, deterministic=True)
        played.append((states.shape, states.dtype, states.std(), env.step(actions)[1]))
        scores = [-20.0] * n_eval_episodes
        return (scores, [10] * n_eval_episodes) if given else (-20.0, 0.0)

    monkeypatch.setattr(stable_baselines3.common.callbacks, "evaluate_policy", few_steps)
    monkeypatch.setitem(story["main"].__globals__, "evaluate_policy", few_steps)
    assert story["main"](steps=1024, out=tmp_path / "run", device="cpu") == -20
    printed = capsys.readouterr().out
    assert "1,024 steps are a demonstration" in printed
    assert "mean score of 2 games -20.0 ± 0.0" in printed
    assert_written(tmp_path / "run", printed, evaluations=3)
    assert len(played) == 4
    for shape, dtype, deviation, _ in played:
        assert (shape, dtype) == ((2, 4, 84, 84), np.uint8)
        assert deviation > 10
    model = PPO.load(tmp_path / "run" / "model.zip", device="cpu")
    assert type(model.policy).__name__ == "StarPPOCnnPolicy"


def test_the_score_is_counted_raw_and_learnt_from_clipped():
    story = example("rl_pong")
    for raw in (False, True):
        env = story["games"](1, 0, raw=raw)
        assert env.observation_space.shape == (4, 84, 84)
        assert ("ClipReward" in str(env.unwrapped.envs[0])) is not raw
        env.close()


@pytest.mark.slow
def test_cartpole_is_solved(tmp_path):
    assert example("rl_cartpole")["main"](out=tmp_path) >= 490


@pytest.mark.slow
def test_the_pendulum_stands_up(tmp_path):
    assert example("rl_pendulum_sac")["main"](steps=3000, out=tmp_path) > -200


@pytest.mark.parametrize("name", STORIES)
def test_the_command_line(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert all(option in shown for option in ("--steps", "--seed", "--out"))
