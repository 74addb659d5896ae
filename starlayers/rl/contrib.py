"""Star policies for the algorithms of sb3-contrib, which need that package."""

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

from gymnasium import spaces
from sb3_contrib.ars.policies import ARSPolicy
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from sb3_contrib.common.torch_layers import BatchRenorm1d
from sb3_contrib.crossq import policies as crossq
from sb3_contrib.qrdqn import policies as qrdqn
from sb3_contrib.tqc import policies as tqc
from torch import nn

from starlayers.rl.actor_critic import OnPolicyActorCritic
from starlayers.rl.base import (
    LatentActor,
    OffPolicyActorCritic,
    StarCritics,
    StarNetwork,
    StarPolicy,
    image_and_dict,
    with_trunk,
)
from starlayers.rl.spec import DEFAULT, PRODUCT
from starlayers.rl.trunks import RESIDUAL, Norm

__all__ = [
    "StarARSPolicy",
    "StarCrossQPolicy",
    "StarMaskableCnnPolicy",
    "StarMaskableMultiInputPolicy",
    "StarMaskablePolicy",
    "StarQRDQNCnnPolicy",
    "StarQRDQNMultiInputPolicy",
    "StarQRDQNPolicy",
    "StarRecurrentCnnPolicy",
    "StarRecurrentMultiInputPolicy",
    "StarRecurrentPolicy",
    "StarTQCCnnPolicy",
    "StarTQCMultiInputPolicy",
    "StarTQCPolicy",
]


class StarMaskablePolicy(OnPolicyActorCritic, MaskableActorCriticPolicy):  # type: ignore[misc]
    """Star policy of MaskablePPO, with the options of `StarActorCriticPolicy`.

    Two plain star trunks of the same widths are one `StarStack`, as in `StarPPOPolicy`.

    Raises:
        TypeError, ValueError: an option of the wrong type, or out of range.

    Example:
        >>> from sb3_contrib import MaskablePPO
        >>> from sb3_contrib.common.envs import InvalidActionEnvDiscrete
        >>> env = InvalidActionEnvDiscrete(dim=4, n_invalid_actions=3)
        >>> model = MaskablePPO("StarMlpPolicy", env, policy_kwargs={"net_arch": [8]}, device="cpu")
        >>> mask = [False, False, True, False]  # one action is allowed
        >>> int(model.predict(env.reset()[0], action_masks=mask)[0])
        2
    """

    use_stack = True


class StarRecurrentPolicy(OnPolicyActorCritic, RecurrentActorCriticPolicy):  # type: ignore[misc]
    """Star policy of RecurrentPPO: star trunks behind its LSTMs.

    Options as for `StarActorCriticPolicy`, and those of sb3-contrib's policy for the LSTMs.

    Raises:
        TypeError, ValueError: an option of the wrong type, or out of range.

    Example:
        >>> from sb3_contrib import RecurrentPPO
        >>> kwargs = {"lstm_hidden_size": 16, "net_arch": [8]}
        >>> model = RecurrentPPO("StarMlpPolicy", "CartPole-v1", policy_kwargs=kwargs, device="cpu")
        >>> model.policy.lstm_actor, model.policy.mlp_extractor.policy_net.in_features
        (LSTM(4, 16), 16)
    """

    def _get_constructor_parameters(self) -> dict[str, Any]:
        # sb3-contrib saves none of these
        lstm = {
            "lstm_hidden_size": self.lstm_actor.hidden_size,
            "n_lstm_layers": self.lstm_actor.num_layers,
            "shared_lstm": self.shared_lstm,
            "enable_critic_lstm": self.enable_critic_lstm,
            "lstm_kwargs": self.lstm_kwargs,
        }
        return {**super()._get_constructor_parameters(), **lstm}


class StarTQCActor(LatentActor, tqc.Actor):  # type: ignore[misc]
    """Actor of TQC with a star trunk."""


class StarTQCCritic(StarCritics, tqc.Critic):
    """Quantile critics of TQC with star trunks."""


class StarTQCPolicy(OffPolicyActorCritic, tqc.TQCPolicy):
    """Star policy of TQC, with the options of `StarSACPolicy`.

    Raises:
        TypeError, ValueError: an option of the wrong type, or out of range.

    Example:
        >>> from sb3_contrib import TQC
        >>> kwargs = {"net": "product", "net_arch": [32], "n_quantiles": 5}
        >>> model = TQC("StarMlpPolicy", "Pendulum-v1", policy_kwargs=kwargs, device="cpu")
        >>> model.critic.qf0[1]
        Linear(in_features=32, out_features=5, bias=True)
    """

    actor_class, critic_class = StarTQCActor, StarTQCCritic


class RenormNetwork(StarNetwork):
    """Network of CrossQ, with a batch renormalisation before each linear layer.

    The layer has to be sb3-contrib's own: CrossQ switches between the statistics of the batch and
    the running ones by that class.
    """

    def renorm(self, kwargs: Mapping[str, Any]) -> Norm | None:
        if not kwargs.get("batch_norm", True):
            return None
        return partial(
            BatchRenorm1d,
            momentum=kwargs.get("batch_norm_momentum", 0.01),
            eps=kwargs.get("batch_norm_eps", 0.001),
            warmup_steps=kwargs.get("renorm_warmup_steps", 100_000),
        )


