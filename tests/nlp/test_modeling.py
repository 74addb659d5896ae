"""Models from ids to hidden states: positions, masks, packed texts, embeddings, both sides."""

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.modeling_outputs import BaseModelOutput

from starlayers import nlp
from starlayers.nlp import cache_starformer, modeling_starformer
from starlayers.nlp.cache_starformer import CACHE
from starlayers.nlp.modeling_starformer import resolve_positions, select_states
from starlayers.nlp.modeling_starformer_seq2seq import use_attention_layers
from tests.nlp.tiny import VARIANTS, config, decoder, encoder_config, ids, seq2seq, seq2seq_config

EXACT = {"atol": 1e-5, "rtol": 1e-5}
LAYERS = pytest.mark.parametrize("variant", ["silu", "hybrid-gated"])


def encoder(variant="silu", **options):
    torch.manual_seed(0)
    return nlp.StarformerEncoderModel(encoder_config(**VARIANTS[variant], **options)).eval()


def logits(model, *args, **kwargs):
    with torch.no_grad():
        return model(*args, **kwargs).logits


def apart(a, b):
    return (a - b).abs().max() > 1e-3


# --- positions


def test_positions_continue_the_cache():
    x, cache = torch.zeros(2, 3, 8), DynamicCache(config=config())
    assert resolve_positions(x, None, None).tolist() == [[0, 1, 2]]
    assert resolve_positions(x, None, cache).tolist() == [[0, 1, 2]]
    decoder()(ids(2, 4), **{CACHE: cache})
    assert resolve_positions(x, None, cache).tolist() == [[4, 5, 6]]
    own = torch.tensor([[7, 8, 9]])
    assert resolve_positions(x, own, cache) is own


def test_positions_are_relative_and_count():
    tokens, mask = ids(2, 6), torch.ones(2, 6, dtype=torch.long)
    ways = [torch.arange(6)[None], torch.arange(6)[None] + 5, torch.arange(6)[None] * 2]
    for run in (
        lambda p: logits(decoder(), tokens, attention_mask=mask, position_ids=p),
        lambda p: encoder()(tokens, position_ids=p).last_hidden_state.detach(),
        lambda p: logits(seq2seq(), tokens, decoder_input_ids=tokens, decoder_position_ids=p),
    ):
        usual, counted, shifted, stretched = run(None), *map(run, ways)
        torch.testing.assert_close(counted, usual)
        torch.testing.assert_close(shifted, usual, **EXACT)
        assert apart(stretched, usual)


@LAYERS
def test_positions_separate_texts_without_a_mask_and_a_cache_only(variant):
    model, tokens = decoder(variant), ids(1, 7)
    gap = torch.tensor([[0, 1, 2, 20, 21, 22, 23]])
    separate = logits(model, tokens, position_ids=gap, use_cache=False)
    parts = [logits(model, tokens[:, :3]), logits(model, tokens[:, 3:])]
    torch.testing.assert_close(separate, torch.cat(parts, 1), **EXACT)
    one_text = logits(model, tokens, position_ids=gap, use_cache=True)
    assert apart(one_text[:, 3:], separate[:, 3:])
    ones = torch.ones_like(tokens)
    for options in ({"use_cache": False}, {"use_cache": True}):
        masked = logits(model, tokens, position_ids=gap, attention_mask=ones, **options)
        torch.testing.assert_close(masked, one_text, **EXACT)


def test_documents_are_for_star_conv_and_position_ids(monkeypatch):
    calls = []
    original = modeling_starformer.find_packed_sequence_indices
    monkeypatch.setattr(
        modeling_starformer,
        "find_packed_sequence_indices",
        lambda position_ids: calls.append(1) or original(position_ids),
    )
    tokens, positions = ids(1, 4), torch.arange(4)[None]
    decoder("hybrid")(tokens, use_cache=False)
    decoder("silu")(tokens, use_cache=False, position_ids=positions)
    assert not calls
    decoder("hybrid")(tokens, use_cache=False, position_ids=positions)
    assert len(calls) == 1


# --- masks


