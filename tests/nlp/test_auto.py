"""Auto classes make, save and load every model."""

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
from tests.nlp.tiny import VARIANTS, config, encoder_config, seq2seq_config


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
