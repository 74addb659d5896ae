"""Generation in all its forms, and the caches behind it."""

import warnings
from inspect import signature

import pytest
import torch
from transformers import (
    ContinuousBatchingConfig,
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    LlamaForCausalLM,
)

from starlayers.nlp.cache_starformer import CACHE
from tests.nlp.tiny import VARIANTS, decoder, ids, seq2seq

TOLERANCE = 1e-5
NEW = {"min_new_tokens": 8, "max_new_tokens": 8}
EVERY = pytest.mark.parametrize("variant", VARIANTS)
MIXERS = pytest.mark.parametrize("variant", ["silu", "gate-head", "hybrid-gated"])


def logits(model, tokens, **kwargs):
    with torch.no_grad():
        return model(tokens, **kwargs).logits


@EVERY
@pytest.mark.parametrize("steps", [(1,) * 9, (4, 1, 3, 1)], ids=["one-by-one", "in-chunks"])
def test_cached_equals_uncached(variant, steps):
    model, tokens = decoder(variant), ids(2, 9)
    cache = DynamicCache(config=model.config)
    parts, seen = [], 0
    for step in steps:
        parts.append(
            logits(model, tokens[:, seen : seen + step], past_key_values=cache, use_cache=True)
        )
        seen += step
    assert seen == 9
    torch.testing.assert_close(
        torch.cat(parts, 1), logits(model, tokens), atol=TOLERANCE, rtol=TOLERANCE
    )


@EVERY
def test_no_token_sees_a_later_one(variant):
    model, tokens = decoder(variant), ids(1, 8)
    changed = tokens.clone()
    changed[0, 5] = (tokens[0, 5] + 1) % 90 + 3
    before, after = logits(model, tokens), logits(model, changed)
    torch.testing.assert_close(before[:, :5], after[:, :5], atol=1e-6, rtol=1e-6)
    assert (before[:, 5:] - after[:, 5:]).abs().amax(-1).min() > 1e-4


@EVERY
def test_greedy_is_the_argmax_of_uncached_logits(variant):
    model, tokens = decoder(variant), ids(2, 4)
    generated = model.generate(tokens, do_sample=False, **NEW)
    expected = tokens
    for _ in range(NEW["max_new_tokens"]):
        scores = logits(model, expected)[:, -1]
        scores[:, model.config.eos_token_id] = -torch.inf
        expected = torch.cat([expected, scores.argmax(-1, keepdim=True)], 1)
    assert torch.equal(generated, expected)


@MIXERS
def test_static_cache_generates_the_same(variant):
    model, tokens = decoder(variant), ids(2, 4)
    usual = model.generate(tokens, do_sample=False, **NEW)
    static = model.generate(
        tokens, do_sample=False, cache_implementation="static", disable_compile=True, **NEW
    )
    assert torch.equal(usual, static)


@MIXERS
def test_left_padding_changes_nothing(variant):
    model, tokens = decoder(variant), ids(1, 5)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), tokens], 1)
    mask = (padded != 0).long()
    usual = model.generate(tokens, do_sample=False, **NEW)
    shifted = model.generate(padded, attention_mask=mask, do_sample=False, **NEW)
    assert torch.equal(usual[:, 5:], shifted[:, 8:])
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    torch.testing.assert_close(
        logits(model, padded, attention_mask=mask, position_ids=positions)[:, 3:],
        logits(model, tokens),
        atol=TOLERANCE,
        rtol=TOLERANCE,
    )


@MIXERS
def test_beam_search_finds_no_worse_than_greedy(variant):
    model, tokens = decoder(variant), ids(2, 4)

    def log_probability(sequence):
        scores = logits(model, sequence)[:, 3:-1].clone()
        # what `min_new_tokens` forbids while searching
        scores[..., model.config.eos_token_id] = -torch.inf
        return scores.log_softmax(-1).gather(-1, sequence[:, 4:, None]).sum((1, 2))

    greedy = model.generate(tokens, do_sample=False, **NEW)
    beams = model.generate(
        tokens, num_beams=64, do_sample=False, output_scores=True, return_dict_in_generate=True,
        length_penalty=0.0, **NEW,
    )  # fmt: skip
    best = log_probability(beams.sequences)
    assert (best >= log_probability(greedy) - 1e-4).all()


@MIXERS
def test_sampling_follows_its_seed_and_the_distribution(variant):
    model, tokens = decoder(variant), ids(1, 4)
    draws = []
    for _ in range(2):
        torch.manual_seed(3)
        draws.append(
            model.generate(
                tokens, do_sample=True, top_k=0, num_return_sequences=2000, max_new_tokens=1
            )
        )
    assert torch.equal(*draws)
    share = draws[0][:, -1].bincount(minlength=model.config.vocab_size) / 2000
    expected = logits(model, tokens)[0, -1].softmax(-1)
    assert (share - expected).abs().max() < 4 * (expected.max() / 2000) ** 0.5 + 1e-3


@MIXERS
def test_assisted_generation_changes_nothing(variant):
    model, tokens = decoder(variant), ids(1, 4)
    assistant = decoder(variant, num_hidden_layers=2)
    with torch.no_grad():  # an assistant that is right now and then
        for p in assistant.parameters():
            p.add_(torch.randn_like(p), alpha=0.02)
    usual = model.generate(tokens, do_sample=False, **NEW)
    assisted = model.generate(tokens, assistant_model=assistant, do_sample=False, **NEW)
    assert torch.equal(usual, assisted)


