"""Label spaces: what the kind of problem is taken to be, which names come out, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from levi_fast.data.labels import LabelSpace
from levi_fast.data.tables import Table
from levi_fast.errors import DataError


def table(cells: list[Any], path: str = "rows.csv") -> Table:
    return Table(path, len(cells), {"y": cells})


def fit(cells: list[Any], **options: Any) -> LabelSpace:
    return LabelSpace.fit(table(cells), "y", **options)


class TestInference:
    @pytest.mark.parametrize(
        ("cells", "problem_type", "names"),
        [
            (["b", "a", "b"], "single_label_classification", ("a", "b")),
            (["10", "9", "-1"], "single_label_classification", ("-1", "9", "10")),
            ([10, 9, 9], "single_label_classification", ("9", "10")),
            ([True, False], "single_label_classification", ("false", "true")),
            (["True", "FALSE"], "single_label_classification", ("false", "true")),
            (["01", "1", "02"], "single_label_classification", ("01", "02", "1")),
            ([["b"], ["a", "b"], []], "multi_label_classification", ("a", "b")),
            (["1.5", "2"], "regression", ()),
            ([1.0, 2.0], "regression", ()),
            ([str(n) for n in range(101)], "regression", ()),
            ([str(n) for n in range(100)], "single_label_classification", tuple(str(n) for n in range(100))),
        ],
    )
    def test_kind_of_problem_and_names(self, cells: list[Any], problem_type: str, names: tuple[str, ...]) -> None:
        space = fit(cells)
        assert (space.problem_type, space.names) == (problem_type, names)

    def test_numbers_with_a_stray_word_are_not_guessed_at(self) -> None:
        with pytest.raises(
            DataError, match=r"row 3 of rows\.csv: column 'y' holds numbers, but here 'abc'.*--problem-type"
        ):
            fit(["1.5", "2", "abc", "3"])
        assert fit(["1", "2", "abc"], problem_type="single_label_classification").names == ("1", "2", "abc")

    def test_text_that_never_repeats_is_no_label(self) -> None:
        with pytest.raises(DataError, match=r"60 different labels in 60 rows; is it the label column\?"):
            fit([f"review {n}" for n in range(60)])


class TestEncoding:
    def test_ids_follow_the_sorted_names(self) -> None:
        space = fit(["pos", "neg", "pos"])
        assert space.encode(table(["neg", " pos "])).tolist() == [0, 1]
        assert space.encode(table(["neg"])).dtype == np.int64

    def test_whole_numbers_mean_the_same_in_every_format(self) -> None:
        space = fit(["0", "2", "10"])
        assert space.encode(table([0, 2.0, "10", "2.0"])).tolist() == [0, 1, 2, 1]

    def test_truth_values_mean_the_same_in_every_format(self) -> None:
        space = fit([True, False])
        assert space.encode(table(["TRUE", "false", True])).tolist() == [1, 0, 1]

    def test_unseen_label_names_label_row_file_and_known_ones(self) -> None:
        with pytest.raises(DataError) as caught:
            fit(["good", "bad"]).encode(table(["good", "so-so"], "ood.csv"))
        message = str(caught.value)
        assert "row 2 of ood.csv" in message and "'so-so'" in message and "known labels: bad, good" in message

    @pytest.mark.parametrize("cell", [None, "", "nan", "NaN", float("nan")])
    @pytest.mark.parametrize("problem_type", ["single_label_classification", "regression"])
    def test_missing_label(self, cell: Any, problem_type: str) -> None:
        with pytest.raises(DataError, match=r"row 2 of rows\.csv: column 'y': the label is missing"):
            fit(["1", cell, "2"], problem_type=problem_type)

    def test_multi_label_from_lists_and_from_text(self) -> None:
        space = fit([["b", "a"], [], ["c"]])
        assert space.encode(table([["c", "a"], []])).tolist() == [[1, 0, 1], [0, 0, 0]]
        space = fit(["x|y", "", "z"], problem_type="multi_label_classification")
        assert space.names == ("x", "y", "z")
        assert space.encode(table(["z | x", ""])).tolist() == [[1, 0, 1], [0, 0, 0]]
        space = fit(["x;y", "z"], problem_type="multi_label_classification", separator=";")
        assert space.names == ("x", "y", "z")

    def test_multi_label_refuses_null_numbers_and_repeats(self) -> None:
        with pytest.raises(DataError, match=r"row 2 .*the label is missing"):
            fit([["a"], None])
        with pytest.raises(DataError, match=r"row 2 .*expected a list of labels or text"):
            fit([["a"], 3])
        with pytest.raises(DataError, match=r"row 1 .*'a' stands there more than once"):
            fit([["a", "a"], ["b"]])

    def test_a_list_is_no_single_label(self) -> None:
        with pytest.raises(DataError, match=r"row 2 .*expected one label"):
            fit(["a", ["b"]], problem_type="single_label_classification")


class TestRegression:
    def test_targets_and_their_scale(self) -> None:
        space = fit(["1", "3", "5"], problem_type="regression")
        assert space.target_mean == 3.0 and space.target_std == pytest.approx(np.std([1, 3, 5]))
        assert space.encode(table(["2.5", 4])).tolist() == [2.5, 4.0]
        assert space.num_labels == 1

    @pytest.mark.parametrize("cell", ["high", "inf", "-Infinity", float("inf"), "1e400", "none", [1.0]])
    def test_label_that_is_no_finite_number(self, cell: Any) -> None:
        with pytest.raises(DataError, match=r"row 2 of rows\.csv: column 'y': expected a finite number"):
            fit(["1", cell, "2"], problem_type="regression")

    def test_constant_labels(self) -> None:
        with pytest.raises(DataError, match=r"every label in 'y' is 3: nothing to learn"):
            fit([3.0, 3.0])


def test_one_class_only() -> None:
    with pytest.raises(DataError, match=r"at least two different labels, got only 'x'"):
        fit(["x", "x"])


def test_unknown_problem_type() -> None:
    with pytest.raises(DataError, match=r"--problem-type: expected one of .*regression, got 'ranking'"):
        fit(["a", "b"], problem_type="ranking")


@pytest.mark.parametrize("cells", [["b", "a"], [1, 2], [1.5, 2.5], [["a"], ["b"]]])
def test_json_round_trip(cells: list[Any]) -> None:
    space = fit(cells)
    assert LabelSpace.from_json(space.to_json()) == space
