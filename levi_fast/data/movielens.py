"""MovieLens as a named task: predict a user's rating of a film from the ratings the user gave before.

Reads a folder in the layout of GroupLens' ``ml-latest-small``: ``ratings.csv`` (userId, movieId, rating,
timestamp) and ``movies.csv`` (movieId, title, genres, separated by ``|``), or of ``ml-1m`` and ``ml-10m``: the
same columns in ``ratings.dat`` and ``movies.dat``, ``::`` between them, without a header. See :func:`load_movielens`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from levi_fast.data.movielens_files import Films, Ratings, find_file, read_films, read_ratings, run_starts
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
    max_train: int = 6000,
    max_validation: int = 1500,
    max_test: int = 1500,
    max_ood: int = 1500,
    max_per_user: int = 50,
    history_length: int = 20,
    text_history: int = 2,
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
    films = read_films(find_file(data_dir, "movies.csv"))
    ratings = read_ratings(find_file(data_dir, "ratings.csv"), films)

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
    first = run_starts(owner)
    kept = by_user[np.arange(len(owner)) - first < per_user]
    return np.sort(rng.permutation(kept)[:size])


def _examples(
    films: Films, ratings: Ratings, rows: np.ndarray, visible: np.ndarray, length: int, text_length: int
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
