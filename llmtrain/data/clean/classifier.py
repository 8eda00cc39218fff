"""Trains a linear quality classifier from seed documents, once, and keeps the documents that it finds good."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document

from llmtrain.config.clean.content import ClassifierConfig
from llmtrain.config.clean.web import WordsConfig
from llmtrain.data.clean.logistic import Fit, auc, auc_interval, features, fit, rows_of, sigmoid
from llmtrain.data.clean.step import Check
from llmtrain.data.faults import Faults
from llmtrain.data.files import read_rows

MODEL, NOTES = "classifier.safetensors", "classifier.json"
LEAST = 10  # seed documents of either kind, trained and held out
TRAINED_BY = ("field", "held_out", "buckets", "l2", "max_words", "seed")  # keys that the weights follow from
Scores = dict[str, np.ndarray]
Split = dict[str, list[str]]


def make(settings: ClassifierConfig, words: WordsConfig) -> Check:
    """Returns the check, with the classifier that `train` wrote. Raises ValueError when there is none."""
    if settings.path is None:
        raise ValueError("data.clean.classifier.path=null: must name the directory of a trained classifier; set it")
    model, _, scores = load(settings.path)
    least = threshold(settings, scores)

    def check(document: Document) -> str | None:
        score = score_of(document.text, model, settings)
        document.metadata["quality"] = round(score, 6)
        return None if score >= least else "low_quality"

    return check


def score_of(text: str, model: Fit, settings: ClassifierConfig) -> float:
    """Returns the probability that a text is good, where both kinds are equally frequent."""
    columns, values = features(text, settings.buckets, settings.max_words)
    return float(sigmoid(model.weights[columns] @ values + model.bias))


def threshold(settings: ClassifierConfig, scores: Scores) -> float:
    """Returns the least score to stay: `threshold`, or that which `keep_share` of the held-out bad seeds reach."""
    if settings.keep_share is None:
        return settings.threshold
    return float(np.quantile(scores["bad"], 1 - settings.keep_share, method="higher"))


def train(settings: ClassifierConfig, directory: str) -> dict[str, Any]:
    """Trains the classifier into a directory, unless it is there, and returns what was measured on held-out seeds.

    Returns the AUC with its 95 % interval, the threshold, and the share of good and bad that stay. Raises ValueError
    when the seeds are too few or in both files, or the directory holds a classifier of other seeds or settings.
    """
    seeds = {kind: read_seeds(kind, getattr(settings, kind), settings.field) for kind in ("good", "bad")}
    if both := set(seeds["good"]) & set(seeds["bad"]):
        raise ValueError(f"data.clean.classifier: {len(both)} documents are both in good and in bad; remove them")
    identity = {kind: checksum(texts) for kind, texts in seeds.items()}
    identity |= {key: getattr(settings, key) for key in TRAINED_BY}
    if not os.path.exists(os.path.join(directory, NOTES)):
        write(directory, identity, *trained(seeds, settings))
    _, notes, scores = load(directory)
    if changed := [key for key, value in identity.items() if notes["identity"].get(key) != value]:
        raise ValueError(
            f"{directory}: holds a classifier of other {', '.join(changed)}, and is not trained again in silence; "
            "remove it, or set data.clean.classifier.path to another directory"
        )
    return notes["measured"] | kept(settings, scores)


def read_seeds(kind: str, path: str, field: str) -> list[str]:
    """Returns the different texts of the seeds. Raises ValueError when a row has none."""
    faults, texts = Faults(path), dict[str, None]()
    for where, row in read_rows(path, faults):
        if isinstance(row.get(field), str) and row[field].strip():
            texts[row[field]] = None
        else:
            faults.add(where, f"has no text in the field {field!r}; data.clean.classifier.field names another")
    faults.raise_any()
    return list(texts)


def checksum(texts: Iterable[str]) -> str:
    """Returns the SHA-256 of texts in their order."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def split(texts: list[str], settings: ClassifierConfig) -> tuple[list[str], list[str]]:
    """Returns the texts that are trained and those held out; where a text belongs follows from itself and the seed."""
    own: tuple[list[str], list[str]] = ([], [])
    for text in texts:
        digest = hashlib.sha256(f"{settings.seed}/".encode() + text.encode("utf-8", "surrogatepass")).digest()
        own[int.from_bytes(digest[:8], "big") < settings.held_out * 2**64].append(text)
    return own