@LAYERS
def test_a_mask_for_each_layer_type_is_taken_as_it_is(variant):
    model, tokens = decoder(variant, attn_implementation="eager"), ids(2, 6)
    padding = torch.ones(2, 6, dtype=torch.long)
    padding[1, :2] = 0
    causal = torch.full((6, 6), float("-inf")).triu(1).expand(2, 1, 6, 6).clone()
    causal.masked_fill_(padding[:, None, None, :] == 0, torch.finfo(torch.float32).min)
    masks = {"full_attention": causal, "conv": padding}
    found = logits(model, tokens, attention_mask=masks)
    expected = logits(model, tokens, attention_mask=padding)
    torch.testing.assert_close(found[padding.bool()], expected[padding.bool()], **EXACT)
    assert apart(found, logits(model, tokens))


@LAYERS
def test_padding_of_a_decoder(variant):
    model, tokens = decoder(variant), ids(1, 5)
    padded = torch.cat([tokens, torch.zeros(1, 3, dtype=torch.long)], 1)
    mask = (padded != 0).long()
    torch.testing.assert_close(
        logits(model, padded, attention_mask=mask)[:, :5], logits(model, tokens), **EXACT
    )


def test_an_encoder_takes_a_mask_of_pairs():
    model, tokens = encoder(), ids(2, 6)
    padding = torch.ones(2, 6, dtype=torch.long)
    padding[1, 4:] = 0
    pairs = (1.0 - padding[:, None, None, :].float()) * torch.finfo(torch.float32).min
    pairs = pairs.expand(2, 1, 6, 6)
    with torch.no_grad():
        found = model(tokens, attention_mask=pairs).last_hidden_state
        expected = model(tokens, attention_mask=padding).last_hidden_state
        without = model(tokens).last_hidden_state
        hybrid = encoder("hybrid")
        # a star_conv layer reads padding from a mask (batch, length) only
        assert hybrid(tokens, attention_mask=pairs).last_hidden_state.isfinite().all()
    torch.testing.assert_close(found[padding.bool()], expected[padding.bool()], **EXACT)
    assert apart(found[1, :4], without[1, :4])


@pytest.mark.parametrize("side", ["attention_mask", "decoder_attention_mask"])
@LAYERS
def test_masks_of_both_sides(variant, side):
    model, source, target = seq2seq(variant), ids(1, 5), ids(1, 4, seed=1)
    pad = torch.zeros(1, 2, dtype=torch.long)
    usual = logits(model, source, decoder_input_ids=target)
    if side == "attention_mask":
        source = torch.cat([source, pad], 1)
        mask = (source != 0).long()
    else:
        target = torch.cat([target, pad], 1)
        mask = (target != 0).long()
    masked = logits(model, source, decoder_input_ids=target, **{side: mask})[:, :4]
    torch.testing.assert_close(masked, usual, **EXACT)
    if side == "attention_mask":
        assert apart(logits(model, source, decoder_input_ids=target), usual)


# --- inputs


@pytest.mark.parametrize("make", [decoder, encoder])
def test_embeddings_in_place_of_ids(make):
    model, tokens = make(), ids(2, 5)
    with torch.no_grad():
        embedded = model.get_input_embeddings()(tokens)
        assert torch.equal(model(inputs_embeds=embedded)[0], model(tokens)[0])
    for inputs, problem in (
        ({}, "neither"),
        ({"input_ids": tokens, "inputs_embeds": embedded}, "both"),
    ):
        with pytest.raises(
            ValueError, match=f"Model needs either input_ids or inputs_embeds, got {problem}"
        ):
            model(**inputs)


