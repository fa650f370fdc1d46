"""MovieLens as a task: what a history may hold, what each split keeps apart, and errors for unusable folders."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from levi_fast.data.movielens import HELD_OUT_GENRES, MovieLensExamples, MovieLensTask, load_movielens
from levi_fast.errors import DataError
from levi_fast.task_models import build_task_model, view_width_of

GENRES = ["Action", "Comedy", "Drama", "Horror", "War"]
DAY = 86_400
START_2008 = 1_199_145_600


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 users, 60 films, about 30 ratings each from 2008 on; drawn with a fixed seed."""
    path = tmp_path_factory.mktemp("movielens")
    rng = np.random.default_rng(0)
    films = ["movieId,title,genres"]
    for film in range(60):
        own = sorted(set(rng.choice(GENRES, size=rng.integers(1, 3), p=[0.3, 0.3, 0.24, 0.08, 0.08])))
        year = "" if film == 7 else f" ({1980 + film % 30})"
        films.append(f'{film * 3},"Film {film}, The{year}",{"(no genres listed)" if film == 7 else "|".join(own)}')
    ratings = ["userId,movieId,rating,timestamp"]
    for user in range(40):
        chosen = rng.permutation(60)[: rng.integers(25, 35)]
        first = START_2008 + int(rng.integers(0, 900)) * DAY
        for place, film in enumerate(chosen):
            time = first + place // 2 * 9 * DAY  # two at a time: ties
            ratings.append(f"{user},{film * 3},{rng.integers(1, 11) / 2},{time}")
    (path / "movies.csv").write_text("\n".join(films) + "\n", encoding="utf-8")
    (path / "ratings.csv").write_text("\n".join(ratings) + "\n", encoding="utf-8")
    return path


def load(folder: Path, split: str = "genres", seed: int = 0, **settings: int) -> MovieLensTask:
    return load_movielens(folder, split, seed, held_out_genres=("Horror", "War"), **settings)


def raw(folder: Path) -> dict[int, list[tuple[int, int, float]]]:
    """user -> [(time, movie id, stars)] in order."""
    by_user: dict[int, list[tuple[int, int, float]]] = {}
    for line in (folder / "ratings.csv").read_text().splitlines()[1:]:
        user, movie, stars, time = line.split(",")
        by_user.setdefault(int(user), []).append((int(time), int(movie), float(stars)))
    return {user: sorted(rows) for user, rows in by_user.items()}


def genres_of(folder: Path) -> dict[int, set[str]]:
    lines = (folder / "movies.csv").read_text().splitlines()[1:]
    return {int(line.split(",")[0]): set(line.rsplit(",", 1)[1].split("|")) for line in lines}


def has_genre(task: MovieLensTask, features: np.ndarray, names: set[str]) -> np.ndarray:
    held: np.ndarray = features[..., [task.feature_names.index(name) for name in names]] != 0
    return np.asarray(held.any(axis=-1))


def same(a: MovieLensExamples, b: MovieLensExamples) -> bool:
    return a.text == b.text and all(np.array_equal(a.features[key], b.features[key]) for key in a.features)


@pytest.mark.parametrize("split", ["genres", "years"])
def test_history_is_exactly_the_users_earlier_visible_ratings(folder: Path, split: str) -> None:
    task = load(folder, split, history_length=12)
    ratings, genres = raw(folder), genres_of(folder)
    assert task.ood_names == ({"genres": "held_out_genres", "years": "later_years"}[split],)
    for name, examples in task.splits.items():
        hide = split == "genres" and name not in task.ood_names
        for row in range(len(examples)):
            user, movie = int(examples.user_ids[row]), int(examples.movie_ids[row])
            own = ratings[user]
            place = next(i for i, (_, other, _) in enumerate(own) if other == movie)
            assert examples.label[row] == own[place][2]
            assert examples.timestamps[row] == own[place][0]
            earlier = [r for r in own[:place] if not (hide and genres[r[1]] & {"Horror", "War"})]
            expected = [stars for _, _, stars in earlier[::-1]][:12]
            mask = examples.features["history_mask"][row]
            assert mask.tolist() == [True] * len(expected) + [False] * (12 - len(expected))
            assert examples.features["history_ratings"][row][mask].tolist() == expected
            assert len(earlier) >= 5


