"""A model folder from anywhere: it runs no code, takes no memory beyond its files, and what is wrong is named."""

from __future__ import annotations

import contextlib
import json
import pickle
import resource
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from levi_fast import DataError, LeviConfig, LeviModel, get_levi_model
from levi_fast.backbones import load_tokenizer
from levi_fast.data.preprocessing import PROCESSOR_FILE, TableProcessor

SPEC = {"type": "text", "vocab_size": 40, "embedding_dim": 8, "view_width": 6}
MOST_BYTES = 300 * 2**20  # that loading a broken folder of kilobytes may take, the libraries' own needs included
HUGE = 10**12


@pytest.fixture(scope="module")
def saved(tiny_bert_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything inside: config, weights and the backbone."""
    torch.manual_seed(0)
    model = get_levi_model(tiny_bert_dir, LeviConfig(hidden_width=8, task_model=SPEC))
    folder = tmp_path_factory.mktemp("saved") / "model"
    model.save_pretrained(folder, include_backbone=True)
    LeviModel.from_pretrained(folder)  # also lets the libraries take the memory that they keep
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST_BYTES


def edit(file: Path, **changes: Any) -> None:
    document = json.loads(file.read_text())
    document.update(changes)
    file.write_text(json.dumps(document))


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_header(file: Path, header: Any, data: bytes, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


class Marks:
    """Unpickled, it leaves a file behind."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


# --- code ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [".", "backbone"])
def test_code_in_the_folder_never_runs(folder: Path, tmp_path: Path, where: str) -> None:
    from transformers import AutoModel

    ran = tmp_path / "ran"
    place = folder / where
    for name in ("evil", "modeling_bert", "tokenization"):
        (place / f"{name}.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\nclass Fast: pass\n")
    maps = {name: "evil.Evil" for name in ("AutoConfig", "AutoModel", "AutoModelForSequenceClassification")}
    edit(place / "config.json", auto_map={**maps, "AutoTokenizer": ["tokenization.Evil", "tokenization.Fast"]})
    LeviModel.from_pretrained(folder)
    AutoModel.from_pretrained(folder)
    assert not ran.exists()


def test_an_unknown_backbone_with_code_is_refused(folder: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (folder / "backbone" / "evil.py").write_text(f"open({str(ran)!r}, 'w')\n")
    maps = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
    edit(folder / "backbone" / "config.json", model_type="evil", auto_map=maps)
    with pytest.raises(DataError, match="backbone"):
        LeviModel.from_pretrained(folder)
    with pytest.raises(DataError, match="tokenizer"):
        load_tokenizer(str(folder / "backbone"))
    assert not ran.exists()


def test_pickles_beside_the_weights_are_not_read(folder: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    poison = pickle.dumps(Marks(ran))
    for name in ("pytorch_model.bin", "model.bin", "training_args.bin", "optimizer.pt", "model.pkl"):
        (folder / name).write_bytes(poison)
        (folder / "backbone" / name).write_bytes(poison)
    LeviModel.from_pretrained(folder)
    assert not ran.exists()
    (folder / "backbone" / "model.safetensors").unlink()  # now the pickle is all there is
    with pytest.raises(DataError, match="backbone"):
        LeviModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"expected model\.safetensors"):
        LeviModel.from_pretrained(folder)
    assert not ran.exists()


# --- config.json --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"hidden_width": HUGE}, "hidden_width"),
        ({"hidden_width": 50_000_000}, "tap_weight"),
        ({"hidden_width": -4}, "hidden_width"),
        ({"hidden_width": True}, "hidden_width"),
        ({"hidden_width": "8"}, "hidden_width"),
        ({"hidden_width": 8.5}, "hidden_width"),
        ({"tap_widths": [HUGE] * 3}, "tap_widths"),
        ({"tap_widths": [16, 16]}, "tap_widths"),
        ({"tap_widths": {"0": 16}}, "tap_widths"),
        ({"tap_layers": [0, 0, 1]}, "tap_layers"),
        ({"tap_layers": [0, 1, 10**9]}, "tap_layers"),
        ({"view_width": -1}, "view_width"),
        ({"view_width": 10**30}, "view_width"),
        ({"blend": float("nan")}, "blend"),
        ({"blend": "0.5"}, "blend"),
        ({"blend": 10**400}, "blend"),
        ({"target_std": 0}, "target_std"),
        ({"target_mean": float("inf")}, "target_mean"),
        ({"normalize": "yes"}, "normalize"),
        ({"activation": ["gelu"]}, "activation"),
        ({"activation": "evil"}, "activation"),
        ({"backbone": 5}, "backbone"),
        ({"backbone": "/etc"}, "backbone"),
        ({"backbone": "~/secrets"}, "backbone"),
        ({"backbone": "../../../../../../etc"}, "backbone"),
        ({"taps": [HUGE]}, "taps"),
        ({"taps": {"all": 1}}, "taps"),
        ({"num_labels": HUGE, "id2label": None, "label2id": None}, "num_labels"),
        ({"id2label": {"0": "a", "2": "b"}, "label2id": None}, "id2label"),
        ({"id2label": {"0": "a", "1": "a"}, "label2id": None}, "id2label"),
        ({"id2label": {"0": "a", "x": "b"}, "label2id": None}, "id2label"),
        ({"id2label": {"0": "a", "1": 5}, "label2id": None}, "id2label"),
        ({"id2label": ["a", "b"], "label2id": None}, "id2label"),
        ({"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 1, "b": 0}}, "label2id"),
        ({"id2label": {"0": "a", "1": "b"}, "label2id": ["a", "b"]}, "label2id"),
        ({"task_model": {**SPEC, "vocab_size": HUGE}}, "vocab_size"),
        ({"task_model": {**SPEC, "vocab_size": 50_000_000}}, "token_embedding"),
        ({"task_model": {**SPEC, "encoder": "transformer", "num_layers": HUGE}}, "num_layers"),
        ({"task_model": {**SPEC, "view_width": "6"}}, "view_width"),
        ({"task_model": {"type": "evil"}}, "type"),
        ({"task_model": "text"}, "task_model"),
        ({"task_model": {"type": "tabular", "num_numeric": 1, "cardinalities": [2] * 100_000}}, "cardinalities"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_wrong_config_is_named(folder: Path, changes: dict[str, Any], field: str) -> None:
    edit(folder / "config.json", **changes)
    with pytest.raises(DataError, match=field) as caught:
        LeviModel.from_pretrained(folder)
    assert str(folder) in str(caught.value) or "config.json" in str(caught.value) or "backbone" in str(caught.value)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"task_model": ' + b'{"a":' * 50_000,
        b'{"seed": 1' + b"0" * 9_000,
    ],
    ids=lambda content: content[:12].decode("latin1"),
)
def test_a_file_that_is_no_config(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(DataError, match=r"config\.json"):
        LeviModel.from_pretrained(folder)


def test_a_label_map_through_auto_config(folder: Path) -> None:
    from transformers import AutoConfig

    edit(folder / "config.json", num_labels=HUGE, id2label=None, label2id=None)
    with pytest.raises(DataError, match="num_labels"):
        AutoConfig.from_pretrained(folder)


@pytest.mark.parametrize(
    "changes", [{"hidden_size": HUGE}, {"num_hidden_layers": 10**9}, {"vocab_size": 10**11}, {"hidden_size": 4096}]
)
def test_a_backbone_of_absurd_size(folder: Path, changes: dict[str, int]) -> None:
    edit(folder / "backbone" / "config.json", **changes)
    with pytest.raises(DataError, match="backbone"):
        LeviModel.from_pretrained(folder)


def test_links(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").rename(tmp_path / "real.json")
    (folder / "config.json").symlink_to(tmp_path / "nowhere.json")
    with pytest.raises(DataError, match=r"config\.json"):
        LeviModel.from_pretrained(folder)
    shutil.rmtree(folder / "backbone")
    (folder / "backbone").symlink_to("/etc")
    (folder / "config.json").unlink()
    (tmp_path / "real.json").rename(folder / "config.json")
    with pytest.raises(DataError, match="backbone"):
        LeviModel.from_pretrained(folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**18), 10**18) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = sorted(set(LeviConfig().to_dict()) | {"num_labels", "task_model", "architectures", "dtype"})
BENIGN = (DataError, ValueError, OSError)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=3))
def test_any_config(saved: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    place = tmp_path / "drawn"
    shutil.copytree(saved, place, dirs_exist_ok=True)
    edit(place / "config.json", **changes)
    with contextlib.suppress(BENIGN):
        LeviModel.from_pretrained(place, load_backbone_weights=False)


# --- weights ------------------------------------------------------------------------------------------------------


def test_wrong_headers_are_named(folder: Path) -> None:
    file = folder / "model.safetensors"
    header, data = header_of(file)
    name = next(key for key in header if key != "__metadata__")
    other = next(key for key in header if key not in ("__metadata__", name))
    entry = header[name]
    cases: list[tuple[Any, int | None]] = [
        (header, HUGE),
        (header, 2**63),
        (header, 10),
        (b"{", None),
        (b"[" * 50_000, None),
        ({**header, name: {**entry, "data_offsets": [0, HUGE]}}, None),
        ({**header, name: {**entry, "data_offsets": header[other]["data_offsets"]}}, None),
        ({**header, name: {**entry, "data_offsets": [-1, 8]}}, None),
        ({**header, name: {**entry, "dtype": "I64"}}, None),
        ({**header, name: {**entry, "dtype": "EVIL"}}, None),
        ({**header, name: {**entry, "shape": [HUGE, HUGE]}}, None),
        ({**header, name: {**entry, "shape": [-1]}}, None),
        ({key: value for key, value in header.items() if key != name}, None),
    ]
    for changed, length in cases:
        write_header(file, changed, data, length)
        with pytest.raises(DataError, match="safetensors"):
            LeviModel.from_pretrained(folder)


def test_integers_and_other_shapes_in_place_of_weights(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    weights = load_file(file)
    save_file({**weights, "ensemble.bias": weights["ensemble.bias"].to(torch.int32)}, file)
    with pytest.raises(DataError, match=r"ensemble\.bias: expected a dtype"):
        LeviModel.from_pretrained(folder)
    save_file({**weights, "ensemble.bias": weights["ensemble.bias"][:, :-1].contiguous()}, file)
    with pytest.raises(DataError, match=r"ensemble\.bias: expected shape"):
        LeviModel.from_pretrained(folder)
    save_file({**weights, "more": torch.zeros(1)}, file)
    with pytest.raises(DataError, match="'more' is no tensor"):
        LeviModel.from_pretrained(folder)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 1500), byte=st.integers(0, 255), cut=st.integers(0, 3))
def test_any_damage_to_a_header(saved: Path, tmp_path: Path, place: int, byte: int, cut: int) -> None:
    target = tmp_path / "drawn"
    if not target.exists():
        shutil.copytree(saved, target)
    raw = bytearray((saved / "model.safetensors").read_bytes())
    raw[min(place, len(raw) - 1)] = byte
    (target / "model.safetensors").write_bytes(raw[: len(raw) - cut])
    with contextlib.suppress(BENIGN):
        LeviModel.from_pretrained(target, load_backbone_weights=False)


# --- the files beside ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"format_version": 1}', '{"format_version": 1, "columns": 5}', "[" * 9999]
)
def test_a_broken_processor_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / PROCESSOR_FILE).write_text(content)
    with pytest.raises(DataError, match=PROCESSOR_FILE):
        TableProcessor.load(tmp_path)


def test_a_missing_or_broken_tokenizer_is_named(tiny_bert_dir: str, tmp_path: Path) -> None:
    place = Path(shutil.copytree(tiny_bert_dir, tmp_path / "bert"))
    (place / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "Evil"}}')
    with pytest.raises(DataError, match="tokenizer"):
        load_tokenizer(str(place))
    for file in place.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(DataError, match="tokenizer"):
        load_tokenizer(str(place))


def test_a_good_folder_passes(saved: Path) -> None:
    from transformers import AutoModel

    ids = torch.tensor([[2, 5, 3]])
    one, two = LeviModel.from_pretrained(saved), AutoModel.from_pretrained(saved)
    with torch.no_grad():
        first = one(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        second = two(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    assert torch.equal(first, second)
