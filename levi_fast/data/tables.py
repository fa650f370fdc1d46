"""Reading the user's CSV, TSV, JSONL and Parquet files, with errors that say which file, column and row is at fault.

Delimited files are read as text, cell by cell, so that nothing is guessed from the first rows: a label ``NA`` stays a
label, and the same column means the same thing in every file. JSONL and Parquet keep their own types.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import glob
import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from levi_fast.errors import DataError

DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSON_LINES = {".jsonl", ".ndjson"}
PARQUET = {".parquet", ".pq"}
EXTENSIONS = (*DELIMITERS, *sorted(JSON_LINES), *sorted(PARQUET))

# A text cell "None" or "NA" is text; a numeric cell with one of these is a missing number.
_MISSING_NUMBERS = {"", "na", "n/a", "nan", "null", "none", "<na>"}
_MISSING_LABELS = {"", "nan", "<na>"}


@dataclass(frozen=True)
class Columns:
    """The columns of a table that are read, by the part they play; anything else in the file is ignored.

    Args:
        text: joined with a newline, in this order, into the text that the backbone reads.
        numeric: numbers for the task model.
        categorical: categories for the task model.
        label: what is predicted; None where there is nothing to compare with.
        split: which set a row belongs to, see :mod:`levi_fast.data.split_column`; None where a file is one set.

    Raises:
        DataError: when one column is named twice.
    """

    text: tuple[str, ...] = ()
    numeric: tuple[str, ...] = ()
    categorical: tuple[str, ...] = ()
    label: str | None = None
    split: str | None = None

    def __post_init__(self) -> None:
        seen: dict[str, str] = {}
        for flag, names in self._named():
            for name in names:
                if name in seen:
                    raise DataError(f"column {name!r} is named twice: by {seen[name]} and by {flag}")
                seen[name] = flag

    def _named(self) -> list[tuple[str, tuple[str, ...]]]:
        return [
            ("--text-column", self.text),
            ("--numeric-column", self.numeric),
            ("--categorical-column", self.categorical),
            ("--label-column", () if self.label is None else (self.label,)),
            ("--split-column", () if self.split is None else (self.split,)),
        ]

    def flags(self) -> dict[str, str]:
        """Every column that is read -> the command line flag that names it."""
        return {name: flag for flag, names in self._named() for name in names}


@dataclass(frozen=True)
class Table:
    """The chosen columns of one file, as lists of raw cells (all ``str | None`` when it came from CSV or TSV).

    ``rows`` are the numbers, from 0, that the rows have in the file; None where they are all of it.
    """

    path: str
    num_rows: int
    cells: dict[str, list[Any]]
    rows: list[int] | None = None

    def where(self, row: int) -> str:
        """Name a row (0-based here) the way messages do: 1-based in the file, not counting the header."""
        return f"row {(row if self.rows is None else self.rows[row]) + 1} of {self.path}"

    def select(self, rows: list[int]) -> Table:
        """The given rows, in the given order; messages go on to name them by their place in the file."""
        cells = {name: [cells[r] for r in rows] for name, cells in self.cells.items()}
        return Table(self.path, len(rows), cells, rows if self.rows is None else [self.rows[r] for r in rows])

    def texts(self, columns: tuple[str, ...]) -> list[str]:
        """Join the text columns of every row with a newline, leaving out cells that are empty.

        Raises:
            DataError: naming the first row without any text: to the backbone it would be padding alone.
        """
        texts = []
        for row in range(self.num_rows):
            parts = [_as_text(self.cells[name][row]) for name in columns]
            text = "\n".join(part for part in parts if part)
            if not text:
                names = ", ".join(repr(name) for name in columns)
                raise DataError(f"{self.where(row)}: no text in {names}: expected text, got an empty cell")
            texts.append(text)
        return texts

    def numbers(self, column: str) -> list[float]:
        """A numeric column as floats; a missing cell becomes NaN.

        Raises:
            DataError: naming the first row whose cell is neither a finite number nor missing.
        """
        values = []
        for row, cell in enumerate(self.cells[column]):
            value = parse_number(cell)
            if value is None or math.isinf(value):
                raise DataError(
                    f"{self.where(row)}: column {column!r}: expected a finite number or an empty cell, "
                    f"got {short(cell)}"
                )
            values.append(value)
        return values

    def categories(self, column: str) -> list[str | None]:
        """A categorical column as text (1, 1.0 and "1" are one category); None where missing."""
        return [category_name(cell) for cell in self.cells[column]]


def read_table(path: str | Path, columns: Columns, *, label_required: bool = True) -> Table:
    """Read the chosen columns of a CSV, TSV, JSONL or Parquet file.

    Args:
        path: the file; its extension says the format.
        columns: what to read.
        label_required: when False, a file without the label column gives a table without it.

    Raises:
        DataError: missing file, unknown extension, not UTF-8, broken syntax, missing or doubled column, no rows.
    """
    file = Path(path)
    name = str(path)
    if not file.exists():
        raise DataError(f"{name}: no such file")
    if not file.is_file():
        raise DataError(f"{name}: expected a file, got a folder")
    suffix = file.suffix.lower()
    if suffix not in EXTENSIONS:
        raise DataError(
            f"{name}: unknown file type {suffix or '(no extension)'!r}; expected one of {', '.join(EXTENSIONS)}"
        )
    if suffix not in PARQUET:
        _require_utf8(file, name)
    if suffix in DELIMITERS:
        dataset = _read_delimited(file, name, DELIMITERS[suffix], columns)
    elif suffix in JSON_LINES:
        dataset = _load(file, name, "json", parse_agent_traces=False)
    else:
        dataset = _read_parquet(file, name)
    present = list(dataset.column_names)
    wanted = _require_columns(present, name, columns, label_required=label_required)
    if dataset.num_rows == 0:
        raise DataError(f"{name}: the file has no rows")
    cells = dataset.select_columns(wanted)[:] if wanted else {}
    return Table(path=name, num_rows=dataset.num_rows, cells={column: list(cells[column]) for column in wanted})


def parse_number(cell: Any) -> float | None:
    """A cell as float: NaN when missing, None when it is not a number."""
    if cell is None:
        return math.nan
    if isinstance(cell, (bool, int, float)):
        return float(cell)
    if isinstance(cell, str):
        text = cell.strip()
        if text.lower() in _MISSING_NUMBERS:
            return math.nan
        try:
            # float() also takes digits grouped by underscores, which no data file means
            return None if "_" in text else float(text)
        except ValueError:
            return None
    try:
        return float(cell)  # Decimal, numpy scalars
    except (TypeError, ValueError):
        return None


def is_missing_label(cell: Any) -> bool:
    """Whether a label cell is null, NaN, or (as text) empty or ``nan``."""
    if cell is None:
        return True
    if isinstance(cell, float):
        return math.isnan(cell)
    return isinstance(cell, str) and cell.strip().lower() in _MISSING_LABELS


def category_name(cell: Any) -> str | None:
    """A cell as the name of a category; None when it is missing."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return None
    if isinstance(cell, bool):
        return "true" if cell else "false"
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    return str(cell).strip() or None


