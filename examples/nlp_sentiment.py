"""Train a star-MLP encoder for sentiment; compare it with TF-IDF and logistic regression.

python examples/nlp_sentiment.py                                  # film reviews, on a CPU
python examples/nlp_sentiment.py --data stanfordnlp/imdb --longest 256
python examples/nlp_sentiment.py --data reviews.csv --act gelu    # columns text and label
"""

import random
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from scipy.special import softmax
from sklearn.dummy import DummyClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import ConfusionMatrixDisplay, accuracy_score, confusion_matrix, f1_score
from sklearn.pipeline import make_pipeline
from tokenizers.normalizers import Lowercase
from transformers import DataCollatorWithPadding, EarlyStoppingCallback, Trainer, TrainingArguments
from transformers.trainer_utils import set_seed

from starlayers.datasets.text import load_sentiment
from starlayers.datasets.tokens import byte_level_bpe
from starlayers.nlp import StarformerEncoderConfig, StarformerEncoderForSequenceClassification


def scores(labels: Any, predicted: Any) -> dict[str, float]:
    f1 = f1_score(labels, predicted, average="macro")
    return {"accuracy": accuracy_score(labels, predicted), "f1": f1}


def main(
    data: Annotated[str, typer.Option(help="a hub name or a file")] = "movie-reviews",
    layers: str = "star_conv attention",
    width: int = 64,
    act: Annotated[str, typer.Option(help="a name in starlayers.ACTIVATIONS")] = "silu",
    mlp_type: Annotated[str, typer.Option(help="star, sum or plain")] = "star",
    vocabulary: Annotated[int, typer.Option(help="tokens")] = 4000,
    longest: Annotated[int, typer.Option(help="tokens of a text; the rest is cut off")] = 128,
    masked: Annotated[float, typer.Option(help="share of tokens hidden in training")] = 0.3,
    dropout: float = 0.3,
    epochs: Annotated[int, typer.Option(help="at most")] = 8,
    batch_size: int = 32,
    lr: float = 1e-3,
    seed: int = 0,
    out: Annotated[Path | None, typer.Option(help="folder of the run [runs/TIME]")] = None,
) -> dict[str, dict[str, float]]:
    """Train a star-MLP encoder on labelled texts; compare it with logistic regression."""
    folder = out or Path("runs", time.strftime("%Y%m%d-%H%M%S"))
    texts = load_sentiment(**{"path" if Path(data).exists() else "name": data})
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
    kinds = layers.split()
    config = StarformerEncoderConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=len(kinds),
        layer_types=kinds,
        num_attention_heads=4,
        hidden_act=act,
        mlp_type=mlp_type,
        hidden_dropout=dropout,
        classifier_dropout=dropout,
        pad_token_id=tokenizer.pad_token_id,
        label2id={name: i for i, name in enumerate(classes)},
        id2label=dict(enumerate(classes)),
    )
    model = StarformerEncoderForSequenceClassification(config)
    print(f"{model.num_parameters():,} parameters; data: {texts.source}; seed {seed}")
    trainer = Trainer(
        model,
        TrainingArguments(
            str(folder),
            num_train_epochs=epochs,
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=64,
            learning_rate=lr,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            weight_decay=0.05,
            seed=seed,
            eval_strategy="epoch",
            save_strategy="epoch",
            save_total_limit=1,
            load_best_model_at_end=True,
            metric_for_best_model="accuracy",
            remove_unused_columns=False,  # the transform reads them
            dataloader_pin_memory=torch.cuda.is_available(),
            report_to="none",
        ),
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=lambda p: scores(p.label_ids, p.predictions.argmax(-1)),
        callbacks=[EarlyStoppingCallback(3)],
    )
    trainer.train()
    trainer.save_model()

    train, test = ({c: texts.splits[s][c][:] for c in ("text", "label")} for s in ("train", "test"))
    logits = trainer.predict(rows["test"]).predictions  # the only look at the test split
    predicted = {"Starformer": logits.argmax(-1)}
    linear = make_pipeline(TfidfVectorizer(), LogisticRegression(max_iter=1000))
    baselines = {"TF-IDF + logistic regression": linear, "majority class": DummyClassifier()}
    for name, other in baselines.items():
        predicted[name] = other.fit(train["text"], train["label"]).predict(test["text"])
    figures = {name: scores(test["label"], answers) for name, answers in predicted.items()}
    print(f"\n{'test split':30}accuracy  macro F1")
    for name, figure in figures.items():
        print(f"{name:30}{figure['accuracy']:8.2%}  {figure['f1']:8.2%}")

    table = confusion_matrix(test["label"], predicted["Starformer"], labels=range(len(classes)))
    print(f"\n{'truth, prediction':20}" + "".join(f"{name:>12}" for name in classes))
    for name, counts in zip(classes, table, strict=True):
        print(f"{name:20}" + "".join(f"{count:12}" for count in counts))
    plot = ConfusionMatrixDisplay(table, display_labels=classes).plot(colorbar=False)
    plot.figure_.savefig(folder / "confusion.png", bbox_inches="tight")

    confidence = softmax(logits, -1).max(-1)
    wrong = np.flatnonzero(predicted["Starformer"] != test["label"])
    print("\nmost confident mistakes:")
    for i in wrong[np.argsort(-confidence[wrong])][:5]:
        answer, label = classes[predicted["Starformer"][i]], classes[test["label"][i]]
        print(f"* {confidence[i]:.0%} {answer}, is {label}: {test['text'][i]}")
    print(f"\nseed {seed}; weights, tokenizer, checkpoint and confusion.png in {folder}")
    return figures


if __name__ == "__main__":
    typer.run(main)
