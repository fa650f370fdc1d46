"""Token classification: taps, view and logits per token, labels of -100 ignored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)

from levi_fast import ActivationCache, LeviConfig, LeviModel, TapExtractor, get_levi_model, load_backbone
from levi_fast.errors import DataError
from levi_fast.kernels import use_backend

Build = Callable[..., nn.Module]
SPEC = {"type": "text", "vocab_size": 50, "embedding_dim": 8, "view_width": 6, "dropout": 0.0, "token_dropout": 0.0}


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(3, 7, dtype=torch.int64)
    mask[1, 4:] = 0
    ids = torch.randint(4, 44, (3, 7), generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask == 1, ids % 4, -100)}


def model_of(backbone: Any, **fields: Any) -> LeviModel:
    torch.manual_seed(0)
    config = {
        "pooling": "token",
        "num_labels": 4,
        "hidden_width": 8,
        "view_dropout": 0.0,
        "task_model": SPEC,
        **fields,
    }
    return get_levi_model(backbone, LeviConfig(**config))


@pytest.mark.parametrize("encoder", ["pooled", "transformer"])
@pytest.mark.parametrize("objective", ["per_layer", "ensemble"])
def test_logits_and_loss_are_per_token(build_backbone: Build, encoder: str, objective: str) -> None:
    model = model_of(
        build_backbone("bert"), objective=objective, task_model={**SPEC, "encoder": encoder, "num_heads": 2}
    )
    model.eval()
    output = model(**batch())
    assert output.logits.shape == (3, 7, 4) and output.layer_logits.shape == (3, 3, 7, 4)
    layers = output.layer_logits if objective == "per_layer" else output.logits[None]
    labels = batch()["labels"].flatten()
    expected = torch.stack([F.cross_entropy(logits.flatten(0, 1), labels) for logits in layers]).mean()
    torch.testing.assert_close(output.loss, expected)
    with use_backend("eager"):
        torch.testing.assert_close(model(**batch()).logits, output.logits, rtol=1e-4, atol=1e-5)


def test_taps_are_the_hidden_states(build_backbone: Build) -> None:
    backbone = build_backbone("bert")
    inputs = {k: v for k, v in batch().items() if k != "labels"}
    taps = TapExtractor(backbone, "all", "token")(**inputs)
    states = backbone(**inputs, output_hidden_states=True).hidden_states[1:]
    torch.testing.assert_close(taps, torch.stack([state.flatten(0, 1) for state in states]))


def test_precomputed_taps_have_a_row_per_token(build_backbone: Build) -> None:
    model = model_of(build_backbone("bert")).eval()
    given = {k: v for k, v in batch().items() if k != "labels"}
    taps = model.extract_taps(**given)
    assert taps.shape == (3, 7, 48)
    assert torch.equal(model(**given, taps=taps).logits, model(**given).logits)
    alone = model_of(build_backbone("bert"), task_model=None).eval()
    assert torch.equal(alone(taps=taps).logits, alone(**given).logits)  # nothing else need tell the shape


def test_what_a_text_is_padded_with_changes_none_of_its_tokens(build_backbone: Build) -> None:
    model = model_of(build_backbone("bert"), task_model={**SPEC, "encoder": "transformer", "num_heads": 2}).eval()
    given = {k: v for k, v in batch().items() if k != "labels"}
    alone = {k: v[1:2, :4] for k, v in given.items()}
    torch.testing.assert_close(model(**given).logits[1, :4], model(**alone).logits[0], rtol=1e-4, atol=1e-5)


def test_shapes_that_do_not_fit_are_named(build_backbone: Build, tmp_path: Path) -> None:
    model = model_of(build_backbone("bert"))
    wrong = {**batch(), "labels": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(ValueError, match=r"labels: expected \[3, 7\] int64 classes, got \[3\]"):
        model(**wrong)
    with pytest.raises(
        ValueError, match=r"taps: expected a row per token, \[3, 7, sum of the widths\], got \[3, 48\]"
    ):
        model(**batch(), taps=torch.zeros(3, 48))
    with pytest.raises(ValueError, match=r"taps: expected a row per token, \[3, 7, .* got \[3, 6, 48\]"):
        model(**batch(), taps=torch.zeros(3, 6, 48))
    with pytest.raises(ValueError, match="task_model: pooling='token' needs a view per token"):
        model_of(build_backbone("bert"), task_model={"type": "tabular", "num_numeric": 2})

    class Pooled(nn.Module):
        view_width = 6

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return input_ids[:, :1].float().expand(-1, 6)

    config = LeviConfig(pooling="token", num_labels=4, hidden_width=8)
    with pytest.raises(ValueError, match="task_model: expected a view per token"):
        get_levi_model(build_backbone("bert"), config, Pooled())(**batch())
    with pytest.raises(DataError, match="pooling: a cache holds one row of taps a text"):
        ActivationCache.build(tmp_path / "c", TapExtractor(build_backbone("bert"), "all", "token"), [batch()])


def test_trainer_and_pipeline(tiny_bert_dir: str, tmp_path: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_bert_dir)
    names = ["OTHER", "GOOD", "BAD"]
    words = {"good": 1, "great": 1, "lovely": 1, "bad": 2, "awful": 2, "dull": 2}
    generator = np.random.default_rng(0)
    plain = ["the", "film", "was", "very", "plot", "story"]
    rows = []
    for _ in range(120):
        text = [*generator.choice(plain, 4), str(generator.choice(list(words)))]
        generator.shuffle(text)
        ids = [2, *tokenizer.convert_tokens_to_ids(text), 3]
        rows.append({"input_ids": ids, "labels": [-100, *(words.get(word, 0) for word in text), -100]})
    torch.manual_seed(0)
    spec = {**SPEC, "vocab_size": len(tokenizer)}
    config = LeviConfig(
        pooling="token", hidden_width=16, task_model=spec, id2label=dict(enumerate(names)),
        label2id={name: place for place, name in enumerate(names)},
    )  # fmt: skip
    model = get_levi_model(load_backbone(tiny_bert_dir), config)

    def accuracy(prediction: Any) -> dict[str, float]:
        known = prediction.label_ids != -100
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids)[known].mean())}

    arguments = TrainingArguments(
        output_dir=str(tmp_path / "runs"), max_steps=60, per_device_train_batch_size=16, learning_rate=2e-2,
        report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=rows[:100], eval_dataset=rows[100:], compute_metrics=accuracy,
        data_collator=DataCollatorForTokenClassification(tokenizer),
    )  # fmt: skip
    trainer.train()
    assert trainer.evaluate()["eval_accuracy"] > 0.95
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    loaded = AutoModelForTokenClassification.from_pretrained(tmp_path / "model")
    assert isinstance(loaded, LeviModel) and loaded.config.task_model["per_token"] is True
    tagged = pipeline("token-classification", model=str(tmp_path / "model"))("the plot was awful")
    assert [(part["word"], part["entity"]) for part in tagged][-1] == ("awful", "BAD")
