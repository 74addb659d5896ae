"""Names of policies, with and without sb3-contrib, and the extra that is named."""

import importlib.util
import subprocess
import sys

import pytest
from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3

from starlayers.rl.registration import NAMES, _policies


def test_without_contrib_sb3_has_all_of_its_names(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "starlayers.rl.registration.find_spec", lambda name: None if "contrib" in name else found(name)
    )
    assert set(_policies()) == {PPO, A2C, SAC, TD3, DDPG, DQN}


def test_with_contrib_thirteen_algorithms_have_names():
    table = _policies()
    assert len(table) == 13
    for algorithm, classes in table.items():
        known = [algorithm.policy_aliases[name] for name in NAMES[: len(classes)]]
        assert known == list(classes)
        # SB3's own names are still there
        assert (
            "MlpPolicy" in algorithm.policy_aliases or "MlpLstmPolicy" in algorithm.policy_aliases
        )


@pytest.mark.parametrize("missing", ["stable_baselines3", "einops"])
def test_the_extra_is_named_where_a_package_is_missing(missing):
    code = f"import sys; sys.modules['{missing}'] = None; import starlayers.rl"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    words = f"ImportError: starlayers.rl needs {missing}: pip install 'starlayers[rl]'"
    assert words in done.stderr
