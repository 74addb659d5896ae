"""Layers of Starformer against their formulas, and every dropout field."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from starlayers import ACTIVATIONS, StarBlock, StarMLP, nlp, use_backend
from starlayers.nlp import StarConv, StarformerEncoderModel, StarformerForCausalLM
from starlayers.nlp.layers_starformer import (
    PlainMLP,
    StarformerAttention,
    StarformerLayer,
    StarformerRotaryEmbedding,
    make_mlp,
)
from tests.helpers import FORMULAS
from tests.nlp.tiny import (
    SIZES,
    VARIANTS,
    config,
    decoder,
    encoder_config,
    ids,
    seq2seq,
    seq2seq_config,
)


def test_norm_is_the_formula_and_torchs():
    torch.manual_seed(0)
    x = torch.randn(3, 5, 16)
    norm = decoder(hidden_size=16, head_dim=4, rms_norm_eps=1e-3).model.norm
    torch.nn.init.normal_(norm.weight)
    torch.testing.assert_close(norm(x), F.rms_norm(x, (16,), norm.weight, 1e-3))
    # rounded before the product with the weight, as in Llama
    norm, x = norm.bfloat16(), x.bfloat16()
    rounded = F.rms_norm(x.float(), (16,), None, 1e-3).bfloat16()
    torch.testing.assert_close(norm(x), norm.weight * rounded, atol=0, rtol=0)


def test_rotary_angles():
    options = {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}
    positions = torch.tensor([[0, 1, 7], [3, 4, 5]])
    rotary = StarformerRotaryEmbedding(config(**options))
    cos, sin = rotary(torch.ones(1), positions)
    angles = positions[..., None] * torch.tensor([100.0 ** (-2 * i / 8) for i in range(4)])
    torch.testing.assert_close(cos, angles.cos().repeat(1, 1, 2))
    torch.testing.assert_close(sin, angles.sin().repeat(1, 1, 2))
    assert [t.dtype for t in rotary(torch.ones(1).half(), positions)] == [torch.float16] * 2


def rotate(t, cos, sin):
    """One head of one token: channel i with channel i + 4."""
    a, b = t[:4], t[4:]
    return torch.cat((a * cos[:4] - b * sin[:4], b * cos[4:] + a * sin[4:]))


def attention_formula(attention, x, rotation, mask, states):
    """Output before gate and projection, a head of a sample at a time; two heads share a key."""
    source = x if states is None else states
    q, k, v = attention.q_proj(x), attention.k_proj(source), attention.v_proj(source)
    outputs = torch.zeros_like(q)
    for n in range(x.shape[0]):
        for h in range(4):
            own, shared = slice(8 * h, 8 * h + 8), slice(8 * (h // 2), 8 * (h // 2) + 8)
            queries, keys = q[n, :, own], k[n, :, shared]
            if states is None:
                angles = list(zip(*(t[0] for t in rotation), strict=True))
                queries = torch.stack([rotate(t, *a) for t, a in zip(queries, angles, strict=True)])
                keys = torch.stack([rotate(t, *a) for t, a in zip(keys, angles, strict=True)])
            weights = (queries @ keys.T / 8**0.5 + mask).softmax(-1)
            outputs[n, :, own] = weights @ v[n, :, shared]
    return outputs


@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
@pytest.mark.parametrize("gate", ["none", "head", "channel"])
@pytest.mark.parametrize("act", ["sigmoid", "silu", None])
def test_attention_is_its_formula(gate, act, cross):
    torch.manual_seed(0)
    settings = config(
        attention_gate=gate,
        attention_gate_act=act,
        attention_bias=True,
        attn_implementation="eager",
    )
    attention = StarformerAttention(settings, 0)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    keys = 3 if cross else 5
    x, mask = torch.randn(2, 5, 32), torch.randn(5, keys)
    states = torch.randn(2, keys, 32) if cross else None
    rotation = StarformerRotaryEmbedding(settings)(x, torch.arange(5)[None])
    expected = attention_formula(attention, x, rotation, mask, states)
    if gate != "none":
        factor = FORMULAS[act or "identity"](attention.gate_proj(x))
        expected = expected * (factor.repeat_interleave(8, -1) if gate == "head" else factor)
    found, weights = attention(x, mask, rotation, encoder_hidden_states=states)
    torch.testing.assert_close(found, attention.o_proj(expected))
    assert weights.shape == (2, 4, 5, keys)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 5))


def test_what_the_parts_of_a_layer_are_told():
    settings = config(num_key_value_heads=1, rms_norm_eps=0.5)
    attention = StarformerAttention(settings, 3)
    assert (attention.layer_idx, attention.is_causal) == (3, True)
    assert (attention.num_key_value_groups, attention.scaling) == (4, 8**-0.5)
    layer = StarformerLayer(settings, 1, "full_attention", cross_attention=True)
    assert (layer.self_attn.is_causal, layer.cross_attn.is_causal) == (True, False)
    assert (layer.self_attn.layer_idx, layer.cross_attn.layer_idx) == (1, 1)
    for norm in (layer.input_layernorm, layer.cross_attn_layernorm, layer.ffn.pre.norm):
        assert norm.variance_epsilon == 0.5
    assert not hasattr(layer, "conv")
    layer = StarformerLayer(settings, 1, "conv", causal=False)
    assert (layer.conv.causal, layer.conv.layer_idx) == (False, 1)
    assert not hasattr(layer, "cross_attn")
    assert StarformerLayer(settings, 1, "conv").conv.causal
    assert not StarformerLayer(settings, 0, "full_attention", causal=False).self_attn.is_causal


@pytest.mark.parametrize("options", [{}, {"mlp_rank": 2}, {"mlp_type": "sum"}], ids=str)
def test_saved_names_of_the_mlp_are_those_of_a_star_mlp(options):
    layer = StarformerLayer(config(mlp_bias=True, **options), 0, "conv")
    names = [f"ffn.mlp.{f}.{p}" for f in ("f1", "f2", "g") for p in ("weight", "bias")]
    found = {name: tuple(t.shape) for name, t in layer.state_dict().items() if "ffn" in name}
    assert list(found) == ["ffn.pre.norm.weight", *names]
    rows = 96 if options == {"mlp_rank": 2} else 48
    branch = [(rows, 32), (rows,)]
    assert list(found.values()) == [(32,), *branch, *branch, (32, 48), (32,)]


@pytest.mark.parametrize("options", [{}, {"mlp_rank": 2}, {"mlp_type": "sum"}], ids=str)
def test_mlp_recompute_saves_the_branches_and_keeps_the_gradients(options):
    torch.manual_seed(0)
    x, results, saved = torch.randn(4, 5, 32), [], []
    for recompute in (False, True):
        mlp = make_mlp(config(mlp_recompute=recompute, mlp_bias=True, **options))
        assert mlp.recompute is recompute
        sizes = []
        hooks = (lambda t, sizes=sizes: sizes.append(t.numel()) or t), (lambda t: t)
        mlp.load_state_dict(results[0][0] if results else mlp.state_dict())
        leaf = x.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(*hooks):
            y = mlp(leaf)
        saved.append(max(sizes, default=0))
        y.square().sum().backward()
        results.append((mlp.state_dict(), y, leaf.grad, *(p.grad for p in mlp.parameters())))
    torch.testing.assert_close(results[0][1:], results[1][1:])
    assert saved[0] >= 4 * 5 * 48
    assert saved[1] <= x.numel()


@pytest.mark.parametrize("mlp_type", ["star", "sum", "plain"])
@pytest.mark.parametrize("act", ["silu", "relu", None])
def test_the_mlp_is_its_formula(mlp_type, act):
    torch.manual_seed(0)
    options = {"mlp_offset": 0.5, "mlp_rank": 2} if mlp_type == "star" else {}
    settings = config(mlp_type=mlp_type, hidden_act=act, mlp_bias=True, **options)
    layer = StarformerLayer(settings, 0, "conv")
    torch.nn.init.zeros_(layer.conv.o_proj.weight)
    x = torch.randn(2, 3, 32)
    mlp, z = layer.ffn.mlp, layer.ffn.pre(x)
    first = FORMULAS[act or "identity"](mlp.f1(z))
    if mlp_type == "star":
        hidden = first * (0.5 + mlp.f2(z))
        hidden = hidden[..., :48] + hidden[..., 48:]
    else:
        hidden = first + mlp.f2(z) if mlp_type == "sum" else first
    torch.testing.assert_close(layer(x), x + mlp.g(hidden))
    assert isinstance(mlp, PlainMLP) == (mlp_type == "plain")


@pytest.mark.parametrize(
    ("implementation", "variant"),
    # flex compiles: two variants stand for the rest
    [*(("sdpa", v) for v in VARIANTS), *(("flex_attention", v) for v in ("silu", "hybrid-gated"))],
)
def test_attention_implementations_agree(implementation, variant):
    eager = decoder(variant, attn_implementation="eager")
    fast = decoder(variant, attn_implementation=implementation)
    tokens = ids(2, 7)
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    with torch.no_grad():
        a = eager(tokens, attention_mask=mask).logits
        b = fast(tokens, attention_mask=mask).logits
    torch.testing.assert_close(a[mask.bool()], b[mask.bool()], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("act", [None, "silu"])
def test_star_conv_is_its_formula(causal, act):
    torch.manual_seed(0)
    options = config(conv_act=act, conv_bias=True, conv_kernel_size=5)
    mixer = StarConv(options, 0, causal=causal).double()
    x = torch.randn(2, 9, 32, dtype=torch.double)
    mask = torch.ones(2, 9)
    mask[0, 7:] = 0
    f = ACTIVATIONS[act].fn
    product = f(mixer.f1(x)) * mixer.f2(x) * mask[..., None]
    mixed = mixer.conv.bias.expand(2, 9, 32).clone()
    for t in range(9):
        for k in range(5):
            source = t + k - (4 if causal else 2)
            if 0 <= source < 9:
                mixed[:, t] += mixer.conv.weight[:, 0, k] * product[:, source]
    expected = mixer.o_proj(f(mixer.gate_proj(x)) * mixed)
    torch.testing.assert_close(mixer(x, mask), expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kernel_size", [1, 2, 3, 4])
def test_star_conv_does_not_cross_documents(kernel_size, bias):
    torch.manual_seed(0)
    mixer = StarConv(config(conv_kernel_size=kernel_size, conv_bias=bias), 0)
    x = torch.randn(2, 7, 32)
    documents = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 1]])
    found = mixer(x, documents=documents)
    for sample, cuts in ((0, (0, 3, 5, 7)), (1, (0, 1, 7))):
        parts = [mixer(x[sample, None, a:b]) for a, b in itertools.pairwise(cuts)]
        torch.testing.assert_close(found[sample, None], torch.cat(parts, 1))
    torch.testing.assert_close(mixer(x, documents=torch.zeros(2, 7)), mixer(x))


def test_the_block_is_the_cores_and_may_run_fused():
    model = decoder()
    block = model.model.layers[0].ffn
    assert type(block) is StarBlock
    assert type(block.mlp) is StarMLP
    # a real size, where the fused CPU layer serves, against the definition
    torch.manual_seed(0)
    wide = StarformerForCausalLM(config(hidden_size=256, intermediate_size=1024)).eval()

    mlp = wide.model.layers[0].ffn.mlp
    tokens = ids(12, 100)
    with torch.no_grad():
        assert mlp.plan(torch.randn(12, 100, 256)).fused
        fast = wide(tokens).logits
        with use_backend("eager"):
            torch.testing.assert_close(fast, wide(tokens).logits, atol=1e-4, rtol=1e-4)


def test_padding_says_nothing_to_an_encoder_or_cross_attention():
    torch.manual_seed(0)
    hybrid = {**VARIANTS["hybrid-gated"], "conv_kernel_size": 3}
    model = StarformerEncoderModel(encoder_config(**hybrid)).eval()
    tokens = ids(1, 5)
    padded = torch.cat([tokens, torch.zeros(1, 3, dtype=torch.long)], 1)
    mask = (padded != 0).long()
    with torch.no_grad():
        torch.testing.assert_close(
            model(padded, attention_mask=mask).last_hidden_state[:, :5],
            model(tokens).last_hidden_state,
            atol=1e-5,
            rtol=1e-5,
        )
        both = seq2seq("hybrid-gated")
        target = ids(1, 4, seed=1)
        torch.testing.assert_close(
            both(padded, attention_mask=mask, decoder_input_ids=target).logits,
            both(tokens, decoder_input_ids=target).logits,
            atol=1e-5,
            rtol=1e-5,
        )


def test_an_encoder_sees_both_ways():
    for layers in (["attention"], ["star_conv"]):
        torch.manual_seed(0)
        model = StarformerEncoderModel(encoder_config(num_hidden_layers=1, layer_types=layers))
        model.eval()
        tokens = ids(1, 6)
        other = tokens.clone()
        other[0, 3] = 7 if tokens[0, 3] != 7 else 8
        with torch.no_grad():
            change = model(tokens).last_hidden_state - model(other).last_hidden_state
        change = change.abs().amax(-1)[0]
        assert change[2] > 1e-4
        assert change[4] > 1e-4


def kept_bytes(model, tokens):
    """Bytes that a forward keeps for its backward, each storage once, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(tokens, labels=tokens)
    return sum(kept.values())


