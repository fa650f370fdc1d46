"""MovieLens as a named task: predict a user's rating of a film from the ratings the user gave before.

Reads a folder in the layout of GroupLens' ``ml-latest-small``: ``ratings.csv`` (userId, movieId, rating,
timestamp) and ``movies.csv`` (movieId, title, genres, separated by ``|``). See :func:`load_movielens`.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from levi_fast.errors import DataError

HELD_OUT_GENRES = ("Animation", "Documentary", "Film-Noir", "Horror", "Musical", "War", "Western")
"""Default out-of-distribution genres of ``ml-latest-small``: every genre that fewer than 7 % of its ratings
carry.

Rare, so that leaving them out costs little training data; many, so that no single taste decides the figure.
IMAX is a projection format, not a genre, and stays in. The rule looks at how many ratings there are, never at
their values.
"""

FIRST_OOD_YEAR = 2010
SPLITS = {"genres": "held_out_genres", "years": "later_years"}
"""Kind of split -> name of its out-of-distribution set."""

_NO_GENRE = "(no genres listed)"
_TITLE_YEAR = re.compile(r"\((\d{4})[^()]*\)\s*$")
_TRAILING_ARTICLE = re.compile(r"^(.+), (The|A|An|Le|La|Les|L'|Il|El|Los|Das|Der|Die)(?= \(|$)")


@dataclass(frozen=True)
class MovieLensExamples:
    """n examples, one row each; rows are ordered by user, then time.

    Attributes:
        text: what the backbone reads: the target film, then films of the history with their ratings.
        label: ``[n]`` float32, the rating in stars.
        features: inputs of :class:`levi_fast.task_models.RecommendationTaskModel` by name:
            ``history_features [n, N, G]`` float32, ``history_ratings [n, N]`` float32 in stars,
            ``history_mask [n, N]`` bool, ``target_features [n, G]`` float32. The history's most recent film
            comes first; rows with fewer than N films end in padding.
        user_ids, movie_ids, timestamps: ``[n]`` int64, the rating that each row stands for; not model inputs.
    """

    text: list[str]
    label: np.ndarray
    features: dict[str, np.ndarray]
    user_ids: np.ndarray
    movie_ids: np.ndarray
    timestamps: np.ndarray

    def __len__(self) -> int:
        return len(self.text)


@dataclass(frozen=True)
class MovieLensTask:
    """A split of MovieLens, ready to be tokenised and turned into tensors (``torch.from_numpy`` on each
    array).

    Attributes:
        splits: "train", "validation", "test" (all in-distribution), and those named in ``ood_names``.
        ood_names: names of the out-of-distribution sets.
        feature_names: G names: the genres of ``movies.csv`` in alphabetical order, then "year", the film's
            year as (year - 1990) / 20, 0 where the title has none.
        description: one line on what is held out, for tables.
    """

    splits: dict[str, MovieLensExamples]
    ood_names: tuple[str, ...]
    feature_names: tuple[str, ...]
    description: str

    @property
    def task_model(self) -> dict[str, Any]:
        """Spec of the matching task model; its prior is the training set's mean rating."""
        labels = self.splits["train"].label
        return {
            "type": "recommendation",
            "num_features": len(self.feature_names),
            "rating_mean": round(float(labels.mean()), 4),
            "rating_scale": round(max(float(labels.std()), 0.1), 4),
        }


