"""Adapters of PEFT on starified models: which base they load onto, and what they save."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
from peft import AutoPeftModel, LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from starlayers import from_pretrained, starify
from starlayers.surgery import bind_adapter, gate_names, gate_sizes, load_adapter, merge, revert
from tests.surgery.small import IDS, MLP, SIZES, Gated, Net, bert, llama, train_gates


def adapted(model, **options):
    """The model with an adapter that has learned something."""
    config = LoraConfig(**{"target_modules": ["q_proj", "gate_proj"], "r": 4, **options})
    model = get_peft_model(model, config)
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.2)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


# --- the base is remembered


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A grown model and an adapter of it in folders, and the logits of both together."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    base = train_gates(starify(llama(), grow=2))
    base.save_pretrained(folder / "base")
    model = adapted(base)
    model.save_pretrained(folder / "adapter")
    return folder, logits(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_loads_onto_its_base(trained, tmp_path, dtype):
    folder, expected = trained
    base = from_pretrained(AutoModelForCausalLM, folder / "base", dtype=dtype)
    model = load_adapter(base, folder / "adapter").eval()
    tolerance = 0 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(logits(model).float(), expected, rtol=0, atol=tolerance)
    model.save_pretrained(tmp_path)  # the base is remembered by what was loaded, too
    again = from_pretrained(AutoModelForCausalLM, folder / "base")
    assert type(load_adapter(again, tmp_path)) is type(model)


def test_other_bases_are_refused(trained):
    folder, _ = trained
    path = folder / "adapter"
    plain = llama()
    with pytest.raises(ValueError, match=r"with grow=2 at .*gate_proj, and this one has no gate"):
        load_adapter(plain, path)
    with pytest.raises(ValueError, match=r"with grow=2 at .*gate_proj, and this one has grow=1"):
        load_adapter(starify(llama(), grow=1), path)
    with pytest.raises(ValueError, match=r"other weights in .*star_grown\.f1\.weight: starlayers"):
        load_adapter(starify(llama(), grow=2), path)
    assert not any("lora" in name for name in plain.state_dict())


LOAD = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "starlayers":
            raise ImportError("starlayers is not here")
sys.meta_path.insert(0, Refuse())
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM
model = LlamaForCausalLM(LlamaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                     vocab_size=99, intermediate_size=64))
try:
    PeftModel.from_pretrained(model, sys.argv[1])
except KeyError as error:
    assert "load this adapter with starlayers.surgery.load_adapter" in str(error), error
    print("refused")
"""


