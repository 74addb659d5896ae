"""Train a small Starformer encoder-decoder to translate; print BLEU, chrF and translations.

Encoder and decoder of one `star_conv` and one attention layer each learn verse pairs of two Bibles
from scratch. Expect translations with the right words and loose grammar, far ahead of copying the
source. About five minutes on a CPU. `loss.png`, weights, tokenizer and checkpoint go to the
folder of the run.

python examples/nlp_translate.py                          # Bible verses, English to Spanish, a CPU
python examples/nlp_translate.py --data libreoffice-en-de
python examples/nlp_translate.py --data Helsinki-NLP/opus_books:de-en --source de --target en
"""

from typing import Annotated, Any

import _report
import _text
import numpy as np
import sacrebleu
import typer
from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments, set_seed

from starlayers.datasets.text import load_translation
from starlayers.datasets.tokens import byte_level_bpe
from starlayers.nlp import StarformerForConditionalGeneration, StarformerSeq2SeqConfig


def scores(translations: list[str], references: list[str]) -> dict[str, float]:
    return {
        "bleu": sacrebleu.corpus_bleu(translations, [references]).score,
        "chrf": sacrebleu.corpus_chrf(translations, [references]).score,
    }


def main(
    data: Annotated[
        str, typer.Option(help="bible-en-es, libreoffice-en-de, -fr, -es, a hub name or a file")
    ] = "bible-en-es",
    source: Annotated[str, typer.Option(help="language of a hub name or a file")] = "en",
    target: Annotated[str, typer.Option(help="language of a hub name or a file")] = "es",
    layers: Annotated[str, typer.Option(help="of both sides")] = "star_conv attention",
    width: int = 128,
    act: _text.Act = "silu",
    mlp_type: _text.MlpType = "star",
    vocabulary: Annotated[int, typer.Option(help="tokens, for both languages")] = 4000,
    longest: Annotated[int, typer.Option(help="tokens; longer pairs are left out")] = 32,
    steps: int = 2000,
    batch_size: int = 32,
    lr: float = 3e-3,
    beams: int = 4,
    tested: Annotated[int, typer.Option(help="pairs of the test split to translate")] = 300,
    shown: Annotated[int, typer.Option(help="translations to print")] = 5,
    seed: int = 0,
    out: _text.Out = None,
) -> dict[str, dict[str, float]]:
    folder = _text.run_folder(out)
    texts = _text.load(load_translation, data, source_language=source, target_language=target)
    source, target = texts.splits["train"].features["translation"].languages
    folder.mkdir(parents=True)
    all_texts = (text for pair in texts.splits["train"]["translation"] for text in pair.values())
    tokenizer = byte_level_bpe(all_texts, vocabulary)

    def tokens(row: dict[str, Any]) -> dict[str, Any]:
        texts = (row["translation"][language] for language in (source, target))
        ids = tokenizer([text + tokenizer.eos_token for text in texts]).input_ids
        return {"input_ids": ids[0], "labels": ids[1]}

    def short(row: dict[str, Any]) -> bool:
        return max(len(row["input_ids"]), len(row["labels"])) <= longest

    rows = texts.splits.map(tokens).filter(short)
    test = rows["test"].select(range(min(tested, len(rows["test"]))))

    set_seed(seed)
    config = StarformerSeq2SeqConfig(
        **_text.shape(tokenizer, layers, width, act, mlp_type),
        encoder_layer_types=layers.split(),
        initializer_range=width**-0.5,
        max_position_embeddings=4 * longest,
    )
    model = StarformerForConditionalGeneration(config)
    print(f"{model.num_parameters():,} parameters; data: {texts.source}; seed {seed}")
    recipe = {"max_steps": steps, "per_device_train_batch_size": batch_size}
    recipe |= {"per_device_eval_batch_size": 64, "learning_rate": lr, "warmup_steps": 0.05}
    recipe |= {"label_smoothing_factor": 0.1, "train_sampling_strategy": "group_by_length"}
    recipe |= {"seed": seed, "eval_strategy": "steps", "eval_steps": 500}
    recipe |= {"save_steps": 500, "save_total_limit": 1, "logging_steps": 100}
    trainer = Seq2SeqTrainer(
        model,
        Seq2SeqTrainingArguments(**_text.options(folder, **recipe)),
        **{"train_dataset": rows["train"], "eval_dataset": rows["validation"]},
        data_collator=DataCollatorForSeq2Seq(tokenizer, model),
        processing_class=tokenizer,
    )
    _text.train(trainer, folder)

    trainer.args.predict_with_generate = True  # not in training: the loss is faster to evaluate
    trainer.args.train_sampling_strategy = "random"  # keep the order of the test split
    predictions = trainer.predict(test, num_beams=beams, max_new_tokens=2 * longest).predictions
    ids = np.where(predictions < 0, tokenizer.pad_token_id, predictions)
    sources, references = ([p[code] for p in test["translation"]] for code in (source, target))
    translations = tokenizer.batch_decode(ids, skip_special_tokens=True)
    figures = {
        "Starformer": scores(translations, references),
        "source, copied": scores(sources, references),
    }
    body = [(name, f"{f['bleu']:.2f}", f"{f['chrf']:.2f}") for name, f in figures.items()]
    _report.table((f"{len(test)} pairs of the test split", "BLEU", "chrF"), body)
    for text, translation, reference in list(zip(sources, translations, references))[:shown]:
        print(f"\n{source}: {text}\ntranslation: {translation}\n{target}: {reference}")
    print(f"\nseed {seed}; loss.png, weights, tokenizer and checkpoint in {folder}")
    return figures


if __name__ == "__main__":
    _report.run(main, __doc__)