def test_embeddings_on_both_sides_and_states_in_place_of_the_encoder():
    model, source, target = seq2seq("hybrid"), ids(2, 5), ids(2, 4, seed=1)
    usual = logits(model, source, decoder_input_ids=target)
    embed, mask = model.get_input_embeddings(), torch.ones_like(source)
    states = model.get_encoder()(source).last_hidden_state
    for options in (
        {"inputs_embeds": embed(source), "decoder_input_ids": target},
        {"input_ids": source, "decoder_inputs_embeds": embed(target)},
        {"encoder_outputs": (states,), "decoder_input_ids": target},
        {"encoder_outputs": BaseModelOutput(states), "decoder_input_ids": target},
        {"input_ids": source, "decoder_input_ids": target, "attention_mask": mask},
        {"input_ids": source, "decoder_input_ids": target, "use_cache": False},
    ):
        torch.testing.assert_close(logits(model, **options), usual, **EXACT)
    labels = ids(2, 4, seed=2)
    out = model(source, decoder_input_ids=target, labels=labels)  # the ids win over shifted labels
    torch.testing.assert_close(out.logits, usual)
    expected = torch.nn.functional.cross_entropy(usual.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(out.loss, expected)
    out = model(source, decoder_inputs_embeds=embed(target), labels=labels)
    torch.testing.assert_close(out.loss, expected)


def test_errors_of_the_decoder_side():
    model, tokens = seq2seq().model, ids(1, 3)
    with pytest.raises(ValueError, match="StarformerSeq2SeqDecoder needs encoder_hidden_states"):
        model.decoder(tokens)
    with pytest.raises(ValueError, match=r"got a DynamicCache; use EncoderDecoderCache\(it, "):
        model(tokens, decoder_input_ids=tokens, **{CACHE: DynamicCache()})
    with pytest.raises(ValueError, match="got neither"):
        model(tokens)


def test_outputs_of_an_encoder_decoder():
    model = seq2seq("hybrid", attn_implementation="eager")
    source, target = ids(2, 5), ids(2, 4, seed=1)
    asked = {"output_attentions": True, "output_hidden_states": True}
    with torch.no_grad():
        out = model(source, decoder_input_ids=target, **asked)
        encoded = model.get_encoder()(source, **asked)
        decoded = model.model.decoder(
            target, encoder_hidden_states=encoded.last_hidden_state, **asked
        )
    assert torch.equal(out.encoder_last_hidden_state, encoded.last_hidden_state)
    for name, parts, shapes in (
        ("encoder_hidden_states", encoded.hidden_states, [(2, 5, 32)] * 3),
        ("encoder_attentions", encoded.attentions, [(2, 4, 5, 5)]),
        ("decoder_hidden_states", decoded.hidden_states, [(2, 4, 32)] * 3),
        ("decoder_attentions", decoded.attentions, [(2, 4, 4, 4)]),
        ("cross_attentions", decoded.cross_attentions, [(2, 4, 4, 5)] * 2),
    ):
        assert [t.shape for t in getattr(out, name)] == shapes, name
        assert all(map(torch.equal, getattr(out, name), parts)), name
    assert isinstance(out[CACHE], EncoderDecoderCache)
    assert out[CACHE].get_seq_length(1) == 4


@pytest.mark.parametrize("make", [decoder, encoder])
def test_hidden_states_and_attentions(make):
    model, tokens = make("hybrid", attn_implementation="eager"), ids(2, 5)
    with torch.no_grad():
        out = model(tokens, output_attentions=True, output_hidden_states=True)
    assert [t.shape for t in out.hidden_states] == [(2, 5, 32)] * 3
    assert [t.shape for t in out.attentions] == [(2, 4, 5, 5)]
    assert torch.equal(out.hidden_states[0], model.get_input_embeddings()(tokens))


@pytest.mark.parametrize("name", ["ForMaskedLM", "EncoderForSequenceClassification"])
def test_heads_pass_states_and_attentions_on(name):
    settings = encoder_config(attn_implementation="eager")
    out = getattr(nlp, f"Starformer{name}")(settings)(
        ids(2, 5), output_hidden_states=True, output_attentions=True
    )
    assert [t.shape for t in out.hidden_states] == [(2, 5, 32)] * 3
    assert [t.shape for t in out.attentions] == [(2, 4, 5, 5)] * 2


def test_embeddings_of_both_sides_stay_one():
    for tied in (True, False):
        model = seq2seq(tie_word_embeddings=tied)
        inner = model.model
        assert inner.encoder.embed_tokens is not None
        assert inner.encoder.embed_tokens.weight is inner.shared.weight
        assert inner.decoder.embed_tokens.weight is inner.shared.weight
        assert (model.lm_head.weight is inner.shared.weight) == tied
        new = torch.nn.Embedding(99, 32)
        inner.set_input_embeddings(new)
        assert inner.get_input_embeddings() is new
        assert inner.shared is inner.encoder.embed_tokens is inner.decoder.embed_tokens is new


def test_labels_without_a_padding_token():
    model = nlp.StarformerForConditionalGeneration(seq2seq_config(pad_token_id=None))
    labels = torch.tensor([[5, -100, 6]])
    assert model.prepare_decoder_input_ids_from_labels(labels).tolist() == [[1, 5, 1]]
    assert labels.tolist() == [[5, -100, 6]]


def test_states_whose_logits_are_wanted():
    x = torch.arange(24.0).view(2, 3, 4)
    assert select_states(x, 0) is x
    assert torch.equal(select_states(x, 1), x[:, 2:])
    assert torch.equal(select_states(x, 2), x[:, 1:])
    assert torch.equal(select_states(x, torch.tensor([2, 0])), x[:, [2, 0]])
    places = torch.tensor([[0, 2], [1, 1]])
    chosen = torch.stack([x[0, [0, 2]], x[1, [1, 1]]])
    assert torch.equal(select_states(x, places), chosen)
    mask = torch.tensor([[True, False, True], [False, True, False]])
    assert torch.equal(select_states(x, mask), x[mask])


def test_the_last_logits_of_an_encoder_decoder():
    model, tokens = seq2seq(), ids(2, 5)
    whole = logits(model, tokens, decoder_input_ids=tokens)
    for keep, expected in ((0, whole), (2, whole[:, 3:]), (torch.tensor([1]), whole[:, 1:2])):
        kept = logits(model, tokens, decoder_input_ids=tokens, logits_to_keep=keep)
        torch.testing.assert_close(kept, expected)


# --- caches


@pytest.mark.parametrize("static", [False, True])
def test_a_cross_attention_cache_has_attention_layers(static):
    settings = config(layer_types=["attention", "star_conv"])
    cache = (
        StaticCache(config=settings, max_cache_len=9) if static else DynamicCache(config=settings)
    )
    attention = cache.layers[0]
    use_attention_layers(cache, 5)
    assert cache.layers[0] is attention
    assert type(cache.layers[1]) is (StaticLayer if static else DynamicLayer)
    if static:
        assert cache.layers[1].max_cache_len == 5
    replaced = cache.layers[1]
    use_attention_layers(cache, 7)
    assert cache.layers[1] is replaced


def test_keys_of_the_encoder_are_computed_once():
    model, source, target = seq2seq(), ids(1, 5), ids(1, 3, seed=1)
    cache = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache())
    calls = []
    for layer in model.model.decoder.layers:
        layer.cross_attn.k_proj.register_forward_hook(lambda *_: calls.append(1))
    encoded = model.get_encoder()(source)
    for t in range(3):
        logits(
            model, encoder_outputs=encoded, decoder_input_ids=target[:, t : t + 1],
            use_cache=True, **{CACHE: cache},
        )  # fmt: skip
    assert len(calls) == 2  # one a layer, not one a step
    assert [layer.keys.shape[2] for layer in cache.cross_attention_cache.layers] == [5, 5]
    assert cache.get_seq_length() == 3


def test_the_cache_argument_keeps_its_name_in_older_transformers(monkeypatch):
    def forward(x, past_key_values=None):
        return x, past_key_values

    monkeypatch.setattr(cache_starformer, "CACHE", "past_key_values")
    assert cache_starformer.takes_cache(forward) is forward
    monkeypatch.setattr(cache_starformer, "CACHE", "cache")
    renamed = cache_starformer.takes_cache(forward)
    assert renamed(1, cache=2) == (1, 2)
    assert renamed(1) == (1, None)
    assert renamed(1, 3) == (1, 3)
    with pytest.warns(FutureWarning, match="`past_key_values` is deprecated"):
        assert renamed(1, past_key_values=2) == (1, 2)
