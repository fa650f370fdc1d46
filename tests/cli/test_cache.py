"""Training from an activation cache, and ``levi-fast cache``."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from levi_fast.training.methods import METHODS

Run = Callable[..., tuple[int, str, str]]


def files(folder: Path) -> dict[str, bytes]:
    """Everything in a model folder; of metrics.json all but the time it took."""
    found = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    metrics = json.loads(found["metrics.json"])
    del metrics["seconds"]
    return {**found, "metrics.json": json.dumps(metrics).encode()}


@pytest.fixture
def no_backbone(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and from then on no weights can be loaded: not by levi_fast, not by transformers, not from a file."""

    def forbid(*_: Any, **__: Any) -> None:
        raise AssertionError("the backbone's weights were asked for")

    def apply() -> None:
        import safetensors
        import transformers

        for module in ("backbones", "modeling", "cache.activation_cache", "training.cached", "training.commands"):
            monkeypatch.setattr(f"levi_fast.{module}.load_backbone", forbid)
        monkeypatch.setattr("levi_fast.cache.weights.file_sha256", forbid)  # not even read
        monkeypatch.setattr(transformers.AutoModel, "from_pretrained", forbid)
        monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", forbid)
        opened = safetensors.safe_open

        def only_shards(file: Any, *arguments: Any, **named: Any) -> Any:
            assert Path(file).name.startswith(("shard-", "rows-")), file
            return opened(file, *arguments, **named)

        monkeypatch.setattr(safetensors, "safe_open", only_shards)

    return apply


class TestTrain:
    @pytest.mark.parametrize(
        ("method", "loop"),
        [
            ("levi", "trainer"),
            *(
                (method, "lean")
                for method in METHODS
                if METHODS[method].has_backbone and not METHODS[method].trains_backbone
            ),
        ],
    )
    def test_the_same_bits_without_the_backbone(
        self,
        levi_fast: Run,
        train_arguments: list[str],
        tmp_path: Path,
        no_backbone: Callable[[], None],
        method: str,
        loop: str,
    ) -> None:
        arguments = [*train_arguments, "--method", method, "--loop", loop]
        cache = str(tmp_path / "cache")
        for output, more in (("plain", []), ("building", ["--cache", cache])):
            status, _, err = levi_fast(*arguments, *more, "--output", str(tmp_path / output))
            assert status == 0, err
        assert "cache: 120 rows" in err and "on disk" in err
        no_backbone()
        status, _, err = levi_fast(*arguments, "--cache", cache, "--output", str(tmp_path / "cached"))
        assert status == 0, err
        assert "the backbone's taps came from the cache" in err
        plain = files(tmp_path / "plain")
        assert files(tmp_path / "building") == plain and files(tmp_path / "cached") == plain

    def test_the_saved_model_loads_with_its_backbone(
        self, levi_fast: Run, train_arguments: list[str], tmp_path: Path
    ) -> None:
        assert levi_fast(*train_arguments, "--cache", str(tmp_path / "cache"))[0] == 0
        test = train_arguments[train_arguments.index("--test") + 1]
        output = tmp_path / "e.json"
        status, _, err = levi_fast(
            "evaluate", "--model", str(tmp_path / "model"), "--data", test, "--output", str(output)
        )
        assert status == 0, err
        trained = json.loads((tmp_path / "model" / "metrics.json").read_text())
        assert json.loads(output.read_text())["metrics"] == trained["id"]

    @pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
    def test_smaller_dtypes(
        self, levi_fast: Run, train_arguments: list[str], tmp_path: Path, no_backbone: Callable[[], None], dtype: str
    ) -> None:
        cache = ["--cache", str(tmp_path / "cache")]
        assert levi_fast(*train_arguments, "--output", str(tmp_path / "plain"))[0] == 0
        status, _, err = levi_fast(*train_arguments, *cache, "--cache-dtype", dtype)
        assert status == 0, err
        no_backbone()
        assert levi_fast(*train_arguments, *cache, "--output", str(tmp_path / "again"))[0] == 0
        assert files(tmp_path / "again") == files(tmp_path / "model") != files(tmp_path / "plain")
        losses = [
            json.loads((tmp_path / name / "metrics.json").read_text())["id"]["log_loss"]
            for name in ("plain", "model")
        ]
        assert losses[0] == pytest.approx(losses[1], rel=0.05)
        status, _, err = levi_fast(
            *train_arguments, *cache, "--cache-dtype", "float32", "--output", str(tmp_path / "x")
        )
        assert status == 2 and f"dtype: '{dtype}' in the cache, 'float32' now" in err

    def test_another_split_of_the_same_texts_is_found(
        self, levi_fast: Run, train_arguments: list[str], tmp_path: Path, no_backbone: Callable[[], None]
    ) -> None:
        # validation rows are held out of --train by the seed
        cache = ["--cache", str(tmp_path / "cache")]
        assert levi_fast(*train_arguments, *cache)[0] == 0
        uncached = [*train_arguments, "--seed", "7", "--output", str(tmp_path / "plain")]
        assert levi_fast(*uncached)[0] == 0
        no_backbone()
        status, _, err = levi_fast(*train_arguments, *cache, "--seed", "7", "--output", str(tmp_path / "seven"))
        assert status == 0, err
        assert "the rows of train, validation were found one by one" in err
        found, expected = (
            json.loads((tmp_path / name / "metrics.json").read_text())["id"] for name in ("seven", "plain")
        )
        assert found == pytest.approx(expected, rel=1e-4)

    def test_an_unfinished_and_a_damaged_cache(
        self, levi_fast: Run, train_arguments: list[str], tmp_path: Path
    ) -> None:
        cache = tmp_path / "cache"
        assert levi_fast(*train_arguments, "--cache", str(cache))[0] == 0
        before = {path.name: path.read_bytes() for path in cache.iterdir()}
        content = bytearray((cache / "shard-00001.safetensors").read_bytes())
        content[-1] ^= 1
        (cache / "shard-00001.safetensors").write_bytes(content)
        status, _, err = levi_fast(*train_arguments, "--cache", str(cache), "--output", str(tmp_path / "b"))
        assert status == 0 and "shard-00001.safetensors: its checksum differs" in err and "being repaired" in err
        assert {path.name: path.read_bytes() for path in cache.iterdir()} == before
        document = json.loads((cache / "manifest.json").read_text())
        document["complete"] = False
        for part in document["parts"].values():
            for shard in part["shards"]:
                shard.update(bytes=None, sha256=None)
        (cache / "manifest.json").write_text(json.dumps(document))
        assert levi_fast(*train_arguments, "--cache", str(cache), "--output", str(tmp_path / "c"))[0] == 0
        assert {path.name: path.read_bytes() for path in cache.iterdir()} == before
        assert files(tmp_path / "model") == files(tmp_path / "b") == files(tmp_path / "c")

    def test_from_an_address(
        self, levi_fast: Run, train_arguments: list[str], tmp_path: Path, no_backbone: Callable[[], None]
    ) -> None:
        import fsspec

        assert levi_fast(*train_arguments, "--cache", str(tmp_path / "cache"))[0] == 0
        fsspec.filesystem("memory").put(f"{tmp_path}/cache/", "/train/cache/", recursive=True)
        no_backbone()
        status, _, err = levi_fast(
            *train_arguments, "--cache", "memory://train/cache", "--output", str(tmp_path / "b")
        )
        assert status == 0, err
        assert files(tmp_path / "model") == files(tmp_path / "b")
        status, _, err = levi_fast(*train_arguments, "--cache", "memory://no/cache", "--output", str(tmp_path / "c"))
        assert status == 2 and "memory://no/cache holds no finished cache" in err

    def test_including_the_backbone_loads_it(
        self, levi_fast: Run, train_arguments: list[str], tmp_path: Path
    ) -> None:
        cache = ["--cache", str(tmp_path / "cache"), "--include-backbone"]
        assert levi_fast(*train_arguments, "--include-backbone", "--output", str(tmp_path / "plain"))[0] == 0
        for name in ("one", "two"):
            status, _, err = levi_fast(*train_arguments, *cache, "--output", str(tmp_path / name))
            assert status == 0, err
            assert (tmp_path / name / "backbone" / "model.safetensors").is_file()
            plain = (tmp_path / "plain" / "model.safetensors").read_bytes()
            assert (tmp_path / name / "model.safetensors").read_bytes() == plain