def test_features_are_genres_and_scaled_year(folder: Path) -> None:
    task = load(folder)
    assert task.feature_names == (*GENRES, "year")
    genres = genres_of(folder)
    seen_without_genre = False
    for examples in task.splits.values():
        for movie, features in zip(examples.movie_ids, examples.features["target_features"], strict=True):
            names = {name for name, on in zip(GENRES, features[:-1], strict=True) if on}
            if movie == 21:
                seen_without_genre = True
                assert not features.any()
            else:
                assert names == genres[int(movie)]
                assert features[-1] == pytest.approx((1980 + movie // 3 % 30 - 1990) / 20)
    assert seen_without_genre


def test_text_names_target_first_then_recent_history(folder: Path) -> None:
    examples = load(folder, text_history=2).splits["train"]
    row = next(i for i, movie in enumerate(examples.movie_ids) if movie != 21)
    film = int(examples.movie_ids[row]) // 3
    assert examples.text[row].startswith(f"Target: The Film {film} ({1980 + film % 30}; ")
    assert examples.text[row].count(" rated ") == 2
    assert f"rated {examples.features['history_ratings'][row][0]:g};" in examples.text[row]
    nothing = load(folder, text_history=0, min_history=0).splits["train"]
    assert nothing.text[0].endswith("User history: none.")


def test_held_out_genres_appear_nowhere_in_distribution(folder: Path) -> None:
    task = load(folder)
    for name, examples in task.splits.items():
        held_out = has_genre(task, examples.features["target_features"], {"Horror", "War"})
        in_history = has_genre(task, examples.features["history_features"], {"Horror", "War"})
        if name == "held_out_genres":
            assert held_out.all()
            assert in_history.any()
        else:
            assert not held_out.any()
            assert not in_history.any()


def test_years_are_split_at_the_first_second_of_the_year(folder: Path) -> None:
    task = load_movielens(folder, "years", first_ood_year=2010)
    cut = START_2008 + (366 + 365) * DAY  # 2008 was a leap year
    for name, examples in task.splits.items():
        later = examples.timestamps >= cut
        assert later.all() if name == "later_years" else not later.any()


@pytest.mark.parametrize("split", ["genres", "years"])
def test_users_are_disjoint(folder: Path, split: str) -> None:
    splits = load(folder, split).splits
    users = {name: set(examples.user_ids.tolist()) for name, examples in splits.items()}
    ood = next(name for name in users if name not in ("train", "validation", "test"))
    assert not users["train"] & (users["validation"] | users["test"] | users[ood])
    assert not users["validation"] & (users["test"] | users[ood])


def test_same_seed_same_task_and_another_seed_other_users(folder: Path) -> None:
    first, second, other = load(folder), load(folder), load(folder, seed=1)
    for name in first.splits:
        assert same(first.splits[name], second.splits[name])
    assert set(first.splits["test"].user_ids) != set(other.splits["test"].user_ids)


def test_order_of_the_file_does_not_matter(folder: Path, tmp_path: Path) -> None:
    header, *rows = (folder / "ratings.csv").read_text().splitlines()
    (tmp_path / "ratings.csv").write_text("\n".join([header, *rows[::-1]]))
    (tmp_path / "movies.csv").write_bytes((folder / "movies.csv").read_bytes())
    first, second = load(folder), load(tmp_path)
    assert all(same(first.splits[name], second.splits[name]) for name in first.splits)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-8"])  # of MovieLens 1M, of 10M
def test_dat_files_are_read_as_the_csv_files_are(folder: Path, tmp_path: Path, encoding: str) -> None:
    written, old = tmp_path / "csv", tmp_path / "dat"
    written.mkdir()
    old.mkdir()
    for name in ("movies", "ratings"):
        text = (folder / f"{name}.csv").read_text(encoding="utf-8").replace("Film 5, The", "Misérables: 5, Les")
        (written / f"{name}.csv").write_text(text, encoding="utf-8")
        rows = [*csv.reader(text.splitlines())][1:]
        (old / f"{name}.dat").write_bytes("".join("::".join(row) + "\n" for row in rows).encode(encoding))
    first, second = load(written), load(old)
    assert any("Les Misérables: 5" in text for rows in second.splits.values() for text in rows.text)
    for name in first.splits:
        assert same(first.splits[name], second.splits[name])
    with open(old / "ratings.dat", "a") as file:
        file.write("1::2::3\n")
    with pytest.raises(DataError, match=r"ratings\.dat, line \d+: expected 4 cells with '::' between them, got 3"):
        load(old)


def test_subsampling_keeps_the_bounds(folder: Path) -> None:
    task = load(folder, max_train=50, max_validation=20, max_test=21, max_ood=7, max_per_user=4)
    assert [len(task.splits[name]) for name in ("train", "validation", "test", "held_out_genres")] == [50, 20, 21, 7]
    for examples in task.splits.values():
        assert np.unique(examples.user_ids, return_counts=True)[1].max() <= 4
        place = list(zip(examples.user_ids, examples.timestamps, examples.movie_ids, strict=True))
        assert place == sorted(place) and len(set(place)) == len(place)


def test_task_model_takes_the_arrays_as_they_are(folder: Path) -> None:
    task = load(folder)
    examples = task.splits["held_out_genres"]
    model = build_task_model(task.task_model)
    view = model(**{name: torch.from_numpy(array) for name, array in examples.features.items()})
    assert view.shape == (len(examples), view_width_of(model)) and view.isfinite().all()
    assert task.task_model["rating_mean"] == pytest.approx(float(task.splits["train"].label.mean()), abs=1e-4)


def broken(folder: Path, target: Path, name: str, old: str, new: str) -> Path:
    for file in ("movies.csv", "ratings.csv"):
        text = (folder / file).read_text(encoding="utf-8")
        if file == name:
            assert old in text
            text = text.replace(old, new, 1)
        (target / file).write_text(text, encoding="utf-8")
    return target


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("ratings.csv", "rating,", "stars,", r"ratings\.csv: column 'rating' is missing; found userId, movieId"),
        ("movies.csv", "genres\n", "kinds\n", r"movies\.csv: column 'genres' is missing"),
        (
            "ratings.csv",
            "timestamp\n",
            "timestamp\n0,3,good,5\n",
            r"line 2: expected a number in .* 'rating', got 'g",
        ),
        ("ratings.csv", "timestamp\n", "timestamp\n0,3,nan,5\n", r"line 2: expected a number.*got 'nan'"),
        ("ratings.csv", "timestamp\n", "timestamp\n0,3,4,now\n", r"expected an integer in column 'timestamp'"),
        ("ratings.csv", "timestamp\n", "timestamp\n0,3,4\n", r"line 2: expected 4 cells, got 3"),
        ("ratings.csv", "timestamp\n", "timestamp\n0,1000,4,5\n", r"line 2: movieId 1000 is not listed in movies"),
        ("ratings.csv", "timestamp\n", "timestamp\n77,3,4,5\n77,3,5,9\n", "user 77 rates movieId 3 more than once"),
        ("movies.csv", "genres\n", "genres\n3,Twin (1990),Action\n", "line 4: movieId 3 was already listed"),
    ],
)
def test_bad_rows_are_named(folder: Path, tmp_path: Path, name: str, old: str, new: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(broken(folder, tmp_path, name, old, new))


def test_wrong_folders_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        load(folder / "ratings.csv")
    with pytest.raises(DataError, match="is not a folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"movies\.csv is missing; found nothing"):
        load(tmp_path)
    (tmp_path / "movies.csv").write_bytes((folder / "movies.csv").read_bytes())
    with pytest.raises(DataError, match=r"ratings\.csv is missing; found movies\.csv"):
        load(tmp_path)
    (tmp_path / "ratings.csv").write_text("")
    with pytest.raises(DataError, match=r"ratings\.csv: the file is empty"):
        load(tmp_path)
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n")
    with pytest.raises(DataError, match=r"ratings\.csv: the file holds no rating"):
        load(tmp_path)
    (tmp_path / "movies.csv").write_bytes("movieId,title,genres\n1,Amélie (2001),Comedy\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"movies\.csv: expected UTF-8"):
        load(tmp_path)


def test_wrong_arguments_are_named(folder: Path) -> None:
    with pytest.raises(DataError, match="split: expected one of genres, years, got 'actors'"):
        load(folder, "actors")
    with pytest.raises(DataError, match=r"held_out_genres: expected genres of Action, .*; got 'Jazz'"):
        load_movielens(folder, held_out_genres=["Horror", "Jazz"])
    with pytest.raises(DataError, match=r"held_out_genres: .*got none"):
        load_movielens(folder, held_out_genres=[])
    with pytest.raises(DataError, match="max_train: expected at least 1, got 0"):
        load(folder, max_train=0)
    with pytest.raises(DataError, match=r"no rating is left for the later_years set"):
        load_movielens(folder, "years", first_ood_year=2030)


def real_folder() -> Path:
    root = os.environ.get("LEVI_FAST_DATA") or Path(__file__).resolve().parents[2].parent / "shared" / "data"
    return Path(root) / "movielens-small"


@pytest.mark.skipif(
    not (real_folder() / "ratings.csv").is_file(),
    reason="MovieLens is not here: put ml-latest-small into $LEVI_FAST_DATA/movielens-small to run this test",
)
@pytest.mark.parametrize("split", ["genres", "years"])
def test_the_real_data_set(split: str) -> None:
    task = load_movielens(real_folder(), split, seed=0)
    ood = task.splits[task.ood_names[0]]
    assert {name: len(examples) for name, examples in task.splits.items()} == {
        "train": 6000,
        "validation": 1500,
        "test": 1500,
        task.ood_names[0]: 1500,
    }
    assert len(task.feature_names) == 20 and "(no genres listed)" not in task.feature_names
    assert np.isin(ood.label, np.arange(1, 11) / 2).all()
    train_users = set(task.splits["train"].user_ids.tolist())
    assert not train_users & set(ood.user_ids.tolist())
    if split == "genres":
        assert has_genre(task, ood.features["target_features"], set(HELD_OUT_GENRES)).all()
        for name in ("train", "validation", "test"):
            features = task.splits[name].features
            assert not has_genre(task, features["target_features"], set(HELD_OUT_GENRES)).any()
            assert not has_genre(task, features["history_features"], set(HELD_OUT_GENRES)).any()
