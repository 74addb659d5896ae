"""Records of starified models, and `from_pretrained`."""

import copy
import json

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    BertModel,
    T5Config,
    T5ForConditionalGeneration,
)

from starlayers import from_pretrained, starify
from starlayers.surgery import apply_record, gate_parameters, record_of, report, revert
from tests.surgery.small import MLP, Gated, Net, Packed, train_gates
from tests.surgery.tiny_models import IDS, bert, gpt2, llama


@pytest.mark.parametrize(
    ("build", "auto_class", "options"),
    [
        (bert, AutoModelForSequenceClassification, {"gate": "full"}),
        (bert, BertForSequenceClassification, {"gate": "low_rank=3"}),
        (gpt2, AutoModelForCausalLM, {"gate": "scale"}),
        (llama, AutoModelForCausalLM, {"grow": 2}),
    ],
)
@pytest.mark.parametrize("shard", [None, "20KB"])
def test_round_trip_bit_for_bit(tmp_path, build, auto_class, options, shard):
    model = train_gates(starify(build(), recompute=True, **options))
    model.save_pretrained(tmp_path, **({"max_shard_size": shard} if shard else {}))
    assert (tmp_path / "model.safetensors.index.json").exists() is bool(shard)
    loaded = from_pretrained(auto_class, tmp_path).eval()
    assert type(loaded) is type(model)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert record_of(loaded) == record_of(model) == loaded.config.star_mlp
    loaded.save_pretrained(tmp_path / "again")
    again = from_pretrained(auto_class, tmp_path / "again").eval()
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_dtype_and_loading_info(tmp_path):
    train_gates(starify(bert())).save_pretrained(tmp_path)
    model, info = from_pretrained(
        BertForSequenceClassification, tmp_path, dtype=torch.bfloat16, output_loading_info=True
    )
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_another_head_or_none(tmp_path):
    model = train_gates(starify(bert()))
    model.save_pretrained(tmp_path)
    base = from_pretrained(AutoModel, tmp_path).eval()
    assert type(base) is BertModel
    want = model.bert(IDS).last_hidden_state
    assert torch.equal(base(IDS).last_hidden_state, want)
    base.save_pretrained(tmp_path / "base")
    headed, info = from_pretrained(
        AutoModelForSequenceClassification, tmp_path / "base", output_loading_info=True
    )
    assert torch.equal(headed.eval().bert(IDS).last_hidden_state, want)
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    model.bert.save_pretrained(tmp_path / "part")
    part = from_pretrained(AutoModel, tmp_path / "part").eval()
    assert torch.equal(part(IDS).last_hidden_state, want)


def test_a_part_that_was_starified_is_recorded_too(tmp_path):
    model = bert()
    train_gates(starify(model.bert.encoder.layer[1]))
    starify(model, include="bert.encoder.layer.1")  # the whole model learns of it here
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(AutoModelForSequenceClassification, tmp_path).eval()
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert [row.state for row in report(loaded).rows] == ["ready", "star"]


@pytest.mark.parametrize("auto_class", [AutoModelForSequenceClassification, BertModel])
def test_the_plain_classes_refuse(tmp_path, auto_class):
    starify(bert()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"load this model with starlayers\.from_pretrained"):
        auto_class.from_pretrained(tmp_path)


def test_encoder_and_decoder(tmp_path):
    config = T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=99)
    model = train_gates(starify(T5ForConditionalGeneration(config).eval()))
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(T5ForConditionalGeneration, tmp_path).eval()
    out = [m(input_ids=IDS, decoder_input_ids=IDS).logits for m in (model, loaded)]
    assert torch.equal(*out)


def test_what_is_plain_again_is_saved_plain(tmp_path):
    model = bert()
    y = model(IDS).logits
    revert(starify(model)).save_pretrained(tmp_path)
    assert "star_mlp" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(
        BertForSequenceClassification.from_pretrained(tmp_path).eval()(IDS).logits, y
    )


def test_what_is_only_fused_is_saved_as_it_was(tmp_path):
    model = llama()
    y = model(IDS).logits
    starify(model, mode="fuse").save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).eval()(IDS).logits, y)


def test_errors(tmp_path):
    bert().save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="has no record of one"):
        from_pretrained(AutoModel, tmp_path / "plain")
    model = starify(bert())
    model.save_pretrained(tmp_path / "star")
    config = T5Config(star_mlp=record_of(model))
    with pytest.raises(TypeError, match="AutoModelForCausalLM has no model for T5Config"):
        from_pretrained(AutoModelForCausalLM, tmp_path / "star", config=config)
    with pytest.raises(TypeError, match="no auto class or model class"):
        from_pretrained(AutoConfig, tmp_path / "star")
    model.config.star_mlp = {**model.config.star_mlp, "version": 99}
    model.config.save_pretrained(tmp_path / "star")
    with pytest.raises(ValueError, match="version 99"):
        from_pretrained(AutoModel, tmp_path / "star")
    model.config.star_mlp["version"] = 1
    model.config.num_hidden_layers = 1
    model.config.save_pretrained(tmp_path / "star")
    with pytest.raises(ValueError, match=r"layer\.1', which this BertModel does not have"):
        from_pretrained(AutoModel, tmp_path / "star")


def test_loading_twice_and_then_a_plain_one(tmp_path):
    plain = bert()
    plain.save_pretrained(tmp_path / "plain")
    model = train_gates(starify(bert()))
    model.save_pretrained(tmp_path / "star")
    twins = [from_pretrained(BertForSequenceClassification, tmp_path / "star") for _ in range(2)]
    outs = [twin.eval()(IDS).logits for twin in twins]
    assert torch.equal(*outs)
    assert twins[0].config is not twins[1].config
    again = BertForSequenceClassification.from_pretrained(tmp_path / "plain").eval()
    assert torch.equal(again(IDS).logits, plain(IDS).logits)
    assert report(again).replaced == []


def test_a_plain_model_with_the_config_of_a_starified_one(tmp_path):
    model = starify(bert())
    BertForSequenceClassification(model.config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks 4 weights of the gates.*layer\.0"):
        from_pretrained(AutoModelForSequenceClassification, tmp_path)


def test_parts_with_configs_of_their_own(tmp_path):
    from transformers import CLIPTextModel

    from tests.surgery.architectures import ARCHITECTURES

    clip = next(a for a in ARCHITECTURES if a.name == "clip").build().eval()
    train_gates(starify(clip))
    clip.save_pretrained(tmp_path / "whole")
    loaded = from_pretrained(type(clip), tmp_path / "whole").eval()
    ours, theirs = clip.state_dict(), loaded.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    clip.text_model.save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match=r"starlayers\.from_pretrained"):
        CLIPTextModel.from_pretrained(tmp_path / "text")
    part = from_pretrained(CLIPTextModel, tmp_path / "text").eval()
    want = clip.text_model(IDS).last_hidden_state
    assert torch.equal(part(IDS).last_hidden_state, want)
