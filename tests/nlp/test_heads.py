"""Each head learns one small batch by heart."""

import pytest
import torch

from starlayers import nlp
from tests.nlp.tiny import VOCAB, config, encoder_config, ids, seq2seq_config

TOKENS = ids(4, 8)
CLASSES = torch.tensor([0, 1, 2, 1])
TAGS = ids(4, 8, seed=1) % 3
SPANS = {"start_positions": torch.tensor([1, 4, 2, 0]), "end_positions": torch.tensor([3, 7, 2, 5])}
MASKED = torch.where(ids(4, 8, seed=2) % 4 == 0, ids(4, 8, seed=3), -100)
HEADS = {
    "StarformerForCausalLM": (config, {"labels": TOKENS}),
    "StarformerForSequenceClassification": (config, {"labels": CLASSES}),
    "StarformerForTokenClassification": (config, {"labels": TAGS}),
    "StarformerForQuestionAnswering": (config, SPANS),
    "StarformerForMaskedLM": (encoder_config, {"labels": MASKED}),
    "StarformerEncoderForSequenceClassification": (encoder_config, {"labels": CLASSES}),
    "StarformerEncoderForTokenClassification": (encoder_config, {"labels": TAGS}),
    "StarformerEncoderForQuestionAnswering": (encoder_config, SPANS),
    "StarformerForConditionalGeneration": (seq2seq_config, {"labels": ids(4, 6, seed=4)}),
}
HYBRID = {
    "layer_types": ["star_conv", "attention"],
    "attention_gate": "head",
    "hidden_act": None,
    "mlp_rank": 2,
}


def test_every_head_is_here():
    assert {n for n in nlp.__all__ if "For" in n} == set(HEADS)


@pytest.mark.parametrize("options", [{}, HYBRID], ids=["silu", "bilinear-hybrid"])
@pytest.mark.parametrize("name", HEADS)
def test_overfits_one_batch(name, options):
    build, targets = HEADS[name]
    torch.manual_seed(0)
    model = getattr(nlp, name)(
        build(num_labels=3, classifier_dropout=0.0, initializer_range=0.15, **options)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    first = None
    for _ in range(150):
        loss = model(TOKENS, **targets).loss
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.01:
            break
    assert loss < 0.02 < 0.7 < first


@pytest.mark.parametrize("pooling", ["mean", "bos"])
def test_regression_and_many_labels(pooling):
    for options, labels in (
        ({"num_labels": 1}, torch.randn(4)),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, torch.ones(4, 3)),
    ):
        torch.manual_seed(0)
        settings = encoder_config(classifier_pooling=pooling, **options)
        model = nlp.StarformerEncoderForSequenceClassification(settings)
        out = model(TOKENS, labels=labels)
        if settings.num_labels == 1:
            expected = (out.logits[:, 0] - labels).square().mean()
        else:
            expected = torch.nn.functional.softplus(-out.logits).mean()
        torch.testing.assert_close(out.loss, expected)


def test_seq2seq_reads_its_labels_shifted():
    model = nlp.StarformerForConditionalGeneration(seq2seq_config(decoder_start_token_id=2)).eval()
    labels = torch.tensor([[5, 6, 7], [8, -100, -100]])
    shifted = model.prepare_decoder_input_ids_from_labels(labels)
    assert shifted.tolist() == [[2, 5, 6], [2, 8, 0]]
    out = model(TOKENS[:2], labels=labels)
    by_hand = model(TOKENS[:2], decoder_input_ids=shifted).logits.flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(by_hand, labels.flatten(), ignore_index=-100)
    torch.testing.assert_close(out.loss, expected)
    assert out.logits.shape == (2, 3, VOCAB)


def test_inputs_are_asked_for_once():
    model = nlp.StarformerModel(config())
    with pytest.raises(ValueError, match="got neither"):
        model()
    with pytest.raises(ValueError, match="got both"):
        model(TOKENS, inputs_embeds=torch.ones(4, 8, 32))
    both = nlp.StarformerForConditionalGeneration(seq2seq_config(bos_token_id=None))
    with pytest.raises(ValueError, match="decoder_start_token_id"):
        both(TOKENS, labels=TOKENS)


def test_only_the_logits_asked_for():
    model = nlp.StarformerForCausalLM(config()).eval()
    whole = model(TOKENS).logits
    mask = TOKENS % 3 == 0
    places = torch.tensor([[0, 2], [1, 1], [7, 3], [5, 6]])
    for wanted, expected in (
        (0, whole),
        (3, whole[:, 5:]),
        (torch.tensor([1, 4]), whole[:, [1, 4]]),
        (places, torch.stack([row[p] for row, p in zip(whole, places, strict=True)])),
        (mask, whole[mask]),
    ):
        torch.testing.assert_close(model(TOKENS, logits_to_keep=wanted).logits, expected)


@pytest.mark.parametrize("pooling", ["mean", "bos"])
def test_pooling_sees_no_padding_and_does_not_overflow(pooling):
    torch.manual_seed(0)
    settings = encoder_config(classifier_pooling=pooling)
    model = nlp.StarformerEncoderForSequenceClassification(settings).eval()
    padded = torch.cat([torch.zeros(4, 3, dtype=torch.long), TOKENS], 1)
    mask = (padded != 0).long()
    states = torch.randn(4, 11, 32)
    torch.testing.assert_close(
        model._pool(states, mask), model._pool(states[:, 3:], None), atol=1e-6, rtol=1e-5
    )
    long = torch.full((1, 3000, 32), 30.0, dtype=torch.float16)
    assert (model._pool(long, torch.ones(1, 3000)) == 30).all()
