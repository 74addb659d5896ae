"""Train a star-MLP encoder-decoder to translate; print BLEU, chrF and translations.

python examples/nlp_translate.py                          # Bible verses, English to Spanish, a CPU
python examples/nlp_translate.py --data libreoffice-en-de
python examples/nlp_translate.py --data Helsinki-NLP/opus_books:de-en --source de --target en
"""

import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import sacrebleu
import torch
import typer
from transformers import (
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)

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
    act: Annotated[str, typer.Option(help="a name in starlayers.ACTIVATIONS")] = "silu",
    mlp_type: Annotated[str, typer.Option(help="star, sum or plain")] = "star",
    vocabulary: Annotated[int, typer.Option(help="tokens, for both languages")] = 4000,
    longest: Annotated[int, typer.Option(help="tokens; longer pairs are left out")] = 32,
    steps: int = 2000,
    batch_size: int = 32,
    lr: float = 3e-3,
    beams: int = 4,
    tested: Annotated[int, typer.Option(help="pairs of the test split to translate")] = 300,
    shown: Annotated[int, typer.Option(help="translations to print")] = 5,
    seed: int = 0,
    out: Annotated[Path | None, typer.Option(help="folder of the run [runs/TIME]")] = None,
) -> dict[str, dict[str, float]]:
    """Train a star-MLP encoder-decoder to translate; print BLEU, chrF and translations."""
    folder = out or Path("runs", time.strftime("%Y%m%d-%H%M%S"))
    languages = {"source_language": source, "target_language": target}
    where = {"path" if Path(data).exists() else "name": data}
    texts = load_translation(**where, **languages)
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
    kinds = layers.split()
    config = StarformerSeq2SeqConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=len(kinds),
        layer_types=kinds,
        encoder_layer_types=kinds,
        num_attention_heads=4,
        hidden_act=act,
        mlp_type=mlp_type,
        initializer_range=width**-0.5,
        max_position_embeddings=4 * longest,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = StarformerForConditionalGeneration(config)
    print(f"{model.num_parameters():,} parameters; data: {texts.source}; seed {seed}")
    arguments = Seq2SeqTrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=64,
        learning_rate=lr,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        weight_decay=0.05,
        label_smoothing_factor=0.1,
        train_sampling_strategy="group_by_length",
        seed=seed,
        eval_strategy="steps",
        eval_steps=500,
        save_steps=500,
        save_total_limit=1,
        logging_steps=100,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
    )
    trainer = Seq2SeqTrainer(
        model,
        arguments,
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        data_collator=DataCollatorForSeq2Seq(tokenizer, model),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()

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
    print(f"\n{len(test)} pairs of the test split    BLEU    chrF")
    for name, figure in figures.items():
        print(f"{name:24}{figure['bleu']:8.2f}{figure['chrf']:8.2f}")
    for text, translation, reference in list(zip(sources, translations, references))[:shown]:
        print(f"\n{source}: {text}\ntranslation: {translation}\n{target}: {reference}")
    print(f"\nseed {seed}; weights, tokenizer and checkpoint in {folder}")
    return figures


if __name__ == "__main__":
    typer.run(main)
