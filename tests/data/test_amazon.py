"""Amazon Reviews in the formats of 2018 and 2023: what is drawn, and what cannot be read."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from levi_fast.data.amazon import find_categories, load_amazon
from levi_fast.errors import DataError


def review_2018(reviewer: str, stars: float, text: str | None, summary: str | None = "Nice") -> dict[str, Any]:
    """A row as in the release of Ni et al.; reviewText and summary are missing where there is none."""
    row = {
        "overall": stars,
        "vote": "5",
        "verified": True,
        "reviewTime": "09 13, 2009",
        "reviewerID": reviewer,
        "asin": "0000013714",
        "style": {"Format:": " Hardcover"},
        "reviewerName": "J. McDonald",
        "reviewText": text,
        "summary": summary,
        "unixReviewTime": 1252800000,
    }
    return {key: value for key, value in row.items() if value is not None}


def review_2023(reviewer: str, stars: float, text: str, title: str = "Meh") -> dict[str, Any]:
    """A row as in the release of the McAuley Lab."""
    return {
        "rating": stars,
        "title": title,
        "text": text,
        "images": [],
        "asin": "B088SZDGXG",
        "parent_asin": "B08BBQ29N5",
        "user_id": reviewer,
        "timestamp": 1634275259292,
        "helpful_vote": 0,
        "verified_purchase": True,
    }


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def category(name: str, count: int = 200) -> list[dict[str, Any]]:
    return [review_2018(f"A{place % 100}", 1.0 + place % 5, f"{name} {place}") for place in range(count)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "Books_5.json.gz", category("book"))
    write(tmp_path / "Toys.json", category("toy"))
    write(tmp_path / "meta_Books.json.gz", [{"asin": "1", "title": "no review"}])
    (tmp_path / "README.txt").write_text("by hand")
    return tmp_path


def error(data: Path, *categories: str) -> str:
    with pytest.raises(DataError) as caught:
        load_amazon(data, categories)
    return str(caught.value)


class TestSplits:
    def test_one_category_trains_and_the_other_is_ood(self, folder: Path) -> None:
        tables = load_amazon(folder, ["Books"])
        assert list(tables) == ["train", "validation", "test", "ood Toys"]
        for split, table in tables.items():
            assert all(text.startswith("toy" if split == "ood Toys" else "book") for text in table.cells["text"])
        # every book review is in one set: nothing was drawn
        books = [text for split in ("train", "validation", "test") for text in tables[split].cells["text"]]
        assert Counter(books) == Counter(f"book {place}" for place in range(200))
        first = tables["train"]
        row = int(first.cells["text"][0].split()[1])
        assert first.cells["rating"][0] == 1.0 + row % 5 and first.cells["title"][0] == "Nice"

    def test_no_reviewer_of_training_is_in_another_set(self, folder: Path) -> None:
        tables = load_amazon(folder, ["Books"])
        writers = {
            split: {int(text.split()[1]) % 100 for text in table.cells["text"]} for split, table in tables.items()
        }
        for split in ("validation", "test", "ood Toys"):
            assert writers[split] and not writers[split] & writers["train"]
        assert writers["validation"] | writers["test"] == writers["ood Toys"]
        assert 50 <= len(writers["train"]) <= 90  # 70 of 100 are expected

    def test_two_categories_train(self, folder: Path) -> None:
        write(folder / "Baby.json", category("baby"))
        tables = load_amazon(folder, ["Toys", "Books"])
        assert list(tables) == ["train", "validation", "test", "ood Baby"]
        assert {text.split()[0] for text in tables["train"].cells["text"]} == {"book", "toy"}

    def test_a_single_file_needs_no_category(self, folder: Path) -> None:
        assert list(load_amazon(folder / "Toys.json")) == ["train", "validation", "test"]

    def test_the_two_releases_give_the_same(self, tmp_path: Path) -> None:
        old, new = tmp_path / "old", tmp_path / "new"
        old.mkdir()
        new.mkdir()
        rows = [(f"A{place}", 1.0 + place % 5, f"text {place}") for place in range(60)]
        write(old / "Books.json.gz", [review_2018(*row) for row in rows])
        write(new / "Books.jsonl.gz", [review_2023(*row, title="Nice") for row in rows])
        assert load_amazon(old) == load_amazon(new)


class TestDrawing:
    def test_sizes_and_seeds(self, folder: Path) -> None:
        small = load_amazon(folder, ["Books"], max_train=20, max_eval=5)
        assert {split: table.num_rows for split, table in small.items()} == {
            "train": 20, "validation": 5, "test": 5, "ood Toys": 5
        }  # fmt: skip
        assert small == load_amazon(folder, ["Books"], max_train=20, max_eval=5)
        assert small["train"] != load_amazon(folder, ["Books"], seed=1, max_train=20, max_eval=5)["train"]
        everything = load_amazon(folder, ["Books"])["train"].cells["text"]
        drawn = small["train"].cells["text"]
        assert [text for text in everything if text in set(drawn)] == drawn  # in the file's order

    def test_every_review_is_as_likely(self, tmp_path: Path) -> None:
        write(tmp_path / "Books.json", [review_2018(f"A{place}", 3.0, str(place)) for place in range(100)])
        counts: Counter[str] = Counter()
        for seed in range(200):
            counts.update(load_amazon(tmp_path, seed=seed, max_train=10)["train"].cells["text"])
        # 2,000 draws of 100 reviews: 20 each; 4 standard deviations of a binomial are 18
        assert len(counts) == 100 and max(counts.values()) < 38 and min(counts.values()) > 2

    def test_memory_is_for_what_is_drawn(self, tmp_path: Path) -> None:
        rows = [review_2018(f"A{place}", 3.0, f"{place} " + "word " * 400) for place in range(4000)]
        write(tmp_path / "Books.json.gz", rows)  # 8 MB of text
        del rows
        tracemalloc.start()
        load_amazon(tmp_path, max_train=20, max_eval=5)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2 * 2**20

    def test_reviews_without_text_are_left_out(self, tmp_path: Path) -> None:
        rows = [review_2018(f"A{place}", 3.0, "text", summary=None) for place in range(50)]
        write(tmp_path / "Books.json", [*rows, review_2018("B", 3.0, None, " "), review_2018("C", 0.0, "text")])
        with pytest.warns(UserWarning, match="2 reviews without text, or rated outside 1 to 5, were left out"):
            tables = load_amazon(tmp_path)
        assert sum(table.num_rows for table in tables.values()) == 50
        assert set(tables["train"].cells["title"]) == {""}


class TestUnusable:
    def test_categories(self, folder: Path) -> None:
        assert "train_categories (--split): expected the categories to train on" in error(folder)
        assert f"{folder} has no category 'Music'; it has Books, Toys" in error(folder, "Music")

    def test_files(self, folder: Path, tmp_path: Path) -> None:
        assert "no such file or folder" in error(tmp_path / "gone")
        empty = tmp_path / "empty"
        empty.mkdir()
        assert "one per category; found none" in error(empty)
        write(folder / "Books.jsonl", category("book"))
        with pytest.raises(DataError, match=r"Books\.jsonl and Books_5\.json\.gz are both of category 'Books'"):
            find_categories(folder)

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("{'overall': 5}", "expected a review as JSON: Expecting property name"),
            ("[1]", "expected a review as a JSON object, got [1]"),
            ('{"asin": "1"}', "expected 'overall' (the release of 2018) or 'rating' (2023), found 'asin'"),
            ('{"overall": "5", "reviewerID": "A"}', "'overall': expected a number of stars, got '5'"),
            ('{"rating": NaN, "user_id": "A"}', "'rating': expected a number of stars, got nan"),
            ('{"rating": 5.0}', "'user_id': expected the reviewer, got None"),
            ('{"rating": 5.0, "user_id": "A", "text": ["a"]}', "'text': expected text, got ['a']"),
        ],
    )
    def test_a_line_that_is_no_review(self, tmp_path: Path, line: str, message: str) -> None:
        path = write(tmp_path / "Books.json", [review_2018("A", 1.0, "text")])
        path.write_text(path.read_text() + "\n" + line + "\n")
        assert f"{path}, line 3: {message}" in error(tmp_path)

    def test_bytes_that_are_not_text_or_gzip(self, tmp_path: Path) -> None:
        path = tmp_path / "Books.json"
        path.write_bytes(b'{"overall": 5.0, "summary": "caf\xe9"}\n')
        assert f"{path}, line 1: expected UTF-8 text, got byte 0xe9" in error(path)
        whole = gzip.compress("".join(json.dumps(row) + "\n" for row in category("book", 2000)).encode())
        cut = tmp_path / "Cut.json.gz"
        cut.write_bytes(whole[: len(whole) // 2])
        message = error(cut)
        assert message.startswith(f"{cut}, line ") and "not readable as gzip" in message
        cut.write_text("plain")
        assert f"{cut}, line 1: not readable as gzip" in error(cut)

    def test_a_set_without_reviews(self, tmp_path: Path) -> None:
        write(tmp_path / "Books.json", [review_2018("A", 1.0, "text")])
        assert "no review is left for the" in error(tmp_path)

    def test_sizes(self, folder: Path) -> None:
        with pytest.raises(DataError, match="max_eval: expected at least 1, got 0"):
            load_amazon(folder, ["Books"], max_eval=0)
