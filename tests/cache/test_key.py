"""A change in anything that the activations depend on is a miss that names what changed."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel

from levi_fast import ActivationCache, CacheMismatchError, load_tokenizer
from levi_fast.cache.key import config_key, differences, preprocessor_key
from levi_fast.cache.weights import describe_files, same_files, weight_files
from levi_fast.data.encoded import EncodedDataset

SMALL = {"batch_size": 4, "batches_per_shard": 2}
Texts = Callable[..., EncodedDataset]


@pytest.fixture
def arguments(backbone: torch.nn.Module, tiny_bert_dir: str, texts: Texts) -> dict[str, Any]:
    tokenizer = load_tokenizer(tiny_bert_dir)
    data = {"train": texts(12), "test": texts(9, 1)}
    return {"backbone": backbone, "data": data, "preprocessor": tokenizer, "max_length": 64, **SMALL}


def changed_weights(arguments: dict[str, Any]) -> None:
    arguments["backbone"] = copy.deepcopy(arguments["backbone"])
    with torch.no_grad():
        arguments["backbone"].encoder.layer[1].output.dense.weight[3, 5] += 1e-3


def changed_config(arguments: dict[str, Any]) -> None:
    arguments["backbone"] = copy.deepcopy(arguments["backbone"])
    arguments["backbone"].config.layer_norm_eps = 1e-5


def changed_tokenizer(arguments: dict[str, Any]) -> None:
    arguments["preprocessor"] = copy.deepcopy(arguments["preprocessor"])
    arguments["preprocessor"].add_tokens(["unheard"])


def changed_text(arguments: dict[str, Any]) -> None:
    data = arguments["data"]["test"]
    data.token_ids = data.token_ids.clone()
    data.token_ids[4] += 1


def other_order(arguments: dict[str, Any]) -> None:
    arguments["data"]["train"] = arguments["data"]["train"].subset(list(reversed(range(12))), "reversed")


def fewer_bits(arguments: dict[str, Any]) -> None:
    arguments["backbone"] = copy.deepcopy(arguments["backbone"]).bfloat16()


CHANGES: dict[str, tuple[Any, str]] = {
    "weights": (changed_weights, "backbone weights: 'bert:float32:.*' in the cache, 'bert:float32:.*' now"),
    "backbone dtype": (fewer_bits, "backbone_dtype: 'float32' in the cache, 'bfloat16' now"),
    "config": (changed_config, "backbone config layer_norm_eps: 1e-12 in the cache, 1e-05 now"),
    "tokenizer": (changed_tokenizer, "preprocessor: 'sha256:.*' in the cache, 'sha256:.*' now"),
    "taps": ({"taps": [0, 2]}, r"taps: \[0, 1, 2\] in the cache, \[0, 2\] now"),
    "pooling": ({"pooling": "cls"}, "pooling: 'mean' in the cache, 'cls' now"),
    "truncation": ({"max_length": 32}, r"max_length \(truncation\): 64 in the cache, 32 now"),
    "dtype": ({"dtype": "int8"}, "dtype: 'float32' in the cache, 'int8' now"),
    "text": (changed_text, "content of data 'test': sha256:.{12} in the cache, sha256:.{12} now"),
    "order": (other_order, "content of data 'train'"),
}


class TestMisses:
    @pytest.mark.parametrize("change", CHANGES)
    def test_the_message_names_what_changed_and_nothing_else(
        self, tmp_path: Path, arguments: dict[str, Any], read_folder: Callable[[Path], Any], change: str
    ) -> None:
        ActivationCache.build(tmp_path / "c", **arguments)
        before = read_folder(tmp_path / "c")
        action, message = CHANGES[change]
        if isinstance(action, dict):
            arguments.update(action)
        else:
            action(arguments)
        with pytest.raises(CacheMismatchError, match=message) as caught:
            ActivationCache.build(tmp_path / "c", **arguments)
        assert len(caught.value.changes) == (2 if change == "backbone dtype" else 1) and "--rebuild" in str(
            caught.value
        )
        after = {name: data for name, data in read_folder(tmp_path / "c").items() if not name.endswith(".lock")}
        assert after == before
        rebuilt = ActivationCache.build(tmp_path / "c", **arguments, overwrite=True)
        fresh = ActivationCache.build(tmp_path / "fresh", **arguments)
        assert read_folder(tmp_path / "c") == read_folder(tmp_path / "fresh")
        assert torch.equal(rebuilt["test"].load(), fresh["test"].load())

    def test_added_and_removed_data(self, tmp_path: Path, arguments: dict[str, Any], texts: Texts) -> None:
        ActivationCache.build(tmp_path / "c", **arguments)
        arguments["data"]["ood new"] = texts(8, 2)
        del arguments["data"]["test"]
        with pytest.raises(CacheMismatchError) as caught:
            ActivationCache.build(tmp_path / "c", **arguments)
        assert "data 'ood new': not in the cache, which holds 'test', 'train'" in str(caught.value)
        assert "data 'test': in the cache, not asked for now" in str(caught.value)

    def test_several_changes_are_all_named(self, tmp_path: Path, arguments: dict[str, Any]) -> None:
        ActivationCache.build(tmp_path / "c", **arguments)
        changed_weights(arguments)
        arguments["pooling"] = "last"
        with pytest.raises(CacheMismatchError) as caught:
            ActivationCache.build(tmp_path / "c", **arguments)
        assert [change.split(":")[0] for change in caught.value.changes] == ["backbone weights", "pooling"]


class TestHits:
    def test_the_same_again_runs_nothing(
        self, tmp_path: Path, counting: Callable[..., Any], texts: Texts, read_folder: Callable[[Path], Any]
    ) -> None:
        ActivationCache.build(tmp_path / "c", counting(), texts(), **SMALL)
        before = read_folder(tmp_path / "c")
        again = counting()
        ActivationCache.build(tmp_path / "c", again, texts(), batch_size=16)  # the layout is the cache's own
        assert again.batches == 0 and read_folder(tmp_path / "c") == before

    def test_labels_and_features_do_not_matter(self, tmp_path: Path, arguments: dict[str, Any]) -> None:
        ActivationCache.build(tmp_path / "c", **arguments)
        arguments["data"]["train"].labels = torch.ones(12)
        ActivationCache.build(tmp_path / "c", **arguments)

    def test_padding_and_truncation_state_of_a_tokenizer_do_not_matter(self, tiny_bert_dir: str) -> None:
        tokenizer = load_tokenizer(tiny_bert_dir)
        before = preprocessor_key(tokenizer)
        tokenizer(["good film", "bad"], padding=True, truncation=True, max_length=3)
        assert preprocessor_key(tokenizer) == before == preprocessor_key(load_tokenizer(tiny_bert_dir))

    @pytest.mark.parametrize("name", ["bert", "distilbert", "t5", "gpt2", "llama", "vit", "swin", "convnext"])
    def test_a_config_read_without_its_model_is_the_same(self, tmp_path: Path, name: str) -> None:
        from transformers import CONFIG_MAPPING

        small = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
        own: dict[str, dict[str, Any]] = {
            "distilbert": {"n_layers": 1, "dim": 16, "hidden_dim": 16, "n_heads": 2},
            "t5": {"num_layers": 1, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_heads": 2},
            "gpt2": {"n_layer": 1, "n_embd": 16, "n_head": 2},
            "llama": {**small, "num_key_value_heads": 1},
            "swin": {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1], "window_size": 2, "image_size": 32},
            "convnext": {"hidden_sizes": [8, 8], "depths": [1, 1], "num_stages": 2},
        }
        config = CONFIG_MAPPING[name](**own.get(name, small))
        AutoModel.from_config(config).save_pretrained(tmp_path)
        loaded = AutoModel.from_pretrained(tmp_path)
        assert config_key(loaded.config) == config_key(AutoConfig.from_pretrained(tmp_path))
        assert differences({"config": config_key(loaded.config)}, {"config": config_key(config)}) == []


class TestWeightFiles:
    def test_they_are_told_without_loading(self, tmp_path: Path, tiny_bert_dir: str) -> None:
        folder = tmp_path / "model"
        shutil.copytree(tiny_bert_dir, folder)
        (file,) = weight_files(str(folder))
        noted = describe_files([file])
        assert same_files(noted, [file])
        os.utime(file)  # other times, same content: read again, and the same
        assert same_files(noted, [file])
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        times = file.stat()
        file.write_bytes(data)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # hidden from the time of modification
        assert not same_files(noted, [file])
        assert not same_files(noted, []) and not same_files([], [file])

    def test_only_a_backbone_loaded_by_name_has_them(
        self, tmp_path: Path, tiny_bert_dir: str, backbone: torch.nn.Module, texts: Texts
    ) -> None:
        named = ActivationCache.build(tmp_path / "named", tiny_bert_dir, texts(), **SMALL)
        assert [entry["name"] for entry in named.manifest.backbone["files"]] == ["model.safetensors"]
        given = ActivationCache.build(tmp_path / "given", backbone, texts(), **SMALL)
        assert given.manifest.backbone["files"] == []  # its weights may have been changed since it was loaded
        assert named.manifest.key == given.manifest.key