@pytest.mark.hf
def test_a_process_without_starlayers_refuses_it(trained):
    folder, _ = trained
    program = [sys.executable, "-c", LOAD, str(folder / "adapter")]
    assert "refused" in subprocess.run(program, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize(
    "load",
    [
        lambda model, path: PeftModel.from_pretrained(model, path),
        lambda model, path: adapted(model).load_adapter(path, "another"),
        lambda model, path: model.load_adapter(path),
        lambda model, path: PeftConfig.from_pretrained(path),
        lambda model, path: AutoPeftModel.from_pretrained(path),
    ],
    ids=["PeftModel", "PeftModel.load_adapter", "transformers", "PeftConfig", "AutoPeftModel"],
)
def test_the_functions_of_peft_refuse_it(trained, load):
    with pytest.raises(KeyError, match=r"load this adapter with starlayers\.surgery\.load_adapter"):
        load(llama(), str(trained[0] / "adapter"))


def test_adapters_of_plain_models_are_refused(tmp_path):
    adapted(llama()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tells of no starified model: it was trained on a plain"):
        load_adapter(starify(llama(), grow=1), tmp_path)
    with pytest.raises(ValueError, match="this LlamaForCausalLM has no gates, so that"):
        bind_adapter(LoraConfig(), starify(llama(), mode="fuse"))


def test_fused_and_recomputed_is_the_same_base(trained):
    folder, expected = trained
    base = from_pretrained(AutoModelForCausalLM, folder / "base")
    starify(starify(base, mode="fuse"), recompute=True)
    model = load_adapter(base, folder / "adapter").eval()
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


def test_a_second_adapter(trained, tmp_path):
    folder, expected = trained
    model = load_adapter(from_pretrained(AutoModelForCausalLM, folder / "base"), folder / "adapter")
    assert load_adapter(model, folder / "adapter", adapter_name="second") is model
    model.set_adapter("second")
    assert torch.equal(logits(model.eval()), expected)


def test_a_checkpoint_is_resumed(trained):
    folder, expected = trained
    base = from_pretrained(AutoModelForCausalLM, folder / "base")
    model = adapted(base)
    model.load_adapter(folder / "adapter", "default", is_trainable=True)  # as Trainer does
    assert torch.equal(logits(model.eval()), expected)


def test_the_config_stays_what_it_was():
    model = starify(llama(), grow=1)
    config = LoraConfig(r=3, target_modules=["q_proj"])
    before = config.to_dict()
    assert bind_adapter(config, model) is config
    assert bind_adapter(config, model) is config
    assert isinstance(config, LoraConfig)
    assert type(config).__mro__[2] is LoraConfig
    assert config.to_dict() == before
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert other.to_dict() == before
        assert other.star_base == config.star_base


def test_the_file_holds_plain_data(trained):
    content = json.loads((trained[0] / "adapter" / "adapter_config.json").read_text())
    assert content["peft_type"].startswith("LORA on a starified model (load this adapter with")
    assert set(content["star_base"]["layers"].values()) == {"grow=2"}
    assert len(content["star_base"]["weights"]) == 4
    assert not list((trained[0] / "adapter").glob("*.tmp"))


def test_weights_that_cannot_be_read_are_not_compared(trained):
    folder, _ = trained
    base = starify(llama(), grow=2)
    for name, parameter in list(base.named_parameters()):
        if "star_grown" in name:  # as if quantised
            integers = nn.Parameter(parameter.detach().to(torch.int8), requires_grad=False)
            owner, _, leaf = name.rpartition(".")
            setattr(base.get_submodule(owner), leaf, integers)
    assert type(load_adapter(base, folder / "adapter")) is PeftModel
    with torch.device("meta"):
        meta = starify(llama(), grow=2)
    config = bind_adapter(LoraConfig(), meta)
    assert config.star_base["weights"] == {}


# --- the gates are saved with it


@pytest.mark.parametrize("options", [{"grow": 2}, {"grow": 1}])
def test_grown_products_are_trained_and_saved(tmp_path, options):
    base = starify(llama(), **options)
    names = gate_names(base)
    assert names == ["star_grown"]
    model = adapted(base, target_modules="all-linear", modules_to_save=names)
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert sum("star_grown" in name for name in trainable) == 4
    assert not any("star_grown" in name and "lora" in name for name in trainable)
    assert all(size > 0 for size in gate_sizes(model).values())
    expected = logits(model)
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)
    fresh = llama()
    fresh.load_state_dict(llama().state_dict())
    again = load_adapter(starify(fresh, **options), tmp_path).eval()
    assert torch.equal(logits(again), expected)
    merged = again.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gate", ["full", "low_rank=2", "scale"])
def test_gates_are_trained_and_saved(tmp_path, gate):
    base = starify(bert(), gate=gate)
    names = gate_names(base)
    assert names == ["dense.gate"]
    model = adapted(base, target_modules=["query"], modules_to_save=names)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    again = load_adapter(starify(bert(), gate=gate), tmp_path).eval()
    assert torch.equal(logits(again), expected)
    assert any(size > 0 for size in gate_sizes(again).values())


def test_routers_are_left_alone():
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    experts = {"num_experts": 4, "moe_intermediate_size": 16, "num_key_value_heads": 2}
    config = Qwen2MoeConfig(**SIZES, **experts, shared_expert_intermediate_size=48)
    model = starify(Qwen2MoeForCausalLM(config), grow=1)
    routers = [name for name, _ in model.named_modules() if name.endswith("mlp.gate")]
    assert len(routers) == 2
    model = adapted(model, target_modules=["q_proj"], modules_to_save=gate_names(model))
    wrapped = [n for n, m in model.named_modules() if type(m).__name__ == "ModulesToSaveWrapper"]
    assert len(wrapped) == 2
    assert all(name.endswith("shared_expert.star_grown") for name in wrapped)


def test_names_get_longer_where_others_end_alike():
    class Routed(MLP):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleDict({"fc1": nn.ModuleDict({"gate": nn.Linear(2, 2)})})

    net = starify(nn.ModuleDict({"first": Net(Routed(), Gated()), "b": Net(MLP())}), grow=1)
    assert gate_names(net) == ["0.fc1.gate", "star_grown"]
    with pytest.raises(ValueError, match="this Net has no gates of starify"):
        gate_names(Net(Gated()))
    alone = nn.ModuleDict({"fc1": MLP()})
    alone["xfc1"] = nn.ModuleDict({"fc1": nn.ModuleDict({"gate": nn.Linear(2, 2)})})
    with pytest.raises(ValueError, match=r"fc1\.fc1\.gate is the end of the name of another"):
        gate_names(starify(alone, include="fc1.fc1"))


def test_reverting_an_adapted_model_counts_its_gates():
    base = starify(llama(), grow=1)
    model = adapted(base, modules_to_save=gate_names(base))
    with pytest.warns(UserWarning, match="2 of 2 gates were not zero and are lost"):
        revert(model.get_base_model())


# --- adapters are bound by themselves


def saved_type(folder):
    return json.loads((folder / "adapter_config.json").read_text())["peft_type"]


def test_adapters_without_layers_are_bound_by_hand(tmp_path):
    from peft import PromptTuningConfig

    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = train_gates(starify(llama(), grow=1))
    get_peft_model(model, bind_adapter(config, model)).save_pretrained(tmp_path)
    assert saved_type(tmp_path).startswith("PROMPT_TUNING on a starified model")


def test_a_model_loaded_from_a_folder_binds(trained, tmp_path):
    base = from_pretrained(AutoModelForCausalLM, trained[0] / "base")
    adapted(base).save_pretrained(tmp_path)
    assert "load_adapter" in saved_type(tmp_path)


@pytest.mark.parametrize("leave", [revert, merge])
def test_plain_models_do_not_bind(tmp_path, leave):
    model = starify(llama(), grow=1)
    model = copy.deepcopy(model)
    assert len(model._state_dict_pre_hooks) == 1
    starify(model, recompute=True)
    assert len(model._state_dict_pre_hooks) == 1
    leave(model)
    assert not any(m._state_dict_pre_hooks for m in model.modules())
    assert b"starlayers" not in pickle.dumps(model)
    adapted(model).save_pretrained(tmp_path)
    assert saved_type(tmp_path) == "LORA"
    fused = starify(llama(), mode="fuse")
    assert not fused._state_dict_pre_hooks
    adapted(fused).save_pretrained(tmp_path / "fused")
    assert saved_type(tmp_path / "fused") == "LORA"