def short(cell: Any, limit: int = 60) -> str:
    """A cell as it is quoted in a message, cut to ``limit`` characters."""
    text = repr(cell)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _as_text(cell: Any) -> str:
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    return str(cell).strip()


def _require_utf8(file: Path, name: str) -> None:
    offset = 0
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                hint = "; it looks like UTF-16" if offset == 0 and line[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
                raise DataError(
                    f"{name}: expected UTF-8 text, got byte 0x{line[error.start]:02x} "
                    f"at offset {offset + error.start} (line {number}){hint}"
                ) from None
            offset += len(line)
    if offset == 0:
        raise DataError(f"{name}: the file is empty")


def _read_delimited(file: Path, name: str, delimiter: str, columns: Columns) -> Any:
    with open(file, encoding="utf-8-sig", newline="") as lines, _csv_field_limit():
        records = (record for record in csv.reader(lines, delimiter=delimiter) if record)
        try:
            header = next(records, None)
            first = next(records, None)
        except csv.Error as error:
            raise DataError(f"{name}: cannot be read as {file.suffix[1:].upper()}: {error}") from None
    if header is None:
        raise DataError(f"{name}: the file is empty")
    for column in columns.flags():
        if header.count(column) > 1:
            raise DataError(f"{name}: column {column!r} stands {header.count(column)} times in the header")
    _require_columns(header, name, columns, label_required=False)
    if first is None:
        raise DataError(f"{name}: the file has a header but no rows")
    if len(first) > len(header):
        # pandas would silently take the first column for an index
        raise DataError(f"{name}: row 1 has {len(first)} cells, the header has {len(header)}")

    import datasets

    names = [column or f"Unnamed: {place}" for place, column in enumerate(header)]
    if len(set(names)) < len(names):  # doubled names among columns that nobody asked for
        wanted = set(columns.flags())
        names = [column if column in wanted else f"{column}#{place}" for place, column in enumerate(names)]
    return _load(
        file,
        name,
        "csv",
        sep=delimiter,
        encoding="utf-8-sig",
        keep_default_na=False,
        names=names,
        header=0,
        features=datasets.Features({column: datasets.Value("string") for column in names}),
    )


@contextlib.contextmanager
def _csv_field_limit() -> Iterator[None]:
    # the csv module refuses cells above 128 KB; a long document is no error
    before = csv.field_size_limit(1 << 30)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _read_parquet(file: Path, name: str) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        num_rows = pyarrow.parquet.read_metadata(file).num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{name}: cannot be read as PARQUET: {error}") from error
    if num_rows == 0:  # datasets would stumble over it
        raise DataError(f"{name}: the file has no rows")
    return _load(file, name, "parquet")


def _load(file: Path, name: str, builder: str, **options: Any) -> Any:
    """Read one file through ``datasets``; its cache lives and dies in a temporary folder."""
    import datasets

    with tempfile.TemporaryDirectory(prefix="levi-fast-") as cache, _quiet(datasets):
        try:
            return datasets.load_dataset(
                builder,
                data_files={"train": [glob.escape(str(file.absolute()))]},
                split="train",
                cache_dir=cache,
                keep_in_memory=True,
                **options,
            )
        except Exception as error:
            kind = file.suffix[1:].upper()
            raise DataError(f"{name}: cannot be read as {kind}: {_cause(error, file, builder)}") from error


@contextlib.contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    bars, level = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its errors come back in ours
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()


def _cause(error: BaseException, file: Path, builder: str) -> str:
    if builder == "json":
        with open(file, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    value = json.loads(line) if line.strip() else {}
                except json.JSONDecodeError as problem:
                    return f"line {number}: {problem.msg} (column {problem.colno})"
                if not isinstance(value, dict):
                    return f"line {number}: expected an object with one key per column, got {short(value)}"
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip() or type(error).__name__


def _require_columns(present: list[str], name: str, columns: Columns, *, label_required: bool) -> list[str]:
    wanted = []
    for column, flag in columns.flags().items():
        if column in present:
            wanted.append(column)
        elif column != columns.label or label_required:
            lowered = {other.lower(): other for other in present}
            near = difflib.get_close_matches(column.lower(), lowered, n=1)
            suggestion = f"; did you mean {lowered[near[0]]!r}?" if near else ""
            listed = ", ".join(repr(other) for other in present[:50])
            raise DataError(f"{name}: no column {column!r} (named by {flag}); the file has {listed}{suggestion}")
    return wanted
