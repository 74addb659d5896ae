"""Use with other libraries: Trainer, PEFT, compile, export, ONNX, pipelines, resizing."""

import pytest
import torch
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments, pipeline

from starlayers import nlp
from tests.nlp.tiny import VARIANTS, config, decoder, encoder_config, ids, seq2seq

pytestmark = pytest.mark.usefixtures("frozen_heap")
SOME = pytest.mark.parametrize("variant", ["silu", "bilinear-rank2", "hybrid-gated"])


def one_quick(marker):
    """`SOME`, of which the variants with less code carry a marker."""
    others = [pytest.param(name, marks=marker) for name in ("silu", "bilinear-rank2")]
    return pytest.mark.parametrize("variant", ["hybrid-gated", *others])


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


def loss_of(model, tokens):
    with torch.no_grad():
        return model.eval()(tokens, labels=tokens).loss.item()


def trained(model, folder, **options):
    data = [{"input_ids": row, "labels": row} for row in ids(16, 12)]
    arguments = TrainingArguments(
        str(folder), max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2,
        report_to="none", use_cpu=True, disable_tqdm=True, logging_steps=1, save_steps=2, **options,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    return trainer


@SOME
@pytest.mark.parametrize("reentrant", [True, False])
def test_trainer_with_gradient_checkpointing_learns_the_same(variant, reentrant, tmp_path):
    plain = trained(decoder(variant), tmp_path / "plain")
    saving = trained(
        decoder(variant),
        tmp_path / "saving",
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    tokens = ids(16, 12)
    assert loss_of(plain.model, tokens) < loss_of(decoder(variant), tokens) - 0.1
    for a, b in zip(plain.model.parameters(), saving.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_trainer_resumes_to_the_same_weights(tmp_path):
    whole = trained(decoder(), tmp_path / "a")
    arguments = whole.args
    trainer = Trainer(decoder(), arguments, train_dataset=whole.train_dataset)
    trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    for a, b in zip(whole.model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("variant", [*VARIANTS])
def test_lora_on_all_linears_has_its_say_and_merges(variant):
    from peft import LoraConfig, get_peft_model

    model, tokens = decoder(variant), ids(2, 6)
    before = logits(model, tokens)
    adapted = get_peft_model(
        model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    torch.testing.assert_close(logits(adapted, tokens), before)
    names = {
        name.rsplit(".lora_A", 1)[0] for name, _ in adapted.named_parameters() if "lora_A" in name
    }
    linears = sum(isinstance(m, torch.nn.Linear) for m in decoder(variant).modules()) - 1  # no head
    assert len(names) == linears
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        adapted(tokens, labels=tokens).loss.backward()
        optimizer.step()
    moved = [n for n, p in adapted.named_parameters() if "lora_B" in n and p.abs().max() > 0]
    assert len(moved) == linears  # also those inside of the star MLP
    after = logits(adapted, tokens)
    assert (after - before).abs().max() > 1e-3
    merged = adapted.merge_and_unload()
    assert type(merged) is nlp.StarformerForCausalLM
    torch.testing.assert_close(logits(merged, tokens), after, atol=1e-5, rtol=1e-4)


def test_a_fused_forward_does_not_bypass_lora():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    wide = nlp.StarformerForCausalLM(config(hidden_size=256, intermediate_size=1024)).eval()
    x = torch.randn(12, 100, 256)
    with torch.no_grad():
        assert wide.model.layers[0].ffn.mlp.plan(x).fused
    adapted = get_peft_model(
        wide, LoraConfig(r=4, target_modules=["f2"], init_lora_weights=False, task_type="CAUSAL_LM")
    )
    tokens = ids(12, 100)
    changed = logits(adapted, tokens)
    with adapted.disable_adapter():
        assert (changed - logits(adapted, tokens)).abs().max() > 1e-2


@one_quick(pytest.mark.slow)
def test_a_decoder_step_compiles_in_one_graph(variant):
    model, tokens = decoder(variant), ids(2, 6)
    step = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(step, tokens), logits(model, tokens), atol=1e-5, rtol=1e-5)
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=8)
    with torch.no_grad():
        model(tokens[:, :5], past_key_values=cache, use_cache=True)
        last = step(
            tokens[:, 5:], past_key_values=cache, use_cache=True, position_ids=torch.tensor([[5]])
        ).logits
    torch.testing.assert_close(last, logits(model, tokens)[:, 5:], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@SOME
def test_inductor_compiles_a_training_step(variant):
    model, tokens = decoder(variant), ids(2, 6)
    expected = model(tokens, labels=tokens).loss
    compiled = torch.compile(model, fullgraph=True)
    loss = compiled(tokens, labels=tokens).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)


@one_quick(pytest.mark.export)
def test_torch_export_with_a_dynamic_batch_and_length(variant):
    from transformers.exporters import DynamoConfig, DynamoExporter

    model, tokens = decoder(variant), ids(2, 6)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": False}
    program = DynamoExporter().export(model, dict(inputs), DynamoConfig(dynamic=True))
    other = ids(3, 9)
    inputs = {"input_ids": other, "attention_mask": torch.ones_like(other)}
    out = getattr(program, "program", program).module()(**inputs)  # before 5.20 not wrapped
    torch.testing.assert_close(out["logits"], logits(model, other), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "variant"),
    [  # families differ in masks and caches, variants in layers: the two do not interact
        ("encoder", "hybrid-gated"),
        pytest.param("decoder", "hybrid-gated", marks=pytest.mark.export),
        pytest.param("decoder", "silu", marks=pytest.mark.export),
        pytest.param("decoder", "bilinear-rank2", marks=pytest.mark.export),
        pytest.param("seq2seq", "hybrid-gated", marks=pytest.mark.export),
    ],
)
def test_onnx_computes_the_same(family, variant, tmp_path):
    import onnxruntime
    from transformers.exporters import OnnxConfig, OnnxExporter

    torch.manual_seed(0)
    options = VARIANTS[variant]
    inputs, others = ({"input_ids": ids(b, n)} for b, n in ((2, 6), (3, 9)))
    if family == "decoder":
        model = decoder(variant)
    elif family == "encoder":
        model = nlp.StarformerEncoderForSequenceClassification(encoder_config(**options)).eval()
    else:
        model = seq2seq(variant)
    for given, (b, n) in ((inputs, (2, 5)), (others, (3, 7))):
        given["attention_mask"] = torch.ones_like(given["input_ids"])
        given["attention_mask"][0, -2:] = 0
        if family == "seq2seq":
            given["decoder_input_ids"] = ids(b, n, seed=1)
    settings = {} if family == "encoder" else {"use_cache": False}
    program = OnnxExporter().export(model, {**inputs, **settings}, OnnxConfig(dynamic=True))
    # before 5.20 an ONNXProgram
    program.save_pretrained(tmp_path) if hasattr(program, "save_pretrained") else program.save(
        str(tmp_path / "model.onnx")
    )
    (file,) = tmp_path.glob("**/*.onnx")
    session = onnxruntime.InferenceSession(str(file))
    names = [i.name for i in session.get_inputs()]
    feeds = {name: others[name].numpy() for name in names}
    (out, *_) = session.run(["logits"], feeds)
    with torch.no_grad():
        expected = model(**others).logits
    torch.testing.assert_close(torch.from_numpy(out), expected, atol=1e-4, rtol=1e-4)


@SOME
def test_bfloat16(variant):
    model, tokens = decoder(variant), ids(2, 6)
    exact = logits(model, tokens)
    rounded = decoder(variant).bfloat16()
    out = rounded(tokens, labels=tokens)
    out.loss.backward()
    assert out.logits.dtype == torch.bfloat16
    assert (out.logits.float() - exact).abs().max() < 0.1 * exact.abs().max()
    assert all(p.grad.isfinite().all() for p in rounded.parameters())
    generated = rounded.eval().generate(tokens, do_sample=False, max_new_tokens=3)
    assert generated.shape[1] <= 9


def test_meta_init_then_materialised_is_a_fresh_model():
    with torch.device("meta"):
        model = nlp.StarformerForCausalLM(config(**VARIANTS["hybrid-gated"]))
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    model.init_weights()
    conv = model.model.layers[0].conv.conv.weight
    assert 0.4 < conv.std() < 0.8  # 3 ** -0.5
    assert torch.isfinite(logits(model, ids(1, 4))).all()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("build", [decoder, seq2seq], ids=["decoder", "seq2seq"])
def test_resized_embeddings_keep_the_old_tokens(build, tied):
    model = build(tie_word_embeddings=tied)
    tokens = ids(2, 6)
    more = {"decoder_input_ids": ids(2, 4, seed=1)} if build is seq2seq else {}
    with torch.no_grad():
        before = model(tokens, **more).logits
        model.resize_token_embeddings(120)
        after = model(tokens, **more).logits
    assert after.shape[-1] == 120 == model.config.vocab_size
    torch.testing.assert_close(after[..., :99], before)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(95))]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>",
    )  # fmt: skip


