"""transformers' own model tests on each family: the default one, and one of all star parts.

The list of skips names tests that exist, as the table has them all.
"""

import unittest
from typing import ClassVar

import pytest
import transformers
from packaging.version import Version

from starlayers import nlp
from tests.nlp.hf import harness, skips
from tests.nlp.hf.testers import EncoderFamily, Family, HybridFamily, Seq2SeqFamily

DECODER = harness.mixins("model", "generation", "training", "tensor_parallel", "fsdp")
ENCODER = harness.mixins("model", "training", "tensor_parallel")
SEQ2SEQ = harness.mixins("model", "generation", "training", "tensor_parallel")


class StarformerTest(Family, *DECODER, unittest.TestCase):
    config_class = nlp.StarformerConfig
    classes: ClassVar = {
        "base": nlp.StarformerModel,
        "causal_lm": nlp.StarformerForCausalLM,
        "sequence_classification": nlp.StarformerForSequenceClassification,
        "token_classification": nlp.StarformerForTokenClassification,
        "question_answering": nlp.StarformerForQuestionAnswering,
    }


class HybridStarformerTest(HybridFamily, StarformerTest):
    fields: ClassVar = {
        "layer_types": ["star_conv", "attention"],
        "attention_gate": "channel",
        "hidden_act": None,
        "mlp_rank": 2,
    }


class StarformerEncoderTest(EncoderFamily, *ENCODER, unittest.TestCase):
    config_class = nlp.StarformerEncoderConfig
    classes: ClassVar = {
        "base": nlp.StarformerEncoderModel,
        "masked_lm": nlp.StarformerForMaskedLM,
        "sequence_classification": nlp.StarformerEncoderForSequenceClassification,
        "token_classification": nlp.StarformerEncoderForTokenClassification,
        "question_answering": nlp.StarformerEncoderForQuestionAnswering,
    }


class HybridStarformerEncoderTest(HybridFamily, StarformerEncoderTest):
    fields: ClassVar = {
        "layer_types": ["star_conv", "attention"],
        "attention_gate": "head",
        "hidden_act": "relu6",
        "mlp_offset": 1.0,
        "classifier_pooling": "bos",
    }


class StarformerSeq2SeqTest(Seq2SeqFamily, *SEQ2SEQ, unittest.TestCase):
    config_class = nlp.StarformerSeq2SeqConfig
    classes: ClassVar = {
        "base": nlp.StarformerSeq2SeqModel,
        "seq2seq_lm": nlp.StarformerForConditionalGeneration,
    }


class HybridStarformerSeq2SeqTest(HybridFamily, StarformerSeq2SeqTest):
    fields: ClassVar = {
        "layer_types": ["star_conv", "attention"],
        "encoder_layer_types": ["attention", "star_conv"],
        "attention_gate": "channel",
        "hidden_act": None,
    }


FAMILIES = [
    StarformerTest,
    HybridStarformerTest,
    StarformerEncoderTest,
    HybridStarformerEncoderTest,
    StarformerSeq2SeqTest,
    HybridStarformerSeq2SeqTest,
]


@pytest.mark.parametrize("skip", skips.MODEL + skips.MACHINE, ids=lambda skip: skip.tests)
def test_listed_tests_exist(skip):
    if Version(transformers.__version__) < Version(skip.since):
        pytest.skip(f"not before transformers {skip.since}")
    named = [(f.__name__, name) for f in FAMILIES for name in dir(f) if name.startswith("test_")]
    assert any(skip is skips.entry(*test) for test in named)


def test_table():
    assert skips.table().count("\n") == 1 + len(skips.MODEL + skips.MACHINE) + len(skips.LEFT_OUT)