def load_movielens(
    data_dir: str | Path,
    split: str = "genres",
    seed: int = 0,
    *,
    held_out_genres: Sequence[str] = HELD_OUT_GENRES,
    first_ood_year: int = FIRST_OOD_YEAR,
    max_train: int = 8000,
    max_validation: int = 1500,
    max_test: int = 2000,
    max_ood: int = 2000,
    max_per_user: int = 50,
    history_length: int = 50,
    text_history: int = 3,
    min_history: int = 5,
) -> MovieLensTask:
    """Read MovieLens and split it so that the last set differs from training in one named way.

    An example is one rating. Its history is what the same user rated before it: earlier timestamps, and on
    equal timestamps smaller movie ids. Users, not ratings, are dealt out to training (65 %), validation (15
    %) and test (20 %), so nothing a test user ever rated is seen in training, neither as label nor inside a
    history.

    ``split="genres"``: films that carry any of ``held_out_genres`` are taken out of training, validation and ID
    test, as targets and from histories. The OOD set, "held_out_genres", are test users' ratings of exactly
    these films; there histories are complete, as they would be in use.

    ``split="years"``: training, validation and ID test are ratings given before ``first_ood_year`` (UTC). The OOD
    set, "later_years", are the later ratings of test users and of users who came later. Histories are
    complete.

    Args:
        data_dir: folder with ``ratings.csv`` and ``movies.csv``.
        split: "genres" or "years".
        seed: deals out the users and draws the subsamples.
        held_out_genres, first_ood_year: what each kind of split holds out.
        max_train, max_validation, max_test, max_ood: sizes of the subsamples; what is there if there is less.
        max_per_user: at most so many examples of one user in a set, so that heavy raters do not fill it.
        history_length: N, the most recent films of the history that the task model sees.
        text_history: how many of them the text names. The text starts with the target, so cutting it is safe.
        min_history: ratings with a shorter history are left out.

    Returns:
        the task; the same arguments and files give the same task.

    Raises:
        DataError: the folder, a file, a row or an argument cannot be used, or a set comes out empty; the
            message says which.
    """
    if split not in SPLITS:
        raise DataError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    for name, value, least in [
        ("max_train", max_train, 1),
        ("max_validation", max_validation, 1),
        ("max_test", max_test, 1),
        ("max_ood", max_ood, 1),
        ("max_per_user", max_per_user, 1),
        ("history_length", history_length, 1),
        ("text_history", text_history, 0),
        ("min_history", min_history, 0),
    ]:
        if value < least:
            raise DataError(f"{name}: expected at least {least}, got {value}")
    films = _read_films(_file(data_dir, "movies.csv"))
    ratings = _read_ratings(_file(data_dir, "ratings.csv"), films)

    if split == "genres":
        unknown = [genre for genre in held_out_genres if genre not in films.genre_names]
        if unknown or not held_out_genres:
            got = f"got {unknown[0]!r}" if unknown else "got none"
            raise DataError(f"held_out_genres: expected genres of {', '.join(films.genre_names)}; {got}")
        columns = [films.genre_names.index(genre) for genre in held_out_genres]
        shifted = films.features[ratings.film][:, columns].any(axis=1)
        description = "held out: films of " + ", ".join(held_out_genres)
    else:
        cut = int(datetime(first_ood_year, 1, 1, tzinfo=UTC).timestamp())
        shifted = ratings.time >= cut
        description = f"held out: ratings given in {first_ood_year} or later"

    # Where an ID example of split "genres" looks for its history, held-out films do not exist.
    hide_shifted = split == "genres"
    enough_all = ratings.position >= min_history
    enough_id = _count_before(~shifted, ratings.start) >= min_history if hide_shifted else enough_all
    in_distribution, out_of_distribution = ~shifted & enough_id, shifted & enough_all

    rng = np.random.default_rng(seed)
    group = _deal_users(ratings.user, in_distribution, rng)
    wanted = {
        "train": (in_distribution & (group == 0), max_train, hide_shifted),
        "validation": (in_distribution & (group == 1), max_validation, hide_shifted),
        "test": (in_distribution & (group == 2), max_test, hide_shifted),
        SPLITS[split]: (out_of_distribution & (group >= 2), max_ood, False),
    }
    splits = {}
    for name, (mask, size, hide) in wanted.items():
        rows = _subsample(np.flatnonzero(mask), ratings.user, max_per_user, size, rng)
        if not len(rows):
            raise DataError(f"{data_dir}: no rating is left for the {name} set of split {split!r} ({description})")
        visible = ~shifted if hide else np.ones_like(shifted)
        splits[name] = _examples(films, ratings, rows, visible, history_length, text_history)
    return MovieLensTask(splits, (SPLITS[split],), (*films.genre_names, "year"), description)


@dataclass(frozen=True)
class _Films:
    names: list[str]  # "The Usual Suspects (1995; Crime, Mystery, Thriller)"
    features: np.ndarray  # [films, G] float32
    genre_names: list[str]
    index: dict[int, int]  # movie id -> row
    ids: np.ndarray


@dataclass(frozen=True)
class _Ratings:
    """All ratings, ordered by user, time, movie id."""

    user: np.ndarray
    film: np.ndarray  # row in _Films
    stars: np.ndarray
    time: np.ndarray
    start: np.ndarray  # row of the same user's first rating

    @property
    def position(self) -> np.ndarray:
        return np.arange(len(self.user)) - self.start


