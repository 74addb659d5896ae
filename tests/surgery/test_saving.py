"""Records of starified models, and `from_pretrained`."""

import copy
import json
import sys
from typing import ClassVar

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
from starlayers.surgery import (
    apply_record,
    record_of,
    report,
    revert,
    save_with_code,
    saving,
)
from starlayers.surgery.saving import GUARD
from tests.surgery.small import IDS, MLP, Gated, Net, Packed, bert, gpt2, llama, train_gates


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


def test_a_model_without_a_record_is_refused(tmp_path):
    bert().save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"has no record of one\. Load it with AutoModel\.from_pre"
    ):
        from_pretrained(AutoModel, tmp_path)


def test_classes_without_a_model_for_the_config_are_refused(tmp_path):
    model = starify(bert())
    model.save_pretrained(tmp_path)
    config = T5Config(star_mlp=record_of(model))
    with pytest.raises(TypeError, match=r"^AutoModelForCausalLM has no model for T5Config"):
        from_pretrained(AutoModelForCausalLM, tmp_path, config=config)
    with pytest.raises(TypeError, match=r"AutoConfig.* is no auto class or model class of transfo"):
        from_pretrained(AutoConfig, tmp_path)


@pytest.mark.parametrize("version", [0, 4, "2", None])
def test_records_of_other_versions_are_refused(tmp_path, version):
    record = {**record_of(starify(MLP())), "version": version}
    with pytest.raises(
        ValueError, match=rf"has version {version!r}, and .* reads versions 1, 2, 3"
    ):
        apply_record(MLP(), record)


def test_a_record_of_another_structure_is_refused(tmp_path):
    model = starify(bert())
    model.config.num_hidden_layers = 1
    model.config.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"layer\.1', which this BertModel does not have"):
        from_pretrained(AutoModel, tmp_path)


def earlier(record, anneal=0.0):
    """A record as version 1 wrote it."""
    layers = [{**layer, "anneal": anneal} for layer in record["layers"]]
    return {"version": 1, "layers": layers}


def test_records_of_version_1_are_read(x):
    model = train_gates(starify(Net(MLP(), Gated()), grow=1))
    other = apply_record(Net(MLP(), Gated()), earlier(record_of(model)))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    assert record_of(other) == record_of(model)


def test_annealed_activations_of_version_1_are_refused(tmp_path):
    model = starify(bert())
    record = earlier(record_of(model))
    record["layers"][1]["anneal"] = 0.25
    model.save_pretrained(tmp_path)
    model.config.star_mlp = record
    model.config.save_pretrained(tmp_path)
    message = (
        r"1 activations .*annealed, that of 'bert\.encoder\.layer\.1' to t=0\.25; this starlay"
    )
    with pytest.raises(ValueError, match=message):
        from_pretrained(AutoModelForSequenceClassification, tmp_path)
    plain = bert()
    with pytest.raises(ValueError, match=message):
        apply_record(plain, record)
    assert report(plain).replaced == []


def test_the_record_names_every_option():
    net = Net(MLP(), Gated(), Packed(gate_last=True))
    starify(net, include="blocks.0", gate="low_rank=3", recompute=True)
    starify(net, include="blocks.1", grow=2)
    starify(net, include="blocks.2", mode="fuse")
    site = {"up": None, "gate_last": False}
    assert record_of(net) == {
        "version": 3,
        "layers": [
            {
                "owner": "blocks.0",
                "site": {
                    **site,
                    "recipe": "chain",
                    "form": "plain",
                    "inp": "fc1",
                    "act": "act",
                    "out": "fc2",
                },
                "gate": "low_rank=3",
                "fused": False,
                "recompute": True,
            },
            {
                "owner": "blocks.1",
                "site": {
                    **site,
                    "recipe": "gated",
                    "form": "gated",
                    "inp": "gate",
                    "act": "act",
                    "out": "down",
                    "up": "up",
                },
                "grow": 2,
                "between": [],
                "fused": False,
                "recompute": False,
            },
            {
                "owner": "blocks.2",
                "site": {
                    **site,
                    "recipe": "packed",
                    "form": "packed",
                    "inp": "both",
                    "act": "act",
                    "out": "down",
                    "gate_last": True,
                },
                "grow": 0,
                "between": [],
                "fused": True,
                "recompute": False,
            },
        ],
    }
    again = apply_record(Net(MLP(), Gated(), Packed(True)), json.loads(json.dumps(record_of(net))))
    assert record_of(again) == record_of(net)
    assert record_of(Net(MLP())) == {}


def test_a_record_keeps_what_is_between(x):
    class Dropped(Gated):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            return self.down(self.drop(self.act(self.gate(x)) * self.up(x)))

    model = starify(Dropped(), grow=1)
    other = apply_record(Dropped(), record_of(model))
    assert other.star.between == ("drop",)
    assert other.star.original is Dropped


def test_apply_record_switches_the_inference_path_off():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    other = apply_record(copy.deepcopy(model), record_of(starify(copy.deepcopy(model))))
    assert not other.use_nested_tensor
    assert model.use_nested_tensor


@pytest.mark.parametrize(
    ("recorded", "there"), [("mlp", "mlp"), ("base.mlp", "mlp"), ("mlp", "base.mlp")]
)
def test_names_with_and_without_the_prefix(recorded, there):
    def nested(path):
        module = MLP()
        for name in reversed(path.split(".")):
            module = nn.ModuleDict({name: module})
        return module

    record = record_of(starify(nested(recorded)))
    model = apply_record(nested(there), record, prefix="base")
    assert [row.name for row in report(model).replaced] == [f"{there}.fc1"]
    if recorded != there:
        with pytest.raises(
            ValueError, match=f"the record names '{recorded}', which this ModuleDict"
        ):
            apply_record(nested(there), record)


