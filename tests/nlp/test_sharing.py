"""Folders with code: they load without starlayers, and ordinary saves stay ordinary."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from starlayers import nlp
from tests.nlp.tiny import VARIANTS, decoder, encoder_config, ids, seq2seq

WITHOUT_STARLAYERS = """
import sys
sys.modules["starlayers"] = None  # as if it were not installed
import json, torch, transformers
tokens, outputs = torch.tensor({tokens}), []
for auto, folder in {folders}:
    model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True).eval()
    assert model.__class__.__module__.startswith("transformers_modules"), model.__class__
    more = {{"decoder_input_ids": tokens}} if model.config.is_encoder_decoder else {{}}
    outputs.append(model(tokens, **more).logits.tolist())
print(json.dumps(outputs))
"""


def tagger(variant):
    torch.manual_seed(0)
    return nlp.StarformerEncoderForTokenClassification(encoder_config(**VARIANTS[variant])).eval()


def test_folders_with_code_load_where_starlayers_is_not_installed(tmp_path):
    makers = {
        "AutoModelForCausalLM": decoder,
        "AutoModelForSeq2SeqLM": seq2seq,
        "AutoModelForTokenClassification": tagger,
    }
    models = {
        (auto, variant): make(variant)
        for auto, make in makers.items()
        for variant in ("hybrid-gated", "plain")
    }
    folders = [(auto, str(tmp_path / auto / variant)) for auto, variant in models]
    for model, (_, folder) in zip(models.values(), folders, strict=True):
        nlp.save_with_code(model, folder)
    tokens = ids(2, 5)
    script = WITHOUT_STARLAYERS.format(tokens=tokens.tolist(), folders=folders)
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    outputs = json.loads(done.stdout)
    for model, there in zip(models.values(), outputs, strict=True):
        more = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
        with torch.no_grad():
            expected = model(tokens, **more).logits
        torch.testing.assert_close(torch.tensor(there), expected, atol=1e-5, rtol=1e-5)


def test_ordinary_saves_stay_ordinary(tmp_path):
    model = decoder()
    model.config.auto_map = {"AutoTokenizer": ["mine.Tokenizer", None]}
    nlp.save_with_code(model, tmp_path / "with")
    assert model.config.auto_map == {"AutoTokenizer": ["mine.Tokenizer", None]}
    del model.config.auto_map
    assert "auto_map" in json.loads((tmp_path / "with" / "config.json").read_text())
    model.save_pretrained(tmp_path / "without")
    assert not list((tmp_path / "without").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "without" / "config.json").read_text())
    # where starlayers is imported, its own class loads the folder, code or no code
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "with")
    assert type(loaded) is type(model)
    loaded.save_pretrained(tmp_path / "again")  # without code, so without naming any
    named = json.loads((tmp_path / "again" / "config.json").read_text())["auto_map"]
    assert named == {"AutoTokenizer": ["mine.Tokenizer", None]}
    with pytest.raises(ValueError, match=r"got torch\.\S+\.Linear"):
        nlp.save_with_code(torch.nn.Linear(2, 2), tmp_path)


def test_the_classes_are_as_before_even_after_an_error(tmp_path, monkeypatch):
    model = decoder()
    before = type(model)._auto_class, type(model.config)._auto_class

    def save(folder):
        now = type(model)._auto_class, type(model.config)._auto_class
        assert now == ("AutoModelForCausalLM", "AutoConfig")
        raise OSError("disk full")

    monkeypatch.setattr(model, "save_pretrained", save)
    with pytest.raises(OSError, match="disk full"):
        nlp.save_with_code(model, tmp_path)
    assert (type(model)._auto_class, type(model.config)._auto_class) == before == (None, None)


def test_every_file_of_code_is_saved(tmp_path):
    package = os.path.dirname(nlp.__file__)
    code = {name for name in os.listdir(package) if name.endswith("_starformer.py")}
    assert len(code) == 5
    nlp.save_with_code(decoder(), tmp_path)
    assert {name for name in os.listdir(tmp_path) if name.endswith(".py")} == code
