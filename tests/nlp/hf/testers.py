"""Families for transformers' mixins: a tester that makes configs and inputs, and overrides."""

from typing import ClassVar
from unittest import mock

import torch
from transformers.models.auto import modeling_auto

TABLES = {
    "base": "MODEL_MAPPING_NAMES",
    "causal_lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked_lm": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "seq2seq_lm": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "sequence_classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "token_classification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "question_answering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
}

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class Tester:
    """Small configs and inputs of a decoder or an encoder, for transformers' mixins."""

    batch_size = 13
    seq_length = 7
    is_training = True

    def __init__(self, config_class, fields):
        self.config_class = config_class
        self.fields = SIZES | fields
        for name in ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size"):
            setattr(self, name, self.fields[name])

    def get_config(self):
        return self.config_class(**self.fields)

    def prepare_config_and_inputs_for_common(self):
        # row i has i + 1 tokens and then padding, which is what batches look like
        mask = torch.ones(self.batch_size, self.seq_length, dtype=torch.long).tril()
        return self.get_config(), {"input_ids": self.tokens(), "attention_mask": mask}

    def tokens(self):
        """Token ids, none of them special."""
        return torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length))


class Seq2SeqTester(Tester):
    """The same for an encoder-decoder."""

    def prepare_config_and_inputs_for_common(self):
        config, inputs = super().prepare_config_and_inputs_for_common()
        decoder = {
            "decoder_input_ids": self.tokens(),
            "decoder_attention_mask": inputs["attention_mask"],
        }
        return config, inputs | decoder


class Family:
    """Base of a test class: `config_class`, `classes` by task and the config's own `fields`.

    While the class runs its model classes stand in transformers' tables of names, by which the
    mixins tell what labels a model takes.
    """

    config_class: type
    classes: ClassVar[dict[str, type]] = {}
    fields: ClassVar[dict[str, object]] = {}
    makes_inputs = Tester

    test_can_init_all_missing_weights_before_2023 = True  # it goes by the copyright line otherwise
    model_tester = None

    def __init_subclass__(cls, **kwargs):
        cls.all_model_classes = tuple(cls.classes.values())
        super().__init_subclass__(**kwargs)

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        for task, model_class in cls.classes.items():
            table = getattr(modeling_auto, TABLES[task])
            named = mock.patch.dict(table, {cls.config_class.model_type: model_class.__name__})
            named.start()
            cls.addClassCleanup(named.stop)

    def setUp(self):
        super().setUp()
        torch.manual_seed(0)
        tester = self.makes_inputs(self.config_class, self.fields)
        for task, model_class in self.classes.items():
            setattr(tester, f"{task}_class", model_class)
        self.model_tester = tester

    def test_config(self):
        from tests.nlp.hf import harness

        common = harness.module("test_configuration_common")
        common.ConfigTester(self, self.config_class, hidden_size=48).run_common_tests()

    def _get_trainable_model_class(self):
        return self.all_model_classes[1]  # the language model; training starts from its loss


class EncoderFamily(Family):
    """Overrides for a language model that does not generate."""

    def _get_tp_model_class(self):
        generates = self._testMethodName.startswith("test_tp_generation")
        return None if generates else self.classes["masked_lm"]


class Seq2SeqFamily(Family):
    """Overrides for one configuration of both sides, and for an input that is not the output."""

    makes_inputs = Seq2SeqTester
    is_encoder_decoder = True

    def setUp(self):
        super().setUp()
        if self._testMethodName.startswith("test_model_rope"):
            # they change what `get_text_config` returns: a copy, where one config has both sides
            whole = mock.patch.object(self.config_class, "get_text_config", lambda self, **_: self)
            whole.start()
            self.addCleanup(whole.stop)

    def _create_text_training_batch(self, **sizes):
        """The encoder sees the first token, as in the generation that follows; the rest is said."""
        tokens = super()._create_text_training_batch(**sizes)["input_ids"]
        mask = torch.zeros_like(tokens)
        mask[:, 0] = 1
        return {"input_ids": tokens, "attention_mask": mask, "labels": tokens[:, 1:].clone()}


class HybridFamily:
    """Overrides for layers without attention maps, as transformers' own hybrids have them."""

    def test_attention_outputs(self):
        """One map for each attention layer, and none for the others."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        wanted = {"attentions": config.layer_types.count("full_attention")}
        if self.is_encoder_decoder:
            wanted = {
                "encoder_attentions": config.encoder_layer_types.count("full_attention"),
                "decoder_attentions": wanted["attentions"],
                "cross_attentions": config.num_hidden_layers,
            }
        shape = (self.model_tester.num_attention_heads, *2 * [self.model_tester.seq_length])
        for model_class in self.all_model_classes:
            with self.subTest(model_class.__name__):
                model = model_class._from_config(config, attn_implementation="eager").eval()
                output = model(**inputs, output_attentions=True)
                for name, count in wanted.items():
                    assert len(output[name]) == count
                    assert all(maps.shape[1:] == shape for maps in output[name])
