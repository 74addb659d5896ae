"""Every dropout field, in every model class that has it and at every place."""

import pytest
import torch

from starlayers import nlp
from tests.nlp.tiny import SIZES, config, encoder_config, ids, seq2seq_config

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
