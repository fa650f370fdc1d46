"""One table with a column that says which set each row belongs to, as the WILDS benchmark ships its data.

WILDS (Koh et al., *WILDS: A Benchmark of in-the-Wild Distribution Shifts*, ICML 2021, arXiv 2012.07421) names its
sets ``train``, ``val``, ``test``, and in most data sets ``id_val`` and ``id_test`` too. Where those two exist, plain
``val`` and ``test`` are out of distribution; where they do not (CivilComments, Waterbirds, CelebA), ``val`` and
``test`` are drawn like the training rows. :func:`divide` follows that rule.
"""

from __future__ import annotations

from collections.abc import Mapping

from levi_fast.data.tables import Table, category_name, short
from levi_fast.errors import DataError

TRAIN, VALIDATION, TEST = "train", "validation", "test"

# The same set under the names that tables give it. A validation set that passed for an OOD set would go unnoticed.
_NAMES = {
    "train": TRAIN,
    "training": TRAIN,
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "id_val": "id_val",
    "id_test": "id_test",
}

# WILDS' default numbers. Data sets with more sets number them each in its own way: Amazon has 2 id_val, 3 test;
# iWildCam 2 test, 3 id_val; Camelyon17 1 id_val, 3 val. So only these three can be told from the number.
_CODES = {"0": "train", "1": "val", "2": "test"}
_LEFT_OUT = "-1"  # in WILDS' Amazon and Yelp: rows that the split does not use


def divide(table: Table, column: str) -> dict[str, Table]:
    """The sets of a table, by split name: "train", "validation", "test", and "ood NAME" for each of the others.

    Names are compared without regard to case: ``train`` (or ``training``), ``val`` (``valid``, ``validation``,
    ``dev``), ``test``, ``id_val``, ``id_test``; any other value names an OOD set, such as ``ood_val``. ``val`` and
    ``test`` are in distribution unless ``id_val`` or ``id_test`` occurs. A column of nothing but whole numbers is
    WILDS' codes: 0 train, 1 val, 2 test, and -1 for rows that are left out.

    Args:
        table: with ``column`` among its cells.
        column: what ``--split-column`` names.

    Returns:
        tables whose rows keep their order, and their numbers in messages.

    Raises:
        DataError: an empty cell, another code, one set under two names, or no training rows.
    """
    members: dict[str, list[int]] = {}
    for row, cell in enumerate(table.cells[column]):
        name = category_name(cell)
        if name is None:
            raise DataError(f"{table.where(row)}: column {column!r}: expected the name of a set, got {short(cell)}")
        members.setdefault(name, []).append(row)
    where = f"{table.path}: column {column!r}"
    if all(name.lstrip("-").isdecimal() for name in members):
        members = _decoded(members, where)
    roles = _roles(members, where)
    if TRAIN not in roles.values():
        found = ", ".join(repr(name) for name in list(members)[:20])
        raise DataError(f"{where}: no training rows: expected some with 'train', found {found or 'none'}")
    return {role: table.select(members[name]) for name, role in roles.items()}


def _decoded(members: Mapping[str, list[int]], where: str) -> dict[str, list[int]]:
    unknown = sorted((code for code in members if code not in _CODES and code != _LEFT_OUT), key=int)
    if unknown:
        raise DataError(
            f"{where}: expected the codes 0 (train), 1 (val), 2 (test) and -1 (left out), got {unknown[0]}; every "
            "data set numbers further ones in its own way: write names (train, val, id_val, ...) instead"
        )
    return {_CODES[code]: rows for code, rows in members.items() if code in _CODES}


def _roles(members: Mapping[str, list[int]], where: str) -> dict[str, str]:
    """Name in the column -> split name; training first, OOD sets in the order of their first rows."""
    plain = {name: _NAMES.get(name.lower(), name) for name in members}
    first: dict[str, str] = {}
    for name, known in plain.items():
        if known in first:
            raise DataError(f"{where}: {first[known]!r} and {name!r} name the same set; give it one name")
        first[known] = name
    has_id = "id_val" in first or "id_test" in first
    id_names = {"id_val" if has_id else "val": VALIDATION, "id_test" if has_id else "test": TEST, TRAIN: TRAIN}
    roles = {name: id_names.get(known, f"ood {name}") for name, known in plain.items()}
    order = (TRAIN, VALIDATION, TEST)
    return dict(sorted(roles.items(), key=lambda item: order.index(item[1]) if item[1] in order else len(order)))