class Config:
    """What is asked of a config of transformers."""

    def save_pretrained(self):
        """Mark it as one."""


def test_other_fusions_in_the_config_stay():
    model, config = MLP(), Config()
    model.config = config
    config.fusion_config = {"theirs": 1}
    starify(model)
    assert config.fusion_config == {"theirs": 1, GUARD: True}
    assert config.star_mlp == record_of(model)
    revert(model)
    assert config.fusion_config == {"theirs": 1}
    assert not hasattr(config, "star_mlp")
    del config.fusion_config
    starify(model)
    assert config.fusion_config == {GUARD: True}
    revert(model)
    assert not hasattr(config, "fusion_config")


def test_what_has_only_been_fused_leaves_the_config_alone():
    model = Gated()
    model.config = Config()
    starify(model, mode="fuse")
    assert vars(model.config) == {}
    starify(model, grow=1)
    assert model.config.star_mlp["layers"][0]["grow"] == 1


def test_only_parts_that_can_be_saved_have_records():
    class Part(MLP):
        def __init__(self, savable):
            super().__init__()
            self.config = Config()
            if savable:
                self.save_pretrained = lambda: None

    net = Net(Part(True), Part(False))
    net.config = "a string is no config"
    starify(net)
    assert [hasattr(b.config, "star_mlp") for b in net.blocks] == [True, False]
    assert net.blocks[0].config.star_mlp["layers"][0]["owner"] == ""


def test_transformers_is_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"needs transformers: pip install 'starlayers\[nlp\]'"):
        from_pretrained(None, "anywhere")


def test_options_of_the_hub_and_the_config_reach_transformers(tmp_path, monkeypatch):
    model = train_gates(starify(bert()))
    model.save_pretrained(tmp_path / "nested")
    loaded = from_pretrained(AutoModelForSequenceClassification, tmp_path, subfolder="nested")
    assert torch.equal(loaded.eval()(IDS).logits, model(IDS).logits)
    asked = {}
    original = AutoConfig.from_pretrained

    def from_config(path, **kwargs):
        asked.update(kwargs)
        return original(tmp_path / "nested")

    monkeypatch.setattr(AutoConfig, "from_pretrained", from_config)
    hub = {"revision": "main", "token": False, "local_files_only": True, "dtype": torch.float64}
    loaded = from_pretrained(BertModel, tmp_path / "nested", trust_remote_code=False, **hub)
    del hub["dtype"]
    assert asked == {**hub, "trust_remote_code": False}
    assert loaded.dtype == torch.float64


def test_a_config_of_ones_own_is_used(tmp_path):
    model = train_gates(starify(bert()))
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.hidden_act = "relu"
    loaded = from_pretrained(BertModel, tmp_path, config=config)
    assert loaded.encoder.layer[0].intermediate.dense.act_name == "relu"


def test_the_class_of_several_that_was_saved():
    class Auto:
        _model_mapping: ClassVar = {Config: (MLP, Gated), int: [MLP]}

    config = Config()
    for architectures, expected in ((["Gated"], Gated), (["Packed"], MLP), (None, MLP)):
        config.architectures = architectures
        assert saving._model_class(Auto, config) is expected
    Auto._model_mapping = {Config: Packed}
    assert saving._model_class(Auto, config) is Packed


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


# --- folders with code


@pytest.fixture
def dynamic_modules(monkeypatch, tmp_path):
    """Keep the copies that transformers makes of code in folders out of the user's cache."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.mark.parametrize(("build", "options"), [(llama, {"grow": 2}), (gpt2, {"gate": "full"})])
def test_auto_classes_load_a_folder_with_code(tmp_path, dynamic_modules, build, options):
    model = train_gates(starify(build(), **options))
    save_with_code(model, tmp_path / "star")
    assert getattr(model.config, "auto_map", None) is None
    load = AutoModelForCausalLM.from_pretrained
    loaded = load(tmp_path / "star", trust_remote_code=True).eval()
    assert type(loaded) is type(model)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    base = AutoModel.from_pretrained(tmp_path / "star", trust_remote_code=True, dtype=torch.float64)
    assert type(base) is type(model.base_model)
    assert {p.dtype for p in base.parameters()} == {torch.float64}
    with pytest.raises(ValueError, match=r"load this model with starlayers\.from_pretrained"):
        load(tmp_path / "star", trust_remote_code=False)
    # what is loaded is saved without the code, and says so
    assert getattr(loaded.config, "auto_map", None) is None
    loaded.save_pretrained(tmp_path / "again")
    again = from_pretrained(AutoModelForCausalLM, tmp_path / "again").eval()
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    save_with_code(loaded, tmp_path / "star")
    assert load(tmp_path / "star", trust_remote_code=True).config.star_mlp == record_of(model)


def test_code_is_refused_where_it_is_not_needed_or_not_possible(tmp_path):
    fused = starify(llama(), mode="fuse")
    for model in (llama(), fused):
        with pytest.raises(ValueError, match="LlamaForCausalLM has no gates or grown products: sa"):
            save_with_code(model, tmp_path / "star")
    model = starify(bert())
    model.config.auto_map = {"AutoModel": "theirs.Bert"}
    with pytest.raises(ValueError, match="has code of its own, by its config's auto_map"):
        save_with_code(model, tmp_path / "star")
    assert not (tmp_path / "star").exists()