@MIXERS
def test_generation_continues_from_a_cache(variant):
    model, tokens = decoder(variant), ids(2, 4)
    whole = model.generate(tokens, do_sample=False, min_new_tokens=8, max_new_tokens=8)
    begun = model.generate(
        tokens, do_sample=False, min_new_tokens=3, max_new_tokens=3, return_dict_in_generate=True
    )
    rest = model.generate(
        begun.sequences, past_key_values=begun.past_key_values, do_sample=False,
        min_new_tokens=5, max_new_tokens=5,
    )  # fmt: skip
    assert torch.equal(whole, rest)


@EVERY
def test_seq2seq_cached_equals_uncached(variant):
    model, source, target = seq2seq(variant), ids(2, 7), ids(2, 6, seed=1)
    mask = torch.ones_like(source)
    mask[1, 5:] = 0
    whole = logits(model, source, attention_mask=mask, decoder_input_ids=target)
    cache = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache())
    encoded = model.get_encoder()(source, attention_mask=mask)
    steps = [
        logits(
            model, None, encoder_outputs=encoded, attention_mask=mask, use_cache=True,
            decoder_input_ids=target[:, t : t + 1], past_key_values=cache,
        )
        for t in range(6)
    ]  # fmt: skip
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=TOLERANCE, rtol=TOLERANCE)


@MIXERS
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_seq2seq_generation_ignores_padding(variant, beams, cache):
    model, source = seq2seq(variant), ids(1, 5)
    padded = torch.cat([source, torch.zeros(1, 2, dtype=torch.long)], 1)
    how = {"num_beams": beams, "do_sample": False, "disable_compile": True, **NEW}
    usual = model.generate(source, **how)
    how["cache_implementation"] = cache
    assert usual.shape == (1, 9)
    assert usual[0, 0] == model.config.decoder_start_token_id
    assert torch.equal(usual, model.generate(padded, attention_mask=(padded != 0).long(), **how))


@pytest.mark.parametrize("variant", ["silu", "gate-head"])
def test_continuous_batching_generates_the_same(variant):
    model = decoder(variant)
    texts = [ids(1, 5)[0].tolist(), ids(1, 7, seed=1)[0].tolist()]
    how = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=2, pad_token_id=0)
    small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)  # or it takes all memory
    batch = model.generate_batch(
        texts, generation_config=how, continuous_batching_config=small, progress_bar=False
    )
    alone = [model.generate(torch.tensor([t]), generation_config=how)[0, len(t) :] for t in texts]
    assert [made.generated_tokens for made in batch.values()] == [t.tolist() for t in alone]


@pytest.mark.parametrize("name", dict.fromkeys([CACHE, "past_key_values"]))
@pytest.mark.parametrize("make", [decoder, seq2seq])
def test_a_cache_goes_by_the_names_of_the_installed_transformers(make, name):
    assert CACHE in signature(LlamaForCausalLM.forward).parameters
    whole, tokens = make("hybrid"), ids(2, 5)
    inputs = {"decoder_input_ids": tokens} if make is seq2seq else {}
    for model in (whole, whole.model):
        cache = DynamicCache(config=model.config)
        if make is seq2seq:  # both sides by the decoder's layer types, as transformers makes them
            cache = EncoderDecoderCache(cache, DynamicCache(config=model.config))
        with warnings.catch_warnings(record=True) as warned, torch.no_grad():
            warnings.simplefilter("always")
            output = model(tokens, **inputs, **{name: cache})
        assert ["`past_key_values` is deprecated" in str(w.message) for w in warned] == (
            [] if name == CACHE else [True]
        )
        assert CACHE in signature(model.forward).parameters
        assert output[CACHE] is cache
        assert cache.get_seq_length(1) == 5
        with torch.no_grad():
            uncached = model(tokens, **inputs, use_cache=False)
        assert CACHE not in uncached
        torch.testing.assert_close(output[0], uncached[0], atol=TOLERANCE, rtol=TOLERANCE)


def test_a_decoder_without_attention_cannot_count():
    with pytest.raises(ValueError, match="layer_types needs one 'attention' layer"):
        decoder(layer_types=["star_conv", "star_conv"])


def test_seq2seq_takes_a_cache_of_the_users():
    model, source = seq2seq("hybrid"), ids(2, 5)
    usual = model.generate(source, do_sample=False, **NEW)
    cache = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache())
    assert torch.equal(usual, model.generate(source, past_key_values=cache, do_sample=False, **NEW))
    with pytest.raises(ValueError, match="needs an EncoderDecoderCache, got a DynamicCache"):
        model(source, decoder_input_ids=source, past_key_values=DynamicCache())


@EVERY
def test_texts_packed_in_one_row_stand_apart(variant):
    model, first, second = decoder(variant), ids(1, 5), ids(1, 6, seed=1)
    positions = torch.cat([torch.arange(5), torch.arange(6)])[None]
    packed = logits(model, torch.cat([first, second], 1), position_ids=positions, use_cache=False)
    alone = [logits(model, tokens) for tokens in (first, second)]
    torch.testing.assert_close(packed, torch.cat(alone, 1), atol=TOLERANCE, rtol=TOLERANCE)
