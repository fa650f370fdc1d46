"""From table cells to model inputs, learned on the training table and saved with the model."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from levi_fast.config_checks import read_json
from levi_fast.data.encoded import EncodedDataset
from levi_fast.data.labels import LabelSpace
from levi_fast.data.tables import Columns, Table
from levi_fast.errors import DataError
from levi_fast.storage import write_atomic

PROCESSOR_FILE = "levi_processor.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class TableProcessor:
    """How the cells of a table become tensors.

    A missing number becomes the training mean (0 after standardising), and a second value per numeric column says
    whether it was missing. Category 0 stands for missing and for what training did not show.

    Args:
        columns: which columns are read.
        labels: the label space; None when there is nothing to predict from a label column.
        max_length: tokens per text.
        numeric_means, numeric_stds: per numeric column, over the training cells that are present.
        vocabularies: per categorical column, the known categories, in index order from 1.
    """

    columns: Columns
    labels: LabelSpace | None
    max_length: int
    numeric_means: tuple[float, ...] = ()
    numeric_stds: tuple[float, ...] = ()
    vocabularies: tuple[tuple[str, ...], ...] = field(default=())

    @classmethod
    def fit(
        cls,
        table: Table,
        columns: Columns,
        *,
        max_length: int = 256,
        problem_type: str | None = None,
        label_separator: str = "|",
    ) -> TableProcessor:
        """Learn the preprocessing from a training table.

        Raises:
            DataError: a label or a number that cannot be used, a numeric column without any number.
        """
        labels = None
        if columns.label is not None:
            labels = LabelSpace.fit(table, columns.label, problem_type, label_separator)
        means, stds = [], []
        for name in columns.numeric:
            values = np.asarray(table.numbers(name))
            present = values[~np.isnan(values)]
            if not len(present):
                raise DataError(f"{table.path}: numeric column {name!r} has no number in any row")
            means.append(float(present.mean()))
            stds.append(float(present.std()) or 1.0)
        vocabularies = []
        for name in columns.categorical:
            vocabularies.append(tuple(sorted({value for value in table.categories(name) if value is not None})))
        return cls(columns, labels, max_length, tuple(means), tuple(stds), tuple(vocabularies))

    @property
    def num_numeric(self) -> int:
        """Width of the ``numeric`` input: a value and a missing flag per column."""
        return 2 * len(self.columns.numeric)

    @property
    def cardinalities(self) -> list[int]:
        """Per categorical column, the number of indices, 0 (unknown or missing) included."""
        return [len(vocabulary) + 1 for vocabulary in self.vocabularies]

    def check(self, table: Table) -> None:
        """Check every cell that :meth:`encode` will read, without a tokenizer.

        Raises:
            DataError: naming the row of an unusable cell, label or text.
        """
        if self.labels is not None and self.labels.column in table.cells:
            self.labels.encode(table)
        if self.columns.text:
            table.texts(self.columns.text)
        for name in self.columns.numeric:
            table.numbers(name)

    def encode(self, table: Table, tokenizer: Any = None) -> EncodedDataset:
        """Turn a table into model inputs; into labels too when the table has the label column.

        Args:
            table: read with the same columns.
            tokenizer: transformers' tokenizer of the backbone; None leaves the text out.

        Raises:
            DataError: naming the row of an unusable cell, label or text.
        """
        labels = None
        if self.labels is not None and self.labels.column in table.cells:
            labels = torch.from_numpy(self.labels.encode(table))
        features = {}
        if self.columns.numeric:
            features["numeric"] = self._numeric(table)
        if self.columns.categorical:
            features["categorical"] = self._categorical(table)
        if tokenizer is None or not self.columns.text:
            return EncodedDataset(table.path, features=features, labels=labels)
        token_ids, num_truncated = tokenize(table.texts(self.columns.text), tokenizer, self.max_length)
        return EncodedDataset(
            table.path,
            token_ids=token_ids,
            pad_token_id=pad_token_id(tokenizer),
            features=features,
            labels=labels,
            num_truncated=num_truncated,
        )

    def _numeric(self, table: Table) -> torch.Tensor:
        values = np.array([table.numbers(name) for name in self.columns.numeric]).T  # [N, F]
        missing = np.isnan(values)
        scaled = np.where(missing, 0.0, (values - np.array(self.numeric_means)) / np.array(self.numeric_stds))
        return torch.from_numpy(np.concatenate([scaled, missing], axis=1).astype(np.float32))

    def _categorical(self, table: Table) -> torch.Tensor:
        codes = []
        for name, vocabulary in zip(self.columns.categorical, self.vocabularies, strict=True):
            index = {category: place for place, category in enumerate(vocabulary, start=1)}
            codes.append([0 if value is None else index.get(value, 0) for value in table.categories(name)])
        return torch.tensor(codes, dtype=torch.int64).T.contiguous()

    def save(self, directory: str | Path) -> None:
        """Write ``levi_processor.json`` into a folder that exists."""
        state = asdict(self)
        state["labels"] = None if self.labels is None else self.labels.to_json()
        document = {"format_version": FORMAT_VERSION, **state}
        write_atomic(Path(directory) / PROCESSOR_FILE, json.dumps(document, indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, directory: str | Path) -> TableProcessor:
        """Read what :meth:`save` wrote.

        Raises:
            DataError: the file is missing, or was written by a later version.
        """
        file = Path(directory) / PROCESSOR_FILE
        if not file.is_file():
            raise DataError(
                f"{directory}: expected a model folder that levi-fast train wrote, but {PROCESSOR_FILE} is missing"
            )
        state = read_json(file)
        version = state.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise DataError(f"{file}: expected format_version {FORMAT_VERSION}, got {version!r}")
        try:
            return cls._from_state(state)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            raise DataError(f"{file}: not what levi-fast train writes: {reason}") from error

    @classmethod
    def _from_state(cls, state: dict[str, Any]) -> TableProcessor:
        columns, max_length = state["columns"], state["max_length"]
        if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1:
            raise ValueError(f"max_length: expected an integer >= 1, got {max_length!r}")
        return cls(
            columns=Columns(
                text=tuple(columns["text"]),
                numeric=tuple(columns["numeric"]),
                categorical=tuple(columns["categorical"]),
                label=columns["label"],
            ),
            labels=None if state["labels"] is None else LabelSpace.from_json(state["labels"]),
            max_length=max_length,
            numeric_means=tuple(state["numeric_means"]),
            numeric_stds=tuple(state["numeric_stds"]),
            vocabularies=tuple(tuple(vocabulary) for vocabulary in state["vocabularies"]),
        )


def tokenize(texts: list[str], tokenizer: Any, max_length: int) -> tuple[list[list[int]], int]:
    """Token ids of every text, cut to ``max_length``, and how many texts had to be cut."""
    # The limit is applied here, not by truncation=True, to learn how many texts it cuts; the tokenizer's own
    # notice about long sequences would say the same a second time.
    token_ids: list[list[int]] = []
    num_truncated = 0
    for start in range(0, len(texts), 1024):
        chunk = texts[start : start + 1024]
        encoded = tokenizer(chunk, truncation=True, max_length=max_length, add_special_tokens=True)["input_ids"]
        at_limit = [place for place, ids in enumerate(encoded) if len(ids) >= max_length]
        if at_limit:
            full = tokenizer([chunk[place] for place in at_limit], truncation=False, verbose=False)["input_ids"]
            num_truncated += sum(len(ids) > max_length for ids in full)
        token_ids.extend(encoded)
    return token_ids, num_truncated


def pad_token_id(tokenizer: Any) -> int:
    """The id that fills up a batch: the pad token, else the end token (GPT-2 has no pad token), else 0."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def length_limit(max_length: int | None, tokenizer: Any, backbone_config: Any = None, default: int = 256) -> int:
    """Tokens per text: what was asked for, or ``default``, at most what the backbone takes.

    Raises:
        DataError: when more was asked for than the backbone takes, or less than a text with its special tokens needs.
    """
    limits = [int(tokenizer.model_max_length)]
    positions = getattr(backbone_config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        limits.append(positions)
    limit = min(limits)  # model_max_length is about 1e30 where the tokenizer knows of none
    if max_length is None:
        return min(default, limit)
    least = int(tokenizer.num_special_tokens_to_add()) + 1
    if not least <= max_length <= limit:
        top = f" and {limit}, the most that the backbone takes" if limit < 10**9 else ""
        bounds = f"between {least}{top}" if top else f"at least {least}"
        raise DataError(f"--max-length: expected a number {bounds}, got {max_length}")
    return max_length


def warn_truncated(datasets: Iterable[EncodedDataset], max_length: int) -> None:
    """One warning for all data sets that says how many texts were cut."""
    datasets = list(datasets)
    cut = sum(dataset.num_truncated for dataset in datasets)
    if cut:
        total = sum(len(dataset) for dataset in datasets)
        warnings.warn(f"{cut} of {total} texts are longer than {max_length} tokens and were cut", stacklevel=2)


VALIDATION_FRACTION = 0.1  # of the training rows, where the data brings no validation set


def stratified_holdout(labels: np.ndarray | torch.Tensor, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Split rows into (kept, held out), both in row order; classes keep their shares where they are large enough.

    Args:
        labels: int64 ``[N]`` for a stratified split; anything else is split without strata.
        fraction: share of the rows that are held out, rounded, at least one row.
        seed: of the split.

    Raises:
        DataError: fewer than two rows.
    """
    values = np.asarray(labels)
    count = len(values)
    if count < 2:
        raise DataError(f"expected at least 2 rows to hold some out for validation, got {count}; give --validation")
    wanted = min(max(1, round(fraction * count)), count - 1)
    order = np.random.default_rng(seed).permutation(count)
    if values.ndim == 1 and values.dtype.kind in "iu":
        # Every row gets its quantile within its class; the lowest quantiles are held out, so that each class gives
        # its share, rounded, and the total is exact.
        quantile = np.empty(count)
        for label in np.unique(values):
            members = order[values[order] == label]
            quantile[members] = (np.arange(len(members)) + 0.5) / len(members)
        order = order[np.argsort(quantile[order], kind="stable")]
    held = np.zeros(count, dtype=bool)
    held[order[:wanted]] = True
    return np.flatnonzero(~held).tolist(), np.flatnonzero(held).tolist()