def _file(data_dir: str | Path, name: str) -> Path:
    folder = Path(data_dir)
    if not folder.is_dir():
        raise DataError(f"data_dir: expected a folder with ratings.csv and movies.csv, {folder} is not a folder")
    if not (folder / name).is_file():
        found = sorted(path.name for path in folder.iterdir())[:8]
        raise DataError(f"{folder}: {name} is missing; found {', '.join(found) if found else 'nothing'}")
    return folder / name


def _rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """Yield the file's line number and the cells of the named columns."""
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


def _read_films(path: Path) -> _Films:
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
    return _Films(names, features, genre_names, index, np.array(list(index), dtype=np.int64))


def _read_ratings(path: Path, films: _Films) -> _Ratings:
    users, rated, stars, times = [], [], [], []
    for line, (user, movie, rating, time) in _rows(path, ("userId", "movieId", "rating", "timestamp")):
        movie_id = _number(int, movie, path, line, "movieId")
        if movie_id not in films.index:
            raise DataError(f"{path}, line {line}: movieId {movie_id} is not listed in movies.csv")
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
    start = _run_starts(rater)
    return _Ratings(rater, film, np.array(stars, dtype=np.float32)[order], all_times[order], start)


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


def _run_starts(values: np.ndarray) -> np.ndarray:
    """For every entry, where its run of equal neighbours begins."""
    places = np.arange(len(values))
    new = np.ones(len(values), dtype=bool)
    new[1:] = values[1:] != values[:-1]
    return np.maximum.accumulate(np.where(new, places, 0))


def _count_before(mask: np.ndarray, start: np.ndarray) -> np.ndarray:
    """For every row, how many earlier rows of the same user are in ``mask``."""
    before = np.r_[0, np.cumsum(mask)]
    return before[:-1] - before[start]


def _deal_users(user: np.ndarray, eligible: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """0 train, 1 validation, 2 test for every row, by its user; 3 for users without an eligible row."""
    users = rng.permutation(np.unique(user[eligible]))
    train, validation = round(0.65 * len(users)), round(0.80 * len(users))
    group_of = dict.fromkeys(users[:train].tolist(), 0)
    group_of |= dict.fromkeys(users[train:validation].tolist(), 1)
    group_of |= dict.fromkeys(users[validation:].tolist(), 2)
    return np.array([group_of.get(one, 3) for one in user.tolist()])


def _subsample(rows: np.ndarray, user: np.ndarray, per_user: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw at most ``per_user`` rows of each user, then at most ``size`` of those; in file order."""
    shuffled = rng.permutation(rows)
    by_user = shuffled[np.argsort(user[shuffled], kind="stable")]
    owner = user[by_user]
    first = _run_starts(owner)
    kept = by_user[np.arange(len(owner)) - first < per_user]
    return np.sort(rng.permutation(kept)[:size])


def _examples(
    films: _Films, ratings: _Ratings, rows: np.ndarray, visible: np.ndarray, length: int, text_length: int
) -> MovieLensExamples:
    count, width = len(rows), films.features.shape[1]
    history_features = np.zeros((count, length, width), dtype=np.float32)
    history_ratings = np.zeros((count, length), dtype=np.float32)
    history_mask = np.zeros((count, length), dtype=bool)
    text = []
    for example, row in enumerate(rows):
        earlier = np.arange(ratings.start[row], row)
        recent = earlier[visible[earlier]][::-1][:length]
        history_features[example, : len(recent)] = films.features[ratings.film[recent]]
        history_ratings[example, : len(recent)] = ratings.stars[recent]
        history_mask[example, : len(recent)] = True
        seen = [(films.names[ratings.film[item]], float(ratings.stars[item])) for item in recent[:text_length]]
        text.append(_text(films.names[ratings.film[row]], seen))
    return MovieLensExamples(
        text=text,
        label=ratings.stars[rows],
        features={
            "history_features": history_features,
            "history_ratings": history_ratings,
            "history_mask": history_mask,
            "target_features": films.features[ratings.film[rows]],
        },
        user_ids=ratings.user[rows],
        movie_ids=films.ids[ratings.film[rows]],
        timestamps=ratings.time[rows],
    )


def _text(target: str, history: Sequence[tuple[str, float]]) -> str:
    said = "; ".join(f"{name} rated {stars:g}" for name, stars in history)
    return f"Target: {target}. User history: {said or 'none'}."
