"""Star policies with an actor and a value: PPO, A2C, TRPO, and the hook for sb3-contrib's."""

from collections.abc import Mapping
from typing import Any, ClassVar

from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor, nn

from starlayers.rl.base import StarOptions
from starlayers.rl.extractors import StarCnnExtractor, StarCombinedExtractor
from starlayers.rl.spec import NetSpec
from starlayers.rl.stack import StarStack
from starlayers.rl.trunks import KeepsInit

__all__ = [
    "StarActorCriticCnnPolicy",
    "StarActorCriticMultiInputPolicy",
    "StarActorCriticPolicy",
    "StarMlpExtractor",
    "StarPPOCnnPolicy",
    "StarPPOMultiInputPolicy",
    "StarPPOPolicy",
]


class StarMlpExtractor(KeepsInit):
    """The trunks of an actor-critic policy, in the place of SB3's `MlpExtractor`.

    Shapes: (batch, features_dim) -> (batch, latent_dim_pi), (batch, latent_dim_vf).

    Args:
        features_dim: channels of the input.
        net_arch: widths for both sides, or `dict(pi=..., vf=...)`.
        specs: the spec of each side.
        share: one trunk for both.
        joint: two stars of one shape become one `StarStack`, and run in one pass.

    Raises:
        ValueError: `share` with different sides.

    Example:
        >>> spec = NetSpec("star", "tanh")
        >>> trunks = StarMlpExtractor(4, [32, 16], {"pi": spec, "vf": spec})
        >>> [tuple(y.shape) for y in trunks(torch.randn(2, 4))]
        [(2, 16), (2, 16)]
    """

    def __init__(
        self,
        features_dim: int,
        net_arch: Any,
        specs: Mapping[str, NetSpec],
        *,
        share: bool = False,
        joint: bool = False,
    ) -> None:
        super().__init__()
        arch = net_arch if isinstance(net_arch, dict) else {"pi": net_arch, "vf": net_arch}
        pi, vf = arch.get("pi", []), arch.get("vf", [])
        alike = pi == vf and specs["pi"] == specs["vf"]
        if share and not alike:
            raise ValueError(
                f"share_trunk=True needs equal sides, got pi {specs['pi'].net!r} {pi} and "
                f"vf {specs['vf'].net!r} {vf}"
            )
        self.share = share
        self.stack = None
        if joint and alike and not share and pi and specs["pi"].plain_star:
            self.stack = StarStack(2, features_dim, pi, act=specs["pi"].row)
            self.latent_dim_pi = self.latent_dim_vf = pi[-1]
            return
        # the names are SB3's: TRPO tells critics by "value" in a parameter's name
        self.policy_net = specs["pi"].trunk(features_dim, pi)
        self.latent_dim_pi = self.latent_dim_vf = self.policy_net.out_features
        if not share:
            self.value_net = specs["vf"].trunk(features_dim, vf)
            self.latent_dim_vf = self.value_net.out_features

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        if self.stack is not None:
            pi, vf = self.stack(features).unbind()
            return pi, vf
        latent = self.policy_net(features)
        return latent, latent if self.share else self.value_net(features)

    def forward_actor(self, features: Tensor) -> Tensor:
        if self.stack is not None:
            return self.stack(features, only=0)[0]  # type: ignore[no-any-return]
        return self.policy_net(features)  # type: ignore[no-any-return]

    def forward_critic(self, features: Tensor) -> Tensor:
        if self.stack is not None:
            return self.stack(features, only=1)[0]  # type: ignore[no-any-return]
        return (self.policy_net if self.share else self.value_net)(features)  # type: ignore


class ActorCriticOptions(StarOptions):
    """The hook of the actor-critic policies, over SB3's and over those of sb3-contrib."""

    #: whether both sides may be rows of the same parameter tensors
    joint: ClassVar[bool] = False

    sides = ("pi", "vf")
    base_arch: ClassVar[Mapping[str, list[int]]] = {"pi": [64, 64], "vf": [64, 64]}
    cnn_arch: ClassVar[Mapping[str, list[int]]] = {"pi": [], "vf": []}
    base_activation = nn.Tanh

    def __init__(self, *args: Any, share_trunk: bool = False, **kwargs: Any) -> None:
        self.share_trunk = share_trunk
        super().__init__(*args, **kwargs)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), "share_trunk": self.share_trunk}

    def _build_mlp_extractor(self) -> None:
        # a recurrent policy has its LSTM between the features and the trunks
        features: Any = getattr(self, "lstm_output_dim", None) or self.features_dim
        trunks = StarMlpExtractor(
            features,
            self.net_arch,
            self.specs,
            share=self.share_trunk,
            joint=self.joint and bool(self.share_features_extractor),
        )
        self.mlp_extractor: Any = trunks.to(self.device)


class StarActorCriticPolicy(ActorCriticOptions, ActorCriticPolicy):  # type: ignore[misc]
    """The star policy of TRPO, and of any algorithm over SB3's `ActorCriticPolicy`.

    Takes all arguments of SB3's policy; `net`, `norm`, `width`, `depth` and names for
    `activation_fn` come on top (docs/rl.md), and `share_trunk=True` for one trunk. Policy and value
    have parameter tensors of their own, as TRPO demands.

    Raises:
        TypeError, ValueError: an option out of range, naming it.

    Example:
        >>> from sb3_contrib import TRPO
        >>> model = TRPO("StarMlpPolicy", "CartPole-v1", policy_kwargs={"width": 32, "depth": 2})
        >>> model.policy.mlp_extractor.value_net[0].proj.out_features
        64
    """


class StarActorCriticCnnPolicy(StarActorCriticPolicy):
    """`StarActorCriticPolicy` for images, behind a `StarCnnExtractor`.

    Example:
        >>> StarActorCriticCnnPolicy.base_extractor.__name__
        'StarCnnExtractor'
    """

    base_extractor = StarCnnExtractor


class StarActorCriticMultiInputPolicy(StarActorCriticPolicy):
    """`StarActorCriticPolicy` for dictionaries, behind a `StarCombinedExtractor`.

    Example:
        >>> StarActorCriticMultiInputPolicy.base_extractor.__name__
        'StarCombinedExtractor'
    """

    base_extractor = StarCombinedExtractor


class StarPPOPolicy(StarActorCriticPolicy):
    """The star policy of PPO and A2C: `PPO("StarMlpPolicy", env, policy_kwargs=...)`.

    A `StarActorCriticPolicy` whose two trunks, where they are stars of one shape over shared
    features, are one `StarStack` and run in one pass. Not for TRPO, whose value updates spare
    every tensor that the actor uses.

    Raises:
        TypeError, ValueError: an option out of range, naming it.

    Example:
        >>> from stable_baselines3 import PPO
        >>> PPO("StarMlpPolicy", "CartPole-v1").policy.mlp_extractor.stack
        StarStack(2, 4, [44, 44], act='tanh')
    """

    joint = True


class StarPPOCnnPolicy(StarPPOPolicy):
    """`StarPPOPolicy` for images, behind a `StarCnnExtractor`.

    Example:
        >>> StarPPOCnnPolicy.base_extractor.__name__
        'StarCnnExtractor'
    """

    base_extractor = StarCnnExtractor


class StarPPOMultiInputPolicy(StarPPOPolicy):
    """`StarPPOPolicy` for dictionaries, behind a `StarCombinedExtractor`.

    Example:
        >>> StarPPOMultiInputPolicy.base_extractor.__name__
        'StarCombinedExtractor'
    """

    base_extractor = StarCombinedExtractor