def test_text_generation_pipeline(tokenizer):
    model = decoder()
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    how = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    out = generate(["w1 w2 w3", "w4"], return_full_text=False, **how)
    for prompt, answer in zip(["w1 w2 w3", "w4"], out, strict=True):
        tokens = tokenizer(prompt, return_tensors="pt").input_ids
        new = model.generate(tokens, **how)[0, tokens.shape[1] :]
        assert answer[0]["generated_text"] == tokenizer.decode(new, skip_special_tokens=True)


def test_text_classification_pipeline(tokenizer):
    torch.manual_seed(0)
    settings = encoder_config(id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1})
    model = nlp.StarformerEncoderForSequenceClassification(settings).eval()
    (out,) = pipeline("text-classification", model=model, tokenizer=tokenizer)("w1 w2 w3")
    scores = logits(model, tokenizer("w1 w2 w3", return_tensors="pt").input_ids).softmax(-1)[0]
    assert out["label"] == ["bad", "good"][scores.argmax()]
    assert out["score"] == pytest.approx(scores.max().item(), abs=1e-5)


def test_translation(tokenizer):
    # transformers 5 has no "translation" pipeline any more: generate() is what it tells users of
    model = seq2seq()
    batch = tokenizer(["w1 w2 w3", "w4"], return_tensors="pt", padding=True)
    batch.pop("token_type_ids", None)
    together = model.generate(**batch, num_beams=2, do_sample=False, max_new_tokens=5)
    alone = model.generate(
        tokenizer("w4", return_tensors="pt").input_ids,
        num_beams=2, do_sample=False, max_new_tokens=5,
    )  # fmt: skip
    assert torch.equal(together[1, : alone.shape[1]], alone[0])


