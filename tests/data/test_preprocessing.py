"""The table processor, encoded data sets and the hold-out split."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from levi_fast.data.encoded import EncodedDataset, collate
from levi_fast.data.preprocessing import (
    TableProcessor,
    length_limit,
    pad_token_id,
    stratified_holdout,
    tokenize,
    warn_truncated,
)
from levi_fast.data.tables import Columns, Table
from levi_fast.errors import DataError

COLUMNS = Columns(text=("t",), numeric=("n",), categorical=("c",), label="y")


def rows(numbers: list[Any], categories: list[Any], path: str = "rows.csv") -> Table:
    count = len(numbers)
    return Table(
        path, count, {"t": ["good film"] * count, "n": numbers, "c": categories, "y": ["a", "b"] * (count // 2)}
    )


@pytest.fixture(scope="module")
def tokenizer(tiny_bert_dir: str) -> Any:
    from levi_fast.backbones import load_tokenizer

    return load_tokenizer(tiny_bert_dir)


class TestTableProcessor:
    def test_numbers_are_standardised_and_missing_ones_flagged(self) -> None:
        processor = TableProcessor.fit(rows(["1", "3", "", "5"], ["x"] * 4), COLUMNS)
        encoded = processor.encode(rows(["3", ""], ["x", "x"])).features["numeric"]
        assert encoded.tolist() == [[0.0, 0.0], [0.0, 1.0]]
        assert processor.encode(rows(["1", "5"], ["x", "x"])).features["numeric"][:, 0].tolist() == pytest.approx(
            [-2 / np.std([1, 3, 5]), 2 / np.std([1, 3, 5])]
        )
        assert processor.num_numeric == encoded.shape[1] == 2

    def test_a_constant_column_stays_finite(self) -> None:
        processor = TableProcessor.fit(rows(["2", "2"], ["x", "x"]), COLUMNS)
        assert processor.encode(rows(["2", "7"], ["x", "x"])).features["numeric"].isfinite().all()

    def test_a_column_without_numbers(self) -> None:
        with pytest.raises(DataError, match=r"rows\.csv: numeric column 'n' has no number in any row"):
            TableProcessor.fit(rows(["", ""], ["x", "x"]), COLUMNS)

    def test_unknown_and_missing_categories_are_zero(self) -> None:
        processor = TableProcessor.fit(rows(["1", "2"], ["red", "blue"]), COLUMNS)
        encoded = processor.encode(rows(["1"] * 4, ["blue", "red", "green", None])).features["categorical"]
        assert encoded.tolist() == [[1], [2], [0], [0]]
        assert processor.cardinalities == [3]

    def test_saved_and_loaded_it_does_the_same(self, tmp_path: Path, tokenizer: Any) -> None:
        train = rows(["1", "3", "", "5"], ["x", "y", "x", "z"])
        processor = TableProcessor.fit(train, COLUMNS, max_length=9)
        processor.save(tmp_path)
        loaded = TableProcessor.load(tmp_path)
        assert loaded == processor
        first, second = processor.encode(train, tokenizer), loaded.encode(train, tokenizer)
        for name, value in first.__getitems__(range(4)).items():
            assert torch.equal(value, second.__getitems__(range(4))[name]), name

    def test_a_folder_without_one_and_a_later_format(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"levi_processor\.json is missing"):
            TableProcessor.load(tmp_path)
        (tmp_path / "levi_processor.json").write_text(json.dumps({"format_version": 99}))
        with pytest.raises(DataError, match=r"expected format_version 1, got 99"):
            TableProcessor.load(tmp_path)


class TestTokenising:
    def test_texts_are_cut_and_counted(self, tokenizer: Any) -> None:
        ids, cut = tokenize(["good", "good " * 20, "good " * 6], tokenizer, 8)
        assert [len(row) for row in ids] == [3, 8, 8]
        assert cut == 1  # six words and two special tokens are exactly eight

    def test_one_warning_for_all_files(self, tokenizer: Any) -> None:
        datasets = [EncodedDataset(name, token_ids=[[1], [2]], num_truncated=1) for name in ("a", "b")]
        with pytest.warns(UserWarning, match=r"2 of 4 texts are longer than 8 tokens and were cut") as caught:
            warn_truncated(datasets, 8)
        assert len(caught) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warn_truncated([EncodedDataset("a", token_ids=[[1]])], 8)

    def test_limits(self, tokenizer: Any) -> None:
        assert length_limit(None, tokenizer) == 64
        assert length_limit(None, tokenizer, default=32) == 32
        assert length_limit(12, tokenizer) == 12
        with pytest.raises(DataError, match=r"--max-length: expected a number between 3 and 64, .* got 65"):
            length_limit(65, tokenizer)
        with pytest.raises(DataError, match=r"--max-length: .* got 2"):
            length_limit(2, tokenizer)

    def test_padding_without_a_pad_token(self) -> None:
        class Bare:
            pad_token_id = None
            eos_token_id = 7

        assert pad_token_id(Bare()) == 7


class TestEncodedDataset:
    def test_batches_are_padded_to_their_longest_text(self) -> None:
        data = EncodedDataset("d", token_ids=[[5, 6, 7], [8], [9, 9]], pad_token_id=1, labels=torch.tensor([0, 1, 0]))
        batch = collate(data.__getitems__([1, 2]))
        assert batch["input_ids"].tolist() == [[8, 1], [9, 9]]
        assert batch["attention_mask"].tolist() == [[1, 0], [1, 1]]
        assert batch["labels"].tolist() == [1, 0]

    def test_through_a_data_loader(self) -> None:
        data = EncodedDataset("d", token_ids=[[n] * (1 + n % 4) for n in range(10)], labels=torch.arange(10))
        loader = torch.utils.data.DataLoader(data, batch_size=4, collate_fn=collate)
        seen = [row for batch in loader for row in batch["labels"].tolist()]
        assert seen == list(range(10))
        for batch in loader:
            for ids, mask, label in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
                assert ids[mask.bool()].tolist() == [int(label)] * (1 + int(label) % 4)

    def test_a_text_without_tokens_is_refused_by_row(self) -> None:
        with pytest.raises(DataError, match=r"row 2 of d: .* it would be all padding"):
            EncodedDataset("d", token_ids=[[1], []])

    def test_attached_taps_replace_tokens_and_may_be_shared_by_rows(self) -> None:
        data = EncodedDataset("d", token_ids=[[1], [2], [1]], labels=torch.zeros(3))
        first, which = data.unique_inputs()
        assert first == [0, 1] and which.tolist() == [0, 1, 0]
        data.set_taps(torch.tensor([[1.0], [2.0]]), which, keep_inputs=False)
        batch = data.__getitems__([2, 1])
        assert batch["taps"].tolist() == [[1.0], [2.0]] and "input_ids" not in batch
        data.set_taps(None)
        assert "taps" not in data.__getitems__([0])
        with pytest.raises(ValueError, match=r"expected 3 rows, got 2"):
            data.set_taps(torch.zeros(2, 1))

    def test_subset(self) -> None:
        data = EncodedDataset(
            "d", token_ids=[[1], [2, 3], [4]], features={"numeric": torch.eye(3)}, labels=torch.arange(3)
        )
        part = data.subset([2, 1], "part")
        batch = part.__getitems__([0, 1])
        assert batch["input_ids"].tolist() == [[4, 0], [2, 3]] and batch["labels"].tolist() == [2, 1]
        assert batch["numeric"].tolist() == [[0, 0, 1], [0, 1, 0]]

    def test_unequal_numbers_of_rows(self) -> None:
        with pytest.raises(ValueError, match=r"expected as many rows everywhere"):
            EncodedDataset("d", token_ids=[[1]], labels=torch.zeros(2))


class TestHoldOut:
    @settings(max_examples=60, deadline=None)
    @given(
        labels=st.lists(st.integers(0, 4), min_size=2, max_size=200),
        fraction=st.floats(0.05, 0.5),
        seed=st.integers(0, 1000),
    )
    def test_parts_are_disjoint_complete_and_keep_class_shares(
        self, labels: list[int], fraction: float, seed: int
    ) -> None:
        kept, held = stratified_holdout(np.array(labels), fraction, seed)
        assert sorted(kept + held) == list(range(len(labels)))
        assert len(held) == min(max(1, round(fraction * len(labels))), len(labels) - 1)
        for label in set(labels):
            count = labels.count(label)
            assert abs(sum(labels[row] == label for row in held) - fraction * count) <= 1.5
        assert (kept, held) == stratified_holdout(np.array(labels), fraction, seed)

    def test_the_seed_matters(self) -> None:
        labels = np.arange(100) % 2
        assert stratified_holdout(labels, 0.1, 0)[1] != stratified_holdout(labels, 0.1, 1)[1]

    def test_too_few_rows(self) -> None:
        with pytest.raises(DataError, match=r"at least 2 rows"):
            stratified_holdout(np.array([1]), 0.1, 0)
