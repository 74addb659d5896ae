"""transformers' own model tests on the encoder-decoders: the default one, and a hybrid."""

import unittest
from typing import ClassVar

from starlayers import nlp
from tests.nlp.hf import harness
from tests.nlp.hf.testers import HybridFamily, Seq2SeqFamily

MIXINS = harness.mixins("model", "generation", "training", "tensor_parallel")


class StarformerSeq2SeqTest(Seq2SeqFamily, *MIXINS, unittest.TestCase):
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