def test_label_smoothing_shifts_a_decoders_labels(tmp_path):
    from transformers.trainer_pt_utils import LabelSmoother

    model, tokens = decoder(), ids(4, 9)
    arguments = TrainingArguments(
        str(tmp_path), label_smoothing_factor=0.1, use_cpu=True, report_to="none"
    )
    loss = Trainer(model, arguments).compute_loss(model, {"input_ids": tokens, "labels": tokens})
    smoother = LabelSmoother(0.1)
    expected = smoother({"logits": logits(model, tokens)}, tokens, shift_labels=True)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(
    ("kind", "labels"),
    [
        (nlp.StarformerForSequenceClassification, torch.arange(4) % 3),
        (nlp.StarformerForTokenClassification, ids(4, 6, seed=1) % 3),
        (nlp.StarformerEncoderForSequenceClassification, torch.eye(3)[torch.arange(4) % 3]),
        (nlp.StarformerEncoderForTokenClassification, ids(4, 6, seed=1) % 3),
    ],
)
def test_accumulated_gradients_are_those_of_one_batch(kind, labels, tmp_path):
    build = encoder_config if "Encoder" in kind.__name__ else config
    rows = [{"input_ids": i, "labels": y} for i, y in zip(ids(4, 6), labels, strict=True)]
    weights = []
    for size, steps in ((4, 1), (1, 4)):
        torch.manual_seed(0)
        model = kind(build(num_labels=3, classifier_dropout=0.0))
        arguments = TrainingArguments(
            str(tmp_path), max_steps=1, per_device_train_batch_size=size, learning_rate=0.1,
            gradient_accumulation_steps=steps, max_grad_norm=0.0, optim="sgd", use_cpu=True,
            report_to="none", save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=rows).train()
        weights.append([p.detach().clone() for p in model.parameters()])
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_weight_decay_leaves_every_norm_out(tmp_path):
    model = seq2seq("hybrid")
    trainer = Trainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    decayed = trainer.get_decay_parameter_names(model)
    norms = {n for n, p in model.named_parameters() if p.ndim == 1}
    assert len(norms) > 10
    assert not norms & set(decayed)