def trained(seeds: Split, settings: ClassifierConfig) -> tuple[Fit, dict[str, Any], Scores]:
    """Returns the fit, what was measured, and the scores of the held-out seeds. Raises ValueError on too few."""
    parts = {kind: split(texts, settings) for kind, texts in seeds.items()}
    for kind, own in parts.items():
        if min(map(len, own)) < LEAST:
            raise ValueError(
                f"data.clean.classifier.{kind}: {len(own[0])} documents to train on and {len(own[1])} held out, of "
                f"which {LEAST} are needed; give more seeds"
            )
    good, bad = parts["good"], parts["bad"]
    labels = np.arange(len(good[0]) + len(bad[0])) < len(good[0])
    model = fit(rows_of(good[0] + bad[0], settings.buckets, settings.max_words), labels, settings.buckets, settings.l2)
    scores = {kind: np.array([score_of(t, model, settings) for t in own[1]]) for kind, own in parts.items()}
    return model, measured(parts, model, scores), scores


def measured(parts: dict[str, tuple[list[str], list[str]]], model: Fit, scores: Scores) -> dict[str, Any]:
    """Returns counts, the AUC on held-out seeds with its interval, and how the fit ended."""
    area = auc(scores["good"], scores["bad"])
    return {
        "auc": area,
        "auc_interval": auc_interval(area, len(scores["good"]), len(scores["bad"])),
        "trained_documents": {kind: len(own[0]) for kind, own in parts.items()},
        "held_out_documents": {kind: len(own[1]) for kind, own in parts.items()},
        "iterations": model.iterations,
        "gradient": model.gradient,
    }


def kept(settings: ClassifierConfig, scores: Scores) -> dict[str, Any]:
    """Returns the threshold, and the share of held-out good and bad seeds that stay."""
    least = threshold(settings, scores)
    return {"threshold": least, "kept_share": {kind: float((own >= least).mean()) for kind, own in scores.items()}}


def write(directory: str, identity: dict[str, Any], model: Fit, notes: dict[str, Any], scores: Scores) -> None:
    """Writes the classifier; the notes come last, so that without them there is none."""
    from safetensors.numpy import save

    arrays = {
        "weights": model.weights,
        "bias": np.array([model.bias]),
        **{f"held_out_{k}": v for k, v in scores.items()},
    }
    data, own = save(arrays), Path(directory)
    own.mkdir(parents=True, exist_ok=True)
    (own / MODEL).write_bytes(data)
    text = json.dumps({"identity": identity, "sha256": hashlib.sha256(data).hexdigest(), "measured": notes}, indent=1)
    (own / f"{NOTES}.part").write_text(text + "\n", encoding="utf-8")
    os.replace(own / f"{NOTES}.part", own / NOTES)


def load(directory: str) -> tuple[Fit, dict[str, Any], Scores]:
    """Returns the classifier in a directory, its notes, and the scores of held-out seeds. Raises ValueError when it is
    not whole."""
    from safetensors.numpy import load as load_arrays

    try:
        notes = json.loads((Path(directory) / NOTES).read_text(encoding="utf-8"))
        data = (Path(directory) / MODEL).read_bytes()
    except (OSError, ValueError) as error:
        raise ValueError(f"{directory}: no trained classifier ({error}); run `llmtrain data` to train it") from None
    if hashlib.sha256(data).hexdigest() != notes["sha256"]:
        raise ValueError(f"{directory}: {MODEL} is not what {NOTES} says; remove the directory to train it anew")
    arrays = load_arrays(data)
    model = Fit(
        arrays["weights"], float(arrays["bias"][0]), notes["measured"]["iterations"], notes["measured"]["gradient"]
    )
    return model, notes, {kind: arrays[f"held_out_{kind}"] for kind in ("good", "bad")}
