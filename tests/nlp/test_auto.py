"""Auto classes, the heads they make, and what the package imports."""

import subprocess
import sys

import pytest
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from starlayers import nlp
from starlayers.nlp.auto import AUTO_CLASSES, register_auto_classes
from tests.nlp.tiny import VARIANTS, VOCAB, config, encoder_config, ids, seq2seq_config


def test_auto_classes_make_the_family():
    assert type(AutoModel.from_config(config())) is nlp.StarformerModel
    assert type(AutoModelForSeq2SeqLM.from_config(seq2seq_config())) is (
        nlp.StarformerForConditionalGeneration
    )
    assert type(AutoModelForSequenceClassification.from_config(encoder_config())) is (
        nlp.StarformerEncoderForSequenceClassification
    )


def test_registering_again_changes_nothing():
    register_auto_classes()
    assert type(AutoModel.from_config(encoder_config())) is nlp.StarformerEncoderModel
    assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["starformer"] == "StarformerForCausalLM"
    for settings in (config(), encoder_config(), seq2seq_config()):
        made = AutoConfig.for_model(settings.model_type)
        assert type(made) is type(settings)


def test_every_model_has_one_auto_class():
    models = [m for listed in AUTO_CLASSES.values() for m in listed]
    assert len(models) == len(set(models))
    assert {m.__name__ for m in models} == {
        n for n in nlp.__all__ if n.endswith("Model") or "For" in n
    }


@pytest.mark.parametrize("kind", [m for models in AUTO_CLASSES.values() for m in models])
def test_saved_and_loaded_by_the_auto_class(kind, tmp_path):
    torch.manual_seed(0)
    build = {"starformer": config, "starformer_encoder": encoder_config}
    settings = build.get(kind.config_class.model_type, seq2seq_config)(
        **{**VARIANTS["hybrid-gated"], "num_labels": 3}
    )
    model = kind(settings).eval()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    if kind is nlp.StarformerForCausalLM:
        assert len(list(tmp_path.glob("*.safetensors"))) > 2
    auto = next(name for name, models in AUTO_CLASSES.items() if kind in models)
    assert type(AutoConfig.from_pretrained(tmp_path)) is kind.config_class
    loaded, report = getattr(transformers, auto).from_pretrained(
        tmp_path, output_loading_info=True, low_cpu_mem_usage=True
    )
    assert type(loaded) is kind
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert loaded.config.layer_types == model.config.layer_types


# --- importing starlayers.nlp needs transformers and nothing else beside torch


#: installed with the tests and used by examples, studies and data sets
OPTIONAL = (
    *("accelerate", "datasets", "matplotlib", "pandas", "peft", "sacrebleu", "scipy", "sklearn"),
    *("timm", "torchvision", "typer"),
)
SAVE_AND_LOAD = f"""
import sys
for name in {OPTIONAL!r}:
    sys.modules[name] = None  # as if it were not installed
import torch
from starlayers.nlp import StarformerConfig, StarformerForCausalLM, from_llama, to_llama
config = StarformerConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2,
                          num_attention_heads=4, layer_types=["star_conv", "attention"])
model = StarformerForCausalLM(config).eval()
ids = torch.tensor([[1, 5, 7]])
model(ids, labels=ids).loss.backward()
model.save_pretrained("saved")
again = StarformerForCausalLM.from_pretrained("saved").eval()
assert torch.equal(model(ids).logits, again(ids).logits)
print(again.generate(ids, min_new_tokens=4, max_new_tokens=4).shape[1])
"""


def run(code, folder=None):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)


def test_transformers_is_enough(tmp_path):
    done = run(SAVE_AND_LOAD, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "7\n"


def test_the_extra_is_named_where_transformers_is_missing():
    code = "import sys; sys.modules['transformers'] = None; import starlayers.nlp"
    done = run(code)
    assert done.returncode == 1
    assert "ImportError: starlayers.nlp needs transformers: pip install 'starlayers[nlp]'" in (
        done.stderr
    )


# --- each head learns one small batch by heart


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
