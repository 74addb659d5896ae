"""Star policies with an actor and a value network: PPO, A2C and TRPO."""

from collections.abc import Mapping
from typing import Any, ClassVar

from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor, nn

from starlayers.rl.base import StarPolicy, image_and_dict
from starlayers.rl.spec import NetSpec
from starlayers.rl.stack import StarStack
from starlayers.rl.trunks import KeepsInit, activation_name


class StarMlpExtractor(KeepsInit):
    """Trunks of policy and value, in the place of SB3's `MlpExtractor`.

    Shapes: (batch, features_dim) -> (batch, latent_dim_pi), (batch, latent_dim_vf).

    Args:
        features_dim: channels of the input.
        net_arch: widths for both sides, or `dict(pi=..., vf=...)`.
        specs: the spec of each side, "pi" and "vf".
        share: one trunk for both sides.
        use_stack: compute two plain star trunks of the same widths as one `StarStack`.
    """

    def __init__(
        self,
        features_dim: int,
        net_arch: Any,
        specs: Mapping[str, NetSpec],
        *,
        share: bool = False,
        use_stack: bool = False,
    ) -> None:
        super().__init__()
        arch = net_arch if isinstance(net_arch, dict) else {"pi": net_arch, "vf": net_arch}
        pi, vf = arch.get("pi", []), arch.get("vf", [])
        equal = pi == vf and specs["pi"] == specs["vf"]
        if share and not equal:
            raise ValueError(
                f"share_trunk=True needs equal sides, got pi {specs['pi'].net!r} {pi} and "
                f"vf {specs['vf'].net!r} {vf}"
            )
        self.share = share
        self.stack = None
        if use_stack and equal and not share and pi and specs["pi"].is_plain_star:
            self.stack = StarStack(2, features_dim, pi, act=activation_name(specs["pi"].act))
            self.latent_dim_pi = self.latent_dim_vf = pi[-1]
            return
        # names as in SB3: TRPO tells the critic's parameters by "value" in their names
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


class OnPolicyActorCritic(StarPolicy):
    """Star options of on-policy algorithms, over an actor-critic policy of SB3."""

    #: True if policy and value may be slices of the same parameter tensors
    use_stack: ClassVar[bool] = False

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
        features_dim: Any = getattr(self, "lstm_output_dim", None) or self.features_dim
        trunks = StarMlpExtractor(
            features_dim,
            self.net_arch,
            self.specs,
            share=self.share_trunk,
            use_stack=self.use_stack and bool(self.share_features_extractor),
        )
        self.mlp_extractor: Any = trunks.to(self.device)


class StarActorCriticPolicy(OnPolicyActorCritic, ActorCriticPolicy):  # type: ignore[misc]
    """Star policy of TRPO, and of any algorithm over SB3's `ActorCriticPolicy`.

    It takes all arguments of SB3's policy, and in addition `net`, `norm`, `width`, `depth`, names
    for `activation_fn` (docs/rl.md), and `share_trunk=True` for one trunk. Policy and value have
    separate parameter tensors, as TRPO needs.

    Raises:
        TypeError, ValueError: an option of the wrong type, or out of range.

    Example:
        >>> from sb3_contrib import TRPO
        >>> kwargs = {"width": 32, "depth": 2}
        >>> model = TRPO("StarMlpPolicy", "CartPole-v1", policy_kwargs=kwargs, device="cpu")
        >>> model.policy.mlp_extractor.value_net[0]
        PackedStar(
          4, 32, act='tanh', offset=1.0, packed=True
          (f12): Linear(in_features=4, out_features=64, bias=True)
        )
    """


class StarPPOPolicy(StarActorCriticPolicy):
    """Star policy of PPO and A2C: `PPO("StarMlpPolicy", env, policy_kwargs=...)`.

    `StarActorCriticPolicy` with one difference: two plain star trunks of the same widths over
    shared features are one `StarStack` and run in one pass. Not for TRPO, whose value updates leave
    out every tensor that the actor uses.

    Raises:
        TypeError, ValueError: an option of the wrong type, or out of range.

    Example:
        >>> from stable_baselines3 import PPO
        >>> model = PPO("StarMlpPolicy", "CartPole-v1", device="cpu")
        >>> model.policy.mlp_extractor.stack
        StarStack(2, 4, [44, 44], act='tanh')
    """

    use_stack = True


StarActorCriticCnnPolicy, StarActorCriticMultiInputPolicy = image_and_dict(
    StarActorCriticPolicy, "sb3_contrib.TRPO"
)
StarPPOCnnPolicy, StarPPOMultiInputPolicy = image_and_dict(StarPPOPolicy, "stable_baselines3.PPO")