class TestMisses:
    @pytest.fixture
    def cached(self, levi_fast: Run, train_arguments: list[str], tmp_path: Path) -> list[str]:
        """Arguments whose cache is there."""
        arguments = [*train_arguments, "--cache", str(tmp_path / "cache")]
        assert levi_fast(*arguments, "--output", str(tmp_path / "first"))[0] == 0
        return arguments

    def miss(self, levi_fast: Run, arguments: list[str], *messages: str) -> None:
        status, _, err = levi_fast(*arguments)
        assert status == 2, err
        for message in messages:
            assert message in err, err

    def test_flags(self, levi_fast: Run, cached: list[str]) -> None:
        rebuild = "levi-fast cache build --rebuild"
        self.miss(levi_fast, [*cached, "--taps", "last"], "taps: [0, 1, 2] in the cache, [2] now", rebuild)
        self.miss(levi_fast, [*cached, "--pooling", "cls"], "pooling: 'mean' in the cache, 'cls' now", rebuild)
        self.miss(levi_fast, [*cached, "--max-length", "20"], "max_length (truncation): 64 in the cache, 20 now")
        self.miss(levi_fast, [*cached, "--taps", "9"], "9 is out of range for a backbone of 3 layers")
        self.miss(levi_fast, [*cached, "--backbone-dtype", "bfloat16"], "backbone_dtype: 'float32' in the cache")

    def test_a_changed_text(self, levi_fast: Run, cached: list[str]) -> None:
        file = Path(cached[cached.index("--test") + 1])
        file.write_text(file.read_text().replace("film", "story", 1))
        self.miss(levi_fast, cached, "data 'test': 1 of 40 rows are not in the cache, the first is row")

    def test_another_file(
        self, levi_fast: Run, cached: list[str], make_rows: Callable[..., Any], write_rows: Callable[..., str]
    ) -> None:
        more = write_rows("more.csv", make_rows(seed=9))
        self.miss(levi_fast, [*cached, "--ood", f"more={more}"], "data 'ood more'", "rows are not in the cache")

    def test_fewer_files_are_fine(self, levi_fast: Run, cached: list[str], no_backbone: Callable[[], None]) -> None:
        no_backbone()
        place = cached.index("--ood")
        assert levi_fast(*cached[:place], *cached[place + 2 :])[0] == 0

    def test_another_backbone(self, levi_fast: Run, cached: list[str], tmp_path: Path, tiny_bert_dir: str) -> None:
        other = tmp_path / "other"
        shutil.copytree(tiny_bert_dir, other)
        arguments = [*cached, "--backbone", str(other)]
        status, _, err = levi_fast(*arguments, "--output", str(tmp_path / "copy"))
        assert status == 0, err  # a copy: other files, the same weights
        from transformers import BertModel

        model = BertModel.from_pretrained(other)
        with torch.no_grad():
            model.pooler.dense.weight += 1  # above the taps
        model.save_pretrained(other)
        assert levi_fast(*arguments, "--output", str(tmp_path / "pooler"))[0] == 0
        with torch.no_grad():
            model.encoder.layer[0].output.dense.weight[0, 0] += 1e-3
        model.save_pretrained(other)
        self.miss(levi_fast, arguments, "backbone weights: 'bert:float32:")

    def test_a_changed_config(self, levi_fast: Run, cached: list[str], tmp_path: Path, tiny_bert_dir: str) -> None:
        other = tmp_path / "other"
        shutil.copytree(tiny_bert_dir, other)
        config = json.loads((other / "config.json").read_text())
        config["hidden_act"] = "relu"
        (other / "config.json").write_text(json.dumps(config))
        arguments = [*cached, "--backbone", str(other)]
        self.miss(levi_fast, arguments, "backbone config hidden_act: 'gelu' in the cache, 'relu' now")

    def test_a_changed_tokenizer(self, levi_fast: Run, cached: list[str], tmp_path: Path, tiny_bert_dir: str) -> None:
        other = tmp_path / "other"
        shutil.copytree(tiny_bert_dir, other)
        text = (other / "tokenizer.json").read_text()
        assert '"Lowercase"' in text
        (other / "tokenizer.json").write_text(text.replace('"good"', '"goood"'))
        self.miss(levi_fast, [*cached, "--backbone", str(other)], "preprocessor: 'sha256:")

    def test_flags_that_do_not_go_together(self, levi_fast: Run, train_arguments: list[str], tmp_path: Path) -> None:
        cache = ["--cache", str(tmp_path / "cache")]
        self.miss(levi_fast, [*train_arguments, *cache, "--method", "task-model"], "--cache: --method task-model")
        self.miss(levi_fast, [*train_arguments, *cache, "--no-precompute"], "--cache: --no-precompute")
        self.miss(levi_fast, [*train_arguments, "--cache-dtype", "int8"], "--cache-dtype: only with --cache")
        self.miss(levi_fast, [*train_arguments, *cache, "--cache-dtype", "int4"], "--cache-dtype: expected one of")
        assert not os.path.exists(cache[1])
        for folder in ("model", "model/cache", "."):
            together = [*train_arguments, "--cache", str(tmp_path / folder)]
            self.miss(levi_fast, together, "--cache: expected a folder apart from --output")


