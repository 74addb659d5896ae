"""The loop over experts, and which loops of classes it can replace."""

import pytest
import torch
import torch.nn.functional as F
from transformers.integrations import use_experts_implementation
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from starlayers import starify
from starlayers.surgery import experts_loop as module
from starlayers.surgery.experts_loop import loop_over_experts, verify_loop
from tests.surgery.moe import MoE, causal, experts_of


@pytest.fixture
def experts():
    return experts_of(causal("Mixtral", num_hidden_layers=1))[0]


def test_the_formula(experts):
    x = torch.randn(5, 16)
    index = torch.tensor([[0, 1], [3, 2], [1, 1], [4, 0], [4, 4]])  # 4 stands for no expert
    weights = torch.rand(5, 2)
    expected = torch.zeros(5, 16)
    for token in range(5):
        for choice in range(2):
            e = int(index[token, choice])
            if e < 4:
                gate, up = (experts.gate_up_proj[e] @ x[token]).chunk(2)
                y = experts.down_proj[e] @ (F.silu(gate) * up)
                expected[token] += weights[token, choice] * y
    torch.testing.assert_close(loop_over_experts(experts, x, index, weights), expected)


def test_no_tokens(experts):
    y = loop_over_experts(
        experts, torch.ones(0, 16), torch.ones(0, 2, dtype=torch.long), torch.ones(0, 2)
    )
    assert y.shape == (0, 16)


def test_the_loop_of_the_interface_is_replaced(experts):
    assert verify_loop(experts) == module.Loop("", ("act_fn",))
    assert verify_loop(experts.to("meta")) == module.Loop("", ("act_fn",))


def variant(change, **attributes):
    """Experts whose class has a loop of its own; its options are set when it is made."""

    class Mine(MixtralExperts):
        def forward(self, hidden_states, top_k_index, top_k_weights):
            own = MixtralExperts.forward.__wrapped__
            return change(self, own, hidden_states, top_k_index, top_k_weights)

    kind = use_experts_implementation(Mine)
    found = kind(causal("Mixtral", num_hidden_layers=1).config)
    for name, value in attributes.items():
        setattr(found, name, value)
    for parameter in found.parameters():
        torch.nn.init.normal_(parameter)
    return found


def doubled(self, own, x, index, weights):
    return 2 * own(self, x, index, weights)


def scaled(self, own, x, index, weights):
    return own(self, x, index, weights) * self.scale


def in_training(self, own, x, index, weights):
    return own(self, x, index, weights * 2 if self.training else weights)


def in_float32(self, own, x, index, weights):
    return own(self, x.float(), index, weights).to(x.dtype)


def frozen(self, own, x, index, weights):
    return own(self, x, index, weights.detach())


def fails(self, own, x, index, weights):
    raise RuntimeError("not here\nor there")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (doubled, "the loop of its class computes other bits"),
        (scaled, "the loop of its class reads 'scale'"),
        (in_training, "the loop of its class computes other bits"),
        (in_float32, "the loop of its class cannot be tried: RuntimeError "),
        (frozen, "the loop of its class cannot be tried: RuntimeError "),
        (fails, "the loop of its class cannot be tried: RuntimeError not here"),
    ],
)
def test_other_loops_are_kept(change, reason):
    found = variant(change, scale=1.0)
    assert verify_loop(found).reason.startswith(reason)
    assert not verify_loop(found).reason.endswith("there")
    starify(MoE(found), mode="fuse")
    assert found.star.loop.startswith(reason)


def test_a_loop_that_calls_the_gate_is_kept():
    assert verify_loop(experts_of(causal("GptOss"))[0]).reason.endswith("calls the gate")


def test_choices_of_no_expert_are_compared_where_the_class_knows_them(experts):
    def own(self, x, index, weights):
        """Gives such tokens to the first expert."""
        return loop_over_experts(self, x, torch.where(index == 4, 0, index), weights)

    def strict(self, x, index, weights):
        F.one_hot(index, 4)
        return loop_over_experts(self, x, index, weights)

    def never(self, x, index, weights):
        raise RuntimeError("never")

    stand_in = module._stand_in(experts, torch.float32)
    assert not module._same_bits(stand_in, own, torch.float32)
    assert module._same_bits(stand_in, strict, torch.float32)
    with pytest.raises(RuntimeError, match="never"):
        module._same_bits(stand_in, never, torch.float32)


def test_biases(experts):
    experts.has_bias = True
    assert verify_loop(experts).reason == "the loop of its class has biases"


def test_a_class_without_the_decorator(experts):
    class Plain(torch.nn.Module):
        def forward(self, x):
            return x

    assert verify_loop(Plain()).reason == "the loop of its class calls the gate"
