"""Star policies for stable-baselines3 (`pip install 'starlayers[rl]'`).

Importing it registers "StarMlpPolicy", "StarCnnPolicy" and "StarMultiInputPolicy" as policies of
every algorithm of stable-baselines3, and of sb3-contrib where that is installed.
"""

try:
    import stable_baselines3 as _sb3  # noqa: F401
except ImportError as error:
    raise ImportError(f"starlayers.rl needs {error.name}: pip install 'starlayers[rl]'") from error

from starlayers.rl.actor_critic import (
    StarActorCriticCnnPolicy,
    StarActorCriticMultiInputPolicy,
    StarActorCriticPolicy,
    StarPPOCnnPolicy,
    StarPPOMultiInputPolicy,
    StarPPOPolicy,
)
from starlayers.rl.critics import ProductTerm, ProductTrunk
from starlayers.rl.describe import Description, describe
from starlayers.rl.export import export_onnx
from starlayers.rl.extractors import StarCnnExtractor, StarCombinedExtractor, StarExtractor
from starlayers.rl.inspect import Network
from starlayers.rl.off_policy import (
    StarDQNCnnPolicy,
    StarDQNMultiInputPolicy,
    StarDQNPolicy,
    StarSACCnnPolicy,
    StarSACMultiInputPolicy,
    StarSACPolicy,
    StarTD3CnnPolicy,
    StarTD3MultiInputPolicy,
    StarTD3Policy,
)
from starlayers.rl.registration import register as _register
from starlayers.rl.surgery import revert, starified, starify
from starlayers.rl.trunks import NETS

__all__ = [
    "NETS",
    "Description",
    "Network",
    "ProductTerm",
    "ProductTrunk",
    "StarActorCriticCnnPolicy",
    "StarActorCriticMultiInputPolicy",
    "StarActorCriticPolicy",
    "StarCnnExtractor",
    "StarCombinedExtractor",
    "StarDQNCnnPolicy",
    "StarDQNMultiInputPolicy",
    "StarDQNPolicy",
    "StarExtractor",
    "StarPPOCnnPolicy",
    "StarPPOMultiInputPolicy",
    "StarPPOPolicy",
    "StarSACCnnPolicy",
    "StarSACMultiInputPolicy",
    "StarSACPolicy",
    "StarTD3CnnPolicy",
    "StarTD3MultiInputPolicy",
    "StarTD3Policy",
    "describe",
    "export_onnx",
    "revert",
    "starified",
    "starify",
]

_register()
