"""`from_pretrained(starify=...)`: load any model, and starify it."""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    TorchAoConfig,
)

from starlayers import from_pretrained, starify
from starlayers.surgery import GatedMLP, StarProjection, gate_sizes, record_of, report
from tests.surgery.small import IDS, bert, gpt2, llama, train_gates


def stars(model):
    return [m for m in model.modules() if isinstance(m, (StarProjection, GatedMLP))]


@pytest.mark.parametrize("options", [True, {}, {"gate": "low_rank=2", "recompute": True}])
def test_a_plain_model_is_starified_when_it_is_loaded(tmp_path, options):
    model = bert()
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(
        AutoModelForSequenceClassification, tmp_path, starify=options, dtype=torch.float32
    ).eval()
    assert type(loaded) is type(model)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    wanted = {} if options is True else options
    assert {s.spec for s in stars(loaded)} == {wanted.get("gate", "full")}
    assert {s.recompute for s in stars(loaded)} == {wanted.get("recompute", False)}
    assert record_of(loaded) == loaded.config.star_mlp
    train_gates(loaded).save_pretrained(tmp_path / "star")
    again = from_pretrained(AutoModelForSequenceClassification, tmp_path / "star").eval()
    assert torch.equal(again(IDS).logits, loaded(IDS).logits)


def test_fused_in_one_line_with_dtype_and_info(tmp_path):
    llama().save_pretrained(tmp_path)
    model, info = from_pretrained(
        AutoModelForCausalLM,
        tmp_path,
        starify={"mode": "fuse", "recompute": True, "exclude": "model.layers.0"},
        dtype=torch.bfloat16,
        device_map={"": "cpu"},
        output_loading_info=True,
        attn_implementation="eager",
    )
    assert not info["missing_keys"]
    assert [row.state for row in report(model).rows] == [
        "is a star",
        "eager",
    ]  # no op for bfloat16 on a CPU
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"
    assert [s.star.recompute for s in stars(model)] == [True]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    error = (model.eval()(IDS).logits - plain.eval()(IDS).logits).abs().max()
    assert error <= 2**-7 * plain(IDS).logits.abs().max()


def test_overrides_of_the_config_reach_the_model(tmp_path):
    gpt2().save_pretrained(tmp_path)
    model = from_pretrained(
        AutoModelForCausalLM, tmp_path, starify={"gate": "scale"}, resid_pdrop=0.25
    )
    assert model.config.resid_pdrop == 0.25
    config = AutoConfig.from_pretrained(tmp_path)
    config.resid_pdrop = 0.5
    model = from_pretrained(AutoModelForCausalLM, tmp_path, starify=True, config=config)
    assert model.config.resid_pdrop == 0.5
    assert len(stars(model)) == model.config.n_layer


def test_a_quantised_model_keeps_its_layers_and_gets_gates_elsewhere(tmp_path):
    from torchao.quantization import Int8WeightOnlyConfig

    llama().save_pretrained(tmp_path)
    config = TorchAoConfig(
        Int8WeightOnlyConfig(version=2),
        modules_to_not_convert=["model.layers.0.mlp", "model.layers.1.mlp"],
    )
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config).eval()
    model = from_pretrained(
        AutoModelForCausalLM, tmp_path, starify={"grow": 1}, quantization_config=config
    ).eval()
    assert torch.equal(model(IDS).logits, plain(IDS).logits)
    attention = model.model.layers[0].self_attn
    assert type(attention.q_proj.weight.data) is not torch.Tensor
    assert len(stars(model)) == 2
    before = model(IDS).logits
    train_gates(model)
    assert not torch.equal(model(IDS).logits, before)


def test_a_starified_folder_keeps_its_gates_and_gets_options_on_top(tmp_path):
    model = train_gates(starify(bert(), gate="scale"))
    model.save_pretrained(tmp_path)
    sizes = gate_sizes(model)
    for options in (True, {"gate": "scale"}, {"recompute": True}, {"mode": "fuse"}):
        loaded = from_pretrained(
            AutoModelForSequenceClassification, tmp_path, starify=options
        ).eval()
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-6)
        assert gate_sizes(loaded) == sizes
        wanted = options if isinstance(options, dict) else {}
        assert {s.recompute for s in stars(loaded)} == {wanted.get("recompute", False)}
        assert {s.fused for s in stars(loaded)} == {wanted.get("mode") == "fuse"}


@pytest.mark.parametrize(
    ("build", "saved", "asked", "message"),
    [
        (bert, {"gate": "scale"}, {"gate": "full"}, "with gate=scale, and starify asks.*gate=full"),
        (bert, {}, {"gate": "low_rank=2"}, "with gate=full, and starify asks for gate=low_rank=2"),
        (llama, {"grow": 2}, {"grow": 1}, "with grow=2, and starify asks for grow=1"),
    ],
)
def test_other_gates_than_those_saved_are_refused(tmp_path, build, saved, asked, message):
    starify(build(), **saved).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        from_pretrained(AutoModel, tmp_path, starify=asked)


def test_bad_arguments(tmp_path):
    bert().save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=r"starify must be True or a dictionary .* got 'fuse'"):
        from_pretrained(AutoModel, tmp_path, starify="fuse")
    with pytest.raises(ValueError, match=r"AutoModel\.from_pretrained, or here with starify=True"):
        from_pretrained(AutoModel, tmp_path)
    with pytest.raises(ValueError, match=r"AutoModel\.from_pretrained, or here with starify=True"):
        from_pretrained(AutoModel, tmp_path, starify=False)
    with pytest.raises(ValueError, match="unknown mode 'fused'"):
        from_pretrained(AutoModel, tmp_path, starify={"mode": "fused"})
    with pytest.raises(ValueError, match="found no MLP to replace"):
        from_pretrained(AutoModel, tmp_path, starify={"mode": "fuse"})
