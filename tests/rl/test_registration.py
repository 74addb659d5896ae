"""Names of policies, with and without sb3-contrib, and what the package needs."""

import importlib.util
import pickle
import subprocess
import sys

import cloudpickle
import pytest
from sb3_contrib import ARS, QRDQN, TQC, TRPO, CrossQ, MaskablePPO, RecurrentPPO
from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.vec_env import DummyVecEnv

import starlayers.rl
from starlayers.rl import StarCnnExtractor, StarCombinedExtractor, contrib
from starlayers.rl.base import image_and_dict_policies
from starlayers.rl.registration import NAMES, _policies
from tests.rl.agents import Sampled, agent, algorithm

FLAT = {
    PPO: "StarPPOPolicy",
    A2C: "StarPPOPolicy",
    TRPO: "StarActorCriticPolicy",
    MaskablePPO: "StarMaskablePolicy",
    RecurrentPPO: "StarRecurrentPolicy",
    SAC: "StarSACPolicy",
    TD3: "StarTD3Policy",
    DDPG: "StarTD3Policy",
    TQC: "StarTQCPolicy",
    CrossQ: "StarCrossQPolicy",
    DQN: "StarDQNPolicy",
    QRDQN: "StarQRDQNPolicy",
    ARS: "StarARSPolicy",
}


def policy_class(name):
    return getattr(starlayers.rl, name, None) or getattr(contrib, name)


def test_names_are_pinned():
    assert NAMES == ("StarMlpPolicy", "StarCnnPolicy", "StarMultiInputPolicy")
    twins = [name for name in starlayers.rl.__all__ if "Cnn" in name or "MultiInput" in name]
    assert len([name for name in twins if name.endswith("Policy")]) == 10
    assert len(contrib.__all__) == 14


@pytest.mark.parametrize("algorithm", FLAT, ids=lambda a: a.__name__)
def test_every_algorithm_knows_its_policies_by_name(algorithm):
    flat = policy_class(FLAT[algorithm])
    assert algorithm.policy_aliases["StarMlpPolicy"] is flat
    # SB3's own names are still there
    assert {"MlpPolicy", "MlpLstmPolicy"} & set(algorithm.policy_aliases)
    if algorithm in (CrossQ, ARS):
        assert not {"StarCnnPolicy", "StarMultiInputPolicy"} & set(algorithm.policy_aliases)
        return
    for part, extractor in (("Cnn", StarCnnExtractor), ("MultiInput", StarCombinedExtractor)):
        name = f"{FLAT[algorithm].removesuffix('Policy')}{part}Policy"
        policy = algorithm.policy_aliases[f"Star{part}Policy"]
        assert policy is policy_class(name)
        assert issubclass(policy, flat)
        assert policy.base_extractor is extractor
        # as a class of its own file: pickle and SB3's zip files refer to it by name
        assert (policy.__name__, policy.__qualname__) == (name, name)
        assert policy.__module__ == flat.__module__
        for dumps in (pickle.dumps, cloudpickle.dumps):
            assert pickle.loads(dumps(policy)) is policy
            assert name.encode() in dumps(policy)
        assert policy.__doc__.splitlines()[0].endswith(f"behind a `{extractor.__name__}`.")
        assert f'("Star{part}Policy", env' in policy.__doc__


def test_the_classes_of_a_users_own_policy():
    class StarMinePolicy(starlayers.rl.StarPPOPolicy):
        pass

    images, dictionaries = image_and_dict_policies(StarMinePolicy, "mine.PPO", replay=True)
    assert [p.__name__ for p in (images, dictionaries)] == [
        "StarMineCnnPolicy",
        "StarMineMultiInputPolicy",
    ]
    assert images.__module__ == __name__
    assert "from mine import PPO\n" in images.__doc__
    assert "discrete=True" in images.__doc__
    assert "buffer_size=100, " in dictionaries.__doc__
    (other, _) = image_and_dict_policies(StarMinePolicy, "mine.PPO", discrete=False)
    assert "discrete=False" in other.__doc__
    assert "buffer_size" not in other.__doc__


def test_each_algorithm_has_a_table_of_its_own():
    tables = [algorithm.policy_aliases for algorithm in FLAT]
    assert len({id(table) for table in tables}) == len(tables) == 13


def test_without_contrib_sb3_has_all_of_its_names(monkeypatch):
    spec = importlib.util.find_spec
    monkeypatch.setattr(
        "starlayers.rl.registration.find_spec",
        lambda name: None if "contrib" in name else spec(name),
    )
    assert set(_policies()) == {PPO, A2C, SAC, TD3, DDPG, DQN}


def test_stable_baselines3_is_all_that_it_needs():
    code = """
import sys
for name in ("einops", "sb3_contrib", "ale_py", "imageio", "rich", "tqdm", "typer", "cv2"):
    sys.modules[name] = None
sys.modules["stable_baselines3"] = None
try:
    import starlayers.rl
except ImportError as error:
    print(error)
del sys.modules["stable_baselines3"]
import starlayers.rl
from stable_baselines3 import PPO
print(PPO("StarMlpPolicy", "CartPole-v1", device="cpu").policy.mlp_extractor.stack)
print([m for m in sys.modules if m.startswith(("starlayers.vision", "starlayers.nlp"))])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "starlayers.rl needs stable_baselines3: pip install 'starlayers[rl]'",
        "StarStack(2, 4, [44, 44], act='tanh')",
        "[]",
    ], done.stderr


def test_names_are_each_algorithms_own():
    assert TD3.policy_aliases is not algorithm("DDPG").policy_aliases
    assert {"MlpPolicy", "StarMlpPolicy"} <= set(DQN.policy_aliases) & set(SAC.policy_aliases)
    assert "StarCnnPolicy" not in algorithm("CrossQ").policy_aliases
    assert isinstance(
        agent("PPO", env=DummyVecEnv([Sampled])).policy, PPO.policy_aliases["MlpPolicy"]
    )
