"""Manifests and shards that somebody else wrote: clear errors, nothing outside the folder, no large allocation."""

from __future__ import annotations

import hashlib
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from levi_fast import ActivationCache, DataError
from levi_fast.cache.manifest import MAX_MANIFEST_BYTES, Manifest
from levi_fast.data.encoded import EncodedDataset

SMALL = {"batch_size": 4, "batches_per_shard": 2}


@pytest.fixture
def built(tmp_path: Path, counting: Callable[..., Any], texts: Callable[..., EncodedDataset]) -> Path:
    ActivationCache.build(tmp_path / "c", counting(), texts(20), **SMALL)
    return tmp_path / "c"


def edit(folder: Path, path: str, value: Any) -> None:
    """Set one value of the manifest; ``path`` has dots, numbers are places in lists."""
    document = json.loads((folder / "manifest.json").read_text())
    at = document
    *parents, last = [int(part) if part.isdecimal() else part for part in path.split(".")]
    for part in parents:
        at = at[part]
    at[last] = value
    (folder / "manifest.json").write_text(json.dumps(document))


SHARD = "parts.data.shards.0"
EDITS = [
    ("format", "something else", "format: expected levi_fast activation cache"),
    ("version", 2, "expected version 1, got 2"),
    ("version", True, None),
    ("complete", 1, "complete: expected true or false, got 1"),
    ("parts", [], "parts: expected an object"),
    ("parts", {}, r"parts: expected the names in key.data"),
    ("key", None, "key: expected an object"),
    ("key.taps", [2, 1, 0], "key.taps: expected ascending layers"),
    ("key.taps", [0, 1, 3], "key.taps: expected layers of the backbone"),
    ("key.taps", [0] * 100000, "key.taps: expected a list of 1 to 4096 numbers"),
    ("key.dtype", "object", "key.dtype: expected one of float32"),
    ("key.dtype", ["int8"], "key.dtype: expected one of float32"),
    ("key.views", 0, "key.views: expected a whole number from 1"),
    ("backbone.widths", [16, 16], "backbone.widths: expected one width per tap"),
    ("backbone.widths", [16, 16, 10**15], r"backbone.widths\[2\]: expected a whole number"),
    ("backbone.widths", [16, 16, 16.0], r"backbone.widths\[2\]: expected a whole number"),
    ("backbone.files", "x", "backbone.files: expected a list"),
    ("backbone.files", [{"name": "x"}], r"backbone.files\[0\].sha256: expected text"),
    ("layout.batch_size", -1, "layout.batch_size: expected a whole number from 1"),
    (f"{SHARD}.file", "../../../etc/passwd", "file: expected a name such as shard-00000.safetensors in this folder"),
    (f"{SHARD}.file", "/etc/passwd", "file: expected a name such as"),
    (f"{SHARD}.file", "shard-00000.safetensors/../x", "file: expected a name such as"),
    (f"{SHARD}.file", "shard-00000.safetensors\n", "file: expected a name such as"),
    (f"{SHARD}.file", "rows-000.safetensors", "file: expected a name such as shard"),
    (f"{SHARD}.file", "shard-00001.safetensors", "expected every file once"),
    (f"{SHARD}.file", None, "file: expected a name such as"),
    (f"{SHARD}.count", -5, "count: expected a whole number from 1"),
    (f"{SHARD}.count", 10**30, "count: expected a whole number"),
    (f"{SHARD}.count", 2**39, "bytes: expected about"),
    (f"{SHARD}.count", 1e3, "count: expected a whole number"),
    (f"{SHARD}.bytes", 2**49, "bytes: expected about"),
    (f"{SHARD}.bytes", 0, "bytes: expected about"),
    (f"{SHARD}.bytes", None, "bytes: expected a whole number"),
    (f"{SHARD}.sha256", "0" * 63, "sha256: expected 64 hexadecimal digits"),
    ("parts.data.shards", [], "shards: expected a list of shards"),
    ("parts.data.shards", "x" * 10**6, "shards: expected a list of shards"),
    ("parts.data.rows", 0, "rows: expected a whole number from 1"),
    ("parts.data.rows", 2**40, "index.count: expected"),
    ("parts.data.views", 7, "index.count: expected"),
    ("parts.data.index.count", 3, "index.count: expected"),
]


@pytest.mark.parametrize(("path", "value", "message"), EDITS)
def test_a_manifest_that_does_not_fit(built: Path, path: str, value: Any, message: str | None) -> None:
    edit(built, path, value)
    if message is None:  # JSON's true is not 1, but equals it in Python: harmless
        ActivationCache.open(built)
        return
    with pytest.raises(DataError, match=message) as caught:
        ActivationCache.open(built)
    assert str(built) in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no JSON"),
        (b"\xff\xfe\x00", "is no JSON"),
        (b"[" * 200000, "is no JSON"),
        (b'{"a": ' + b"9" * 6000 + b"}", "is no JSON"),
        (b"null", "format: expected"),
        (b'["levi_fast activation cache"]', "format: expected"),
    ],
)
def test_a_manifest_that_is_none(built: Path, content: bytes, message: str) -> None:
    (built / "manifest.json").write_bytes(content)
    with pytest.raises(DataError, match=message):
        ActivationCache.open(built)
    with pytest.raises(DataError, match=message):
        ActivationCache.inspect(built)