def test_a_sweep_trains_from_the_cache(
    levi_fast: Run, train_arguments: list[str], tmp_path: Path, no_backbone: Callable[[], None]
) -> None:
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text("seed: [0, 1]\nlabel_column: [label, colour]\n")
    place = train_arguments.index("--label-column")
    arguments = [*train_arguments[:place], *train_arguments[place + 2 :], "--sweep", str(sweep)]
    cache = ["--cache", str(tmp_path / "cache")]
    for name, more in (("plain", []), ("building", cache)):
        status, _, err = levi_fast(*arguments, *more, "--output", str(tmp_path / name))
        assert status == 0, err
    no_backbone()
    status, _, err = levi_fast(*arguments, *cache, "--output", str(tmp_path / "cached"))
    assert status == 0, err
    found = [
        (tmp_path / name / "label" / "model.safetensors").read_bytes() for name in ("plain", "building", "cached")
    ]
    assert found[0] == found[1] == found[2]
    # the second column's validation rows are other ones, whose taps were computed in other batches
    documents = [json.loads((tmp_path / name / "sweep.json").read_text()) for name in ("plain", "cached")]
    for plain, cached in zip(*(document["columns"] for document in documents), strict=True):
        for one, other in zip(plain["heads"], cached["heads"], strict=True):
            assert one["id"] == pytest.approx(other["id"], rel=1e-4)
