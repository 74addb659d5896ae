"""Wrong arguments of every room are refused with the user's own numbers and a remedy."""

import optuna
import pytest
from stable_baselines3 import PPO, SAC
from torch import nn

import starlayers.rl  # noqa: F401, enters the policies by name
from starlayers.coefficients import search
from starlayers.datasets.images import load_images
from starlayers.datasets.tables import load_table
from starlayers.nlp import StarformerConfig, StarformerSeq2SeqConfig
from starlayers.vision.training import TrainConfig, train


def classify(outputs=10, run_dir=None):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, outputs))
    return train(net, load_images("digits"), TrainConfig(epochs=1), run_dir, progress=False)


def train_config(**options):
    return lambda: TrainConfig(**options)


def starformer(**options):
    return lambda: StarformerConfig(**options)


def agent(algorithm, env, **kwargs):
    return lambda: algorithm("StarMlpPolicy", env, policy_kwargs=kwargs, device="cpu")


def searched(asked=None, **options):
    def objective(trial):
        return trial.params["a"] if asked is None else trial.suggest_float(asked, 0, 1)

    return lambda: search(objective, trials=2, progress=False, **options)


SPACE = {"a": optuna.distributions.FloatDistribution(0, 1)}
REFUSED = {
    "5 classes of 10": (
        lambda: classify(5),
        ValueError,
        r"\(128, 5\) .* 10 classes.*num_classes=10",
    ),
    "20 classes of 10": (lambda: classify(20), ValueError, r"\(128, 20\) .* 10 classes"),
    "path as run_dir": (lambda: classify(run_dir="runs/x"), TypeError, r"RunDir\('runs/x', vars"),
    "half an epoch": (train_config(epochs=1.5), TypeError, "epochs must be an integer, got 1.5"),
    "no epoch": (train_config(epochs=0), ValueError, "epochs must be at least 1, got 0"),
    "half an image": (train_config(batch_size=2.5), TypeError, "batch_size .*integer, got 2.5"),
    "half a seed": (train_config(seed=1.5), TypeError, "seed must be an integer, got 1.5"),
    "true workers": (train_config(workers=True), TypeError, "workers .*integer, got True"),
    "a rate in words": (train_config(lr="fast"), TypeError, "lr must be a number, got 'fast'"),
    "amp in words": (train_config(amp="no"), TypeError, "amp must be True or False, got 'no'"),
    "search from seed -1": (searched(seed=-1), ValueError, "seed must be at least 0, got -1"),
    "first outside of a space": (
        searched(space=SPACE, first={"zzz": 3}),
        ValueError,
        r"first names \['zzz'\], which are not in the space: \['a'\]",
    ),
    "first that none asks for": (
        searched("a", first={"a": 0.5, "zzz": 3}),
        ValueError,
        r"first names \['zzz'\], which no trial asks for",
    ),
    "unknown hidden_act": (starformer(hidden_act="sillu"), ValueError, "hidden_act: .*'sillu'"),
    "unknown gate": (starformer(attention_gate_act="x"), ValueError, "attention_gate_act: .*'x'"),
    "unknown conv_act": (
        lambda: StarformerSeq2SeqConfig(conv_act="x"),
        ValueError,
        "Seq2SeqConfig: conv_act: .*'x'",
    ),
    "negative layer": (
        agent(SAC, "Pendulum-v1", net_arch=[-3]),
        ValueError,
        r"StarSACPolicy: net_arch\[0\] must be at least 1, got -3",
    ),
    "negative layer of one side": (
        agent(SAC, "Pendulum-v1", net_arch={"pi": [8], "qf": [8, -3]}),
        ValueError,
        r"net_arch\[1\] .*got -3",
    ),
    "half a unit": (agent(PPO, "CartPole-v1", net_arch=[8.5]), TypeError, "integer, got 8.5"),
    "unknown activation_fn": (
        agent(PPO, "CartPole-v1", activation_fn="rellu"),
        ValueError,
        "unknown activation 'rellu'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_arguments_are_refused(case):
    call, error, words = REFUSED[case]
    with pytest.raises(error, match=words):
        call()


def test_activation_fn_may_be_a_name():
    policy = agent(PPO, "CartPole-v1", activation_fn="relu")().policy
    assert policy.mlp_extractor.stack.act == "relu"


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_a_table_that_is_not_utf8_is_named(tmp_path, name):
    rows = {"a.csv": "text,label\ncafé,1\n", "a.jsonl": '{"text": "café", "label": 1}\n'}
    (tmp_path / name).write_bytes(rows[name].encode("latin-1"))
    with pytest.raises(ValueError, match=f"{name} cannot be read: .*must be UTF-8"):
        load_table(path=tmp_path / name, target="label")
    assert (tmp_path / name).read_bytes() == rows[name].encode("latin-1")


def test_first_is_what_the_first_trial_takes():
    result = searched(space=SPACE, first={"a": 0.25})()
    assert result.study.trials[0].params == {"a": 0.25}