def test_recomputing_changes_memory_and_nothing_else():
    tokens, kept, grads = ids(2, 16), [], []
    for recompute in (False, True):
        model = decoder(mlp_recompute=recompute, attention_gate="head").train()
        assert model.model.layers[0].ffn.mlp.recompute is recompute
        kept.append(kept_bytes(model, tokens))
        model(tokens, labels=tokens).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    # f1(x), f2(x), silu(f1(x)) and the product, in each of two layers
    assert kept[0] - kept[1] == 2 * 4 * (2 * 16 * 48) * 4
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


# --- every dropout field, in every model class that has it and at every place


CLASSES = sorted(n for n in nlp.__all__ if n.endswith("Model") or "For" in n)
FIELDS = ("attention_dropout", "hidden_dropout", "classifier_dropout")
OFF = dict.fromkeys(FIELDS, 0.0)
#: classes with dropout before the classifier; the other heads have none, as in transformers
CLASSIFIERS = {
    "StarformerForTokenClassification",
    "StarformerEncoderForTokenClassification",
    "StarformerEncoderForSequenceClassification",
}


def build(name, **options):
    """A model whose attention is the only mixer, or a hybrid with `layer_types`."""
    model_class = getattr(nlp, name)
    make = {"starformer": config, "starformer_encoder": encoder_config}
    make = make.get(model_class.config_class.model_type, seq2seq_config)
    torch.manual_seed(0)
    return model_class(make(**{**OFF, "num_labels": 3, **options}))