def test_a_huge_manifest_is_not_read(built: Path) -> None:
    os.truncate(built / "manifest.json", MAX_MANIFEST_BYTES + 1)  # a hole: it takes no room on disk
    with pytest.raises(DataError, match="expected at most 67108864 bytes, got 67108865"):
        ActivationCache.open(built)


@pytest.mark.parametrize("name", ["manifest.json", "shard-00000.safetensors", "rows-000.safetensors"])
def test_links_that_lead_out_are_refused(built: Path, tmp_path: Path, name: str) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes((built / name).read_bytes())
    (built / name).unlink()
    (built / name).symlink_to(secret)
    with pytest.raises(DataError, match="leads out of its folder"):
        ActivationCache.open(built)


def test_links_within_the_folder_and_to_it_are_fine(built: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(built)
    assert ActivationCache.open(tmp_path / "link").verify() == []


def replace_shard(folder: Path, name: str, content: bytes) -> None:
    """Another shard, with a manifest that vouches for it."""
    (folder / name).write_bytes(content)
    document = json.loads((folder / "manifest.json").read_text())
    part = document["parts"]["data"]
    for entry in (part["index"], *part["shards"]):
        if entry["file"] == name:
            entry.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    (folder / "manifest.json").write_text(json.dumps(document))


def header(document: Any, length: int | None = None) -> bytes:
    text = json.dumps(document).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text


SIZE = 8 * 48 * 4
CONTENTS = {
    "absurd header": b"\xff" * 8 + b"{}" + bytes(SIZE),
    "absurd header length": header({}, 2**40) + bytes(SIZE),
    "absurd shape": header({"taps": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, SIZE]}})
    + bytes(SIZE),
    "absurd offsets": header({"taps": {"dtype": "F32", "shape": [8, 48], "data_offsets": [0, 2**60]}}) + bytes(SIZE),
    "overlapping": header(
        {
            "taps": {"dtype": "F32", "shape": [8, 48], "data_offsets": [0, SIZE]},
            "scales": {"dtype": "F32", "shape": [8, 3], "data_offsets": [0, 96]},
        }
    )
    + bytes(SIZE),
    "other shape": safetensors.torch.save({"taps": torch.zeros(48, 8)}),
    "other dtype": safetensors.torch.save({"taps": torch.zeros(8, 48, dtype=torch.int32)}),
    "other names": safetensors.torch.save({"weights": torch.zeros(8, 48)}),
    "pickle": b"\x80\x04" + b"cos\nsystem\n(S'touch /tmp/x'\ntR." + bytes(SIZE),
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_shards_with_a_valid_checksum_that_are_none(built: Path, kind: str) -> None:
    replace_shard(built, "shard-00001.safetensors", CONTENTS[kind])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cache = ActivationCache.open(built)
    with pytest.raises(DataError, match=r"shard-00001\.safetensors"):
        cache["data"].load()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB


@pytest.mark.parametrize(("value", "message"), [(17, "expected rows from 0 to 16"), (-1, "expected rows from 0 to")])
def test_an_index_that_points_elsewhere(built: Path, value: int, message: str) -> None:
    index = safetensors.torch.load_file(built / "rows-000.safetensors")
    index = {name: tensor.clone() for name, tensor in index.items()}
    index["rows"][0, 3] = value
    replace_shard(built, "rows-000.safetensors", safetensors.torch.save(index))
    with pytest.raises(DataError, match=message):
        ActivationCache.open(built)["data"]


def test_an_index_of_another_shape(built: Path) -> None:
    index = {"rows": torch.zeros(20, 1, dtype=torch.int64), "digests": torch.zeros(17, 16, dtype=torch.uint8)}
    replace_shard(built, "rows-000.safetensors", safetensors.torch.save(index))
    with pytest.raises(DataError, match=r"expected rows int64 \[1, 20\]"):
        ActivationCache.open(built)["data"]


def test_a_manifest_whose_shards_are_not_those_of_its_data(
    built: Path, counting: Callable[..., Any], texts: Callable[..., EncodedDataset]
) -> None:
    document = json.loads((built / "manifest.json").read_text())
    document["parts"]["data"]["shards"].pop()
    (built / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match="its shards are not those of its data"):
        ActivationCache.build(built, counting(), texts(20), **SMALL)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_anywhere_is_read_or_refused(built: Path, data: st.DataObject) -> None:
    document = json.loads((built / "manifest.json").read_text())
    at: Any = document
    while True:  # walk down to anywhere, and put anything there
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        key = data.draw(st.sampled_from(keys))
        if isinstance(at[key], dict | list) and len(at[key]) and data.draw(st.booleans()):
            at = at[key]
            continue
        at[key] = data.draw(JSON_VALUES)
        break
    try:
        assert isinstance(Manifest.from_json(json.dumps(document).encode(), "here"), Manifest)
    except DataError as error:
        assert "here/manifest.json" in str(error)
