"""Reading MovieLens' ``movies.csv`` and ``ratings.csv``, or the ``.dat`` files of MovieLens 1M and 10M.

Errors name file, line and column.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from levi_fast.errors import DataError

_NO_GENRE = "(no genres listed)"
_TITLE_YEAR = re.compile(r"\((\d{4})[^()]*\)\s*$")
_TRAILING_ARTICLE = re.compile(r"^(.+), (The|A|An|Le|La|Les|L'|Il|El|Los|Das|Der|Die)(?= \(|$)")


@dataclass(frozen=True)
class Films:
    """The films of ``movies.csv``, in its order; the last feature is the scaled year, the others are genres."""

    names: list[str]  # "The Usual Suspects (1995; Crime, Mystery, Thriller)"
    features: np.ndarray  # [films, G] float32
    genre_names: list[str]
    index: dict[int, int]  # movie id -> row
    ids: np.ndarray


@dataclass(frozen=True)
class Ratings:
    """All ratings, ordered by user, time, movie id."""

    user: np.ndarray
    film: np.ndarray  # row in Films
    stars: np.ndarray
    time: np.ndarray
    start: np.ndarray  # row of the same user's first rating

    @property
    def position(self) -> np.ndarray:
        """How many ratings of the same user come before."""
        return np.arange(len(self.user)) - self.start


def find_file(data_dir: str | Path, name: str) -> Path:
    """The path of one of the two files, or else of its .dat form, or a DataError that says what the folder holds."""
    folder = Path(data_dir)
    if not folder.is_dir():
        raise DataError(f"data_dir: expected a folder with ratings.csv and movies.csv, {folder} is not a folder")
    old = folder / Path(name).with_suffix(".dat")
    if old.is_file() and not (folder / name).is_file():
        return old
    if not (folder / name).is_file():
        found = sorted(path.name for path in folder.iterdir())[:8]
        raise DataError(f"{folder}: {name} is missing; found {', '.join(found) if found else 'nothing'}")
    return folder / name


def _rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """Yield the file's line number and the cells of the named columns."""
    if path.suffix == ".dat":
        yield from _old_rows(path, columns)
        return
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            header = next(reader, None)
            if header is None:
                raise DataError(f"{path}: the file is empty; expected a header with {', '.join(columns)}")
            missing = [column for column in columns if column not in header]
            if missing:
                raise DataError(f"{path}: column {missing[0]!r} is missing; found {', '.join(header)}")
            places = [header.index(column) for column in columns]
            for row in reader:
                if len(row) != len(header):
                    line = reader.line_num
                    raise DataError(f"{path}, line {line}: expected {len(header)} cells, got {len(row)}")
                yield reader.line_num, [row[place] for place in places]
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected UTF-8 text, but byte {error.start} of a block is not") from error
    except csv.Error as error:
        raise DataError(f"{path}: not readable as CSV: {error}") from error


def _old_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """As :func:`_rows`, of MovieLens 1M (latin-1) and 10M (UTF-8): ``::`` between cells, no header."""
    with open(path, "rb") as file:
        for line, raw in enumerate(file, start=1):
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError:
                text = raw.decode("latin-1")
            cells = text.rstrip("\r\n").split("::")
            if len(cells) != len(columns):
                raise DataError(
                    f"{path}, line {line}: expected {len(columns)} cells with '::' between them, got {len(cells)}"
                )
            yield line, cells


def read_films(path: Path) -> Films:
    """Read ``movies.csv``; a row that cannot be used raises a DataError."""
    names, genres, years = [], [], []
    index: dict[int, int] = {}
    for line, (movie, title, genre_list) in _rows(path, ("movieId", "title", "genres")):
        movie_id = _number(int, movie, path, line, "movieId")
        if movie_id in index:
            raise DataError(f"{path}, line {line}: movieId {movie_id} was already listed")
        index[movie_id] = len(index)
        own = [] if genre_list in ("", _NO_GENRE) else genre_list.split("|")
        year = _TITLE_YEAR.search(title)
        years.append((int(year.group(1)) - 1990) / 20 if year else 0.0)
        genres.append(own)
        names.append(_film_name(title, own))
    if not index:
        raise DataError(f"{path}: the file lists no film")
    genre_names = sorted({genre for own in genres for genre in own})
    features = np.zeros((len(names), len(genre_names) + 1), dtype=np.float32)
    columns = {genre: column for column, genre in enumerate(genre_names)}
    for row, own in enumerate(genres):
        features[row, [columns[genre] for genre in own]] = 1.0
    features[:, -1] = years
    return Films(names, features, genre_names, index, np.array(list(index), dtype=np.int64))


def read_ratings(path: Path, films: Films) -> Ratings:
    """Read ``ratings.csv``; a row that cannot be used, or a film rated twice by a user, raises a DataError."""
    users, rated, stars, times = [], [], [], []
    for line, (user, movie, rating, time) in _rows(path, ("userId", "movieId", "rating", "timestamp")):
        movie_id = _number(int, movie, path, line, "movieId")
        if movie_id not in films.index:
            raise DataError(f"{path}, line {line}: movieId {movie_id} is not listed in movies{path.suffix}")
        users.append(_number(int, user, path, line, "userId"))
        rated.append(films.index[movie_id])
        stars.append(_number(float, rating, path, line, "rating"))
        times.append(_number(int, time, path, line, "timestamp"))
    if not users:
        raise DataError(f"{path}: the file holds no rating")
    all_users, film, all_times = np.array(users), np.array(rated), np.array(times)
    order = np.lexsort((films.ids[film], all_times, all_users))
    rater, film = all_users[order], film[order]
    pairs = np.stack([rater, film], axis=1)
    unique, counts = np.unique(pairs, axis=0, return_counts=True)
    if (counts > 1).any():  # a second rating of a film would find the first, its own answer, in its history
        twice_user, twice_film = unique[counts > 1][0]
        raise DataError(f"{path}: user {twice_user} rates movieId {films.ids[twice_film]} more than once")
    start = run_starts(rater)
    return Ratings(rater, film, np.array(stars, dtype=np.float32)[order], all_times[order], start)


def _number(kind: Callable[[str], Any], cell: str, path: Path, line: int, column: str) -> Any:
    try:
        value = kind(cell)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        what = "an integer" if kind is int else "a number"
        raise DataError(f"{path}, line {line}: expected {what} in column {column!r}, got {cell!r}")
    return value


def _film_name(title: str, genres: Iterable[str]) -> str:
    """ "Usual Suspects, The (1995)" -> "The Usual Suspects (1995; Crime, Mystery)": as it would be said."""
    title = _TRAILING_ARTICLE.sub(r"\2 \1", title.strip())
    listed = ", ".join(genres)
    year = _TITLE_YEAR.search(title)
    if year:
        title = title[: year.start()].rstrip()
        listed = f"{year.group(1)}; {listed}" if listed else year.group(1)
    return f"{title} ({listed})" if listed else title


def run_starts(values: np.ndarray) -> np.ndarray:
    """For every entry, where its run of equal neighbours begins."""
    places = np.arange(len(values))
    new = np.ones(len(values), dtype=bool)
    new[1:] = values[1:] != values[:-1]
    return np.maximum.accumulate(np.where(new, places, 0))