def run(model, seed=0):
    """The first output, with dropout drawn from `seed`."""
    inputs = {"input_ids": ids(2, 7)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids(2, 6, seed=1)
    torch.manual_seed(seed)
    with torch.no_grad():
        return model(**inputs)[0]


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("name", CLASSES)
def test_dropout_is_for_training_only(name, field):
    model, without = build(name, **{field: 0.5}), build(name)
    expected = run(without.eval())
    assert torch.equal(run(model.eval(), 1), expected)
    assert torch.equal(run(model.eval(), 2), expected)
    assert torch.equal(run(without.train(), 1), expected)
    first, again, other = (run(model.train(), seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    if field == "classifier_dropout" and name not in CLASSIFIERS:
        assert torch.equal(first, expected)
        return
    assert (first - expected).abs().max() > 1e-2
    assert (first - other).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
@pytest.mark.parametrize("gate", ["none", "head"])
def test_attention_dropout_of_all_weights_removes_attention(kind, gate):
    # dropout of 1 drops everything: what is left is exact, and has to be without attention
    for name in ("StarformerModel", "StarformerEncoderModel"):
        model = build(name, attention_dropout=1.0, attn_implementation=kind, attention_gate=gate)
        x = model.embed_tokens(ids(2, 7))
        for layer in model.layers:
            x = layer.ffn(x)
        torch.testing.assert_close(run(model.train()), model.norm(x).detach())


def test_attention_dropout_keeps_the_mean():
    model = build("StarformerModel", attention_dropout=0.25, num_hidden_layers=1)
    attention = model.layers[0].self_attn.train()
    attention.config._attn_implementation = "eager"
    x, rotation = torch.randn(1, 6, 32), model.rotary_emb(torch.ones(1), torch.arange(6)[None])
    with torch.no_grad():
        weights = attention(x.expand(2000, -1, -1), position_embeddings=rotation)[1]
        usual = attention.eval()(x, position_embeddings=rotation)[1]
    assert (weights == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    kept = weights != 0
    torch.testing.assert_close(weights[kept], (usual / 0.75).expand_as(weights)[kept])


LAYERS = [["attention", "attention"], ["star_conv", "attention"]]


@pytest.mark.parametrize("layer_types", LAYERS, ids="-".join)
@pytest.mark.parametrize("mlp_type", ["star", "plain"])
def test_hidden_dropout_of_everything_leaves_the_embeddings(layer_types, mlp_type):
    options = {"layer_types": layer_types, "mlp_type": mlp_type, "hidden_dropout": 1.0}
    for name in ("StarformerModel", "StarformerEncoderModel"):
        model = build(name, mlp_bias=True, **options).train()
        assert torch.equal(run(model), model.norm(model.embed_tokens(ids(2, 7))).detach())
    model = build("StarformerSeq2SeqModel", **options).train()
    target = model.shared(ids(2, 6, seed=1))
    assert torch.equal(run(model), model.decoder.norm(target).detach())
    encoded = model.encoder(ids(2, 7)).last_hidden_state
    assert torch.equal(encoded, model.encoder.norm(model.shared(ids(2, 7))))


@pytest.mark.parametrize("place", ["mixer", "cross-attention", "mlp"])
@pytest.mark.parametrize("kind", ["full_attention", "conv"])
def test_hidden_dropout_at_each_place(kind, place):
    from starlayers.nlp.layers_starformer import StarformerLayer, StarformerRotaryEmbedding

    settings = config(hidden_dropout=0.5, layer_types=["conv", "attention"])
    settings._attn_implementation = "eager"
    torch.manual_seed(0)
    layer = StarformerLayer(settings, 0, kind, cross_attention=True).train()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    parts = {
        "mixer": layer.self_attn.o_proj if kind == "full_attention" else layer.conv.o_proj,
        "cross-attention": layer.cross_attn.o_proj,
        "mlp": layer.ffn.mlp.g,
    }
    for other, projection in parts.items():
        if other != place:
            torch.nn.init.zeros_(projection.weight)
    x, states = torch.randn(4, 8, 32), torch.randn(4, 5, 32)
    rotation = StarformerRotaryEmbedding(settings)(x, torch.arange(8)[None])
    with torch.no_grad():
        added = layer(x, states, position_embeddings=rotation) - x
        full = layer.eval()(x, states, position_embeddings=rotation) - x
    assert full.abs().min() > 0
    kept = added != 0
    assert kept.float().mean().item() == pytest.approx(0.5, abs=0.1)
    torch.testing.assert_close(added[kept], 2 * full[kept], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", sorted(CLASSIFIERS))
def test_classifier_dropout_of_everything_leaves_the_bias(name):
    model = build(name, classifier_dropout=1.0).train()
    torch.nn.init.normal_(model.score.bias)
    logits = run(model)
    assert torch.equal(logits, model.score.bias.detach().expand_as(logits))
    assert (run(model.eval()) - logits).abs().max() > 1e-2


def test_no_classifier_dropout_is_none():
    assert SIZES.keys().isdisjoint(FIELDS)
    for name in sorted(CLASSIFIERS):
        assert build(name, classifier_dropout=None).dropout.p == 0
        assert build(name, classifier_dropout=0.3).dropout.p == 0.3