class StarCrossQActor(RenormNetwork, crossq.Actor):
    """Actor of CrossQ with a star trunk and batch renormalisations."""

    layers = "latent_pi"


class StarCrossQCritic(RenormNetwork, StarCritics, crossq.CrossQCritic):
    """Critics of CrossQ with star trunks and batch renormalisations."""


class StarCrossQPolicy(OffPolicyActorCritic, crossq.CrossQPolicy):
    """Star policy of CrossQ, with batch renormalisation before each layer.

    Options as for `StarSACPolicy`, without the product critic and the residual nets, which have
    norms of their own.

    Raises:
        TypeError, ValueError: an option of the wrong type, or out of range.

    Example:
        >>> from sb3_contrib import CrossQ
        >>> kwargs = {"net_arch": [32]}
        >>> model = CrossQ("StarMlpPolicy", "Pendulum-v1", policy_kwargs=kwargs, device="cpu")
        >>> [type(layer).__name__ for layer in model.critic.qf0[0]]
        ['BatchRenorm1d', 'PackedStar']
    """

    base_arch: ClassVar[Mapping[str, list[int]]] = {"pi": [256, 256], "qf": [1024, 1024]}
    actor_class, critic_class = StarCrossQActor, StarCrossQCritic

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        net = kwargs.get("net", "star")
        for name in [net] if isinstance(net, str) else net.values():
            if name in (PRODUCT, *RESIDUAL):
                raise ValueError(
                    f"{type(self).__name__}: net={name!r} has norms, and so has CrossQ; take "
                    "net='star', 'mlp' or 'd2rl'"
                )
        super().__init__(*args, **kwargs)


class StarQuantileNetwork(StarNetwork, qrdqn.QuantileNetwork):
    """Quantile network of QR-DQN with a star trunk."""

    layers = "quantile_net"


class StarQRDQNPolicy(StarPolicy, qrdqn.QRDQNPolicy):
    """Star policy of QR-DQN, with the options of `StarDQNPolicy`.

    Raises:
        TypeError, ValueError: an option of the wrong type, or out of range.

    Example:
        >>> from sb3_contrib import QRDQN
        >>> kwargs = {"net_arch": [8], "n_quantiles": 25}
        >>> model = QRDQN("StarMlpPolicy", "CartPole-v1", policy_kwargs=kwargs, device="cpu")
        >>> model.quantile_net.quantile_net[1]  # two actions, 25 quantiles each
        Linear(in_features=8, out_features=50, bias=True)
    """

    base_arch: ClassVar[Mapping[str, list[int]]] = {"q": [64, 64]}
    cnn_arch: ClassVar[Mapping[str, list[int]]] = {"q": []}

    def make_quantile_net(self) -> qrdqn.QuantileNetwork:
        kwargs = self._update_features_extractor(self.net_args, features_extractor=None)
        return StarQuantileNetwork(**kwargs, spec=self.specs["q"]).to(self.device)


class StarARSPolicy(StarPolicy, ARSPolicy):
    """Star policy of ARS, which searches over all parameters as one vector.

    Args:
        observation_space, action_space: as for ARS.
        net_arch, activation_fn, net, norm, width, depth: as for the other star policies.
        squash_output: True if continuous actions end in a tanh.

    Raises:
        TypeError, ValueError: an option of the wrong type, or out of range.

    Example:
        >>> from sb3_contrib import ARS
        >>> kwargs = {"net_arch": [8]}
        >>> model = ARS("StarMlpPolicy", "CartPole-v1", policy_kwargs=kwargs, device="cpu")
        >>> model.n_params == 2 * (4 + 1) * 8 + (8 + 1) * 2  # two branches, and two actions
        True
    """

    base_arch: ClassVar[Mapping[str, list[int]]] = {"pi": [64, 64]}

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        net_arch: list[int] | None = None,
        activation_fn: str | type[nn.Module] | None = DEFAULT,
        squash_output: bool = True,
        *,
        net: str = "star",
        norm: str | None = None,
        width: int | None = None,
        depth: int | None = None,
    ) -> None:
        options = {"net": net, "norm": norm, "activation_fn": activation_fn}
        layers = self._resolve(self.base_extractor, net_arch, width, depth, options)
        ARSPolicy.__init__(
            self, observation_space, action_space, squash_output=squash_output, **layers
        )
        if not self.specs["pi"].is_stock:
            trunk = self.specs["pi"].trunk(self.features_dim, self.net_arch)
            self.action_net = with_trunk(self.action_net, trunk, self.net_arch)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), "squash_output": self.squash_output}


StarMaskableCnnPolicy, StarMaskableMultiInputPolicy = image_and_dict(
    StarMaskablePolicy, "sb3_contrib.MaskablePPO"
)
StarRecurrentCnnPolicy, StarRecurrentMultiInputPolicy = image_and_dict(
    StarRecurrentPolicy, "sb3_contrib.RecurrentPPO"
)
StarTQCCnnPolicy, StarTQCMultiInputPolicy = image_and_dict(StarTQCPolicy, "sb3_contrib.TQC")
StarQRDQNCnnPolicy, StarQRDQNMultiInputPolicy = image_and_dict(StarQRDQNPolicy, "sb3_contrib.QRDQN")
