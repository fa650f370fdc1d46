"""levi-fast bench step and memory: rows to judge figures by, contenders that train what they say, clear errors."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import nn

from levi_fast.bench import backbones, peaks, peers, steps
from levi_fast.bench import memory as memory_module
from levi_fast.bench.backbones import BACKBONES, Backbone
from levi_fast.bench.errors import WrongResultError
from levi_fast.bench.methods import FLOOR, METHODS, OURS, PEERS, build_methods, check
from levi_fast.bench.steps import GIB, StepOptions, affordable, requirements, step_row
from levi_fast.cli import main
from levi_fast.errors import DataError


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return ViTModel(ViTConfig(intermediate_size=64, image_size=32, **sizes), add_pooling_layer=False)


def _t5() -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=1000, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4))


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaModel(LlamaConfig(vocab_size=1000, intermediate_size=64, use_cache=False, **sizes))


SMALL = {
    "bert": BACKBONES["tiny"],
    "vit": Backbone(_vit, 2, 32, vocabulary=None),
    "t5": Backbone(_t5, 2, 8, vocabulary=1000, final_norm=True),
    "llama": Backbone(_llama, 2, 8, "bfloat16", vocabulary=1000, final_norm=True),
}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_contender_trains_its_own_weights_and_no_frozen_backbone(name: str, dtype: torch.dtype) -> None:
    pytest.importorskip("peft")
    spec = SMALL[name]
    backbone = spec.load(dtype, "cpu")
    assert {p.dtype for p in backbone.parameters()} == {dtype}
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    contenders = build_methods(METHODS, backbone, spec.config())
    batch = spec.batches(1, spec.batch, spec.length, "cpu")[0]
    assert set(check(contenders, batch, dtype, spec.final_norm)) == {"levi-eager", "hidden-states"}
    for key, method in contenders.items():
        old = [p.detach().clone() for p in method.parameters]
        for _ in range(2):  # adapters begin at zero, and the half behind them moves in the second step
            method.step(batch)
        moved = [not torch.equal(a, b) for a, b in zip(old, method.parameters, strict=True)]
        assert (key == FLOOR and not moved) or sum(moved) > 0.6 * len(moved), key
        assert all(p.grad is None for p in backbone.parameters()), key
    after = backbone.state_dict()
    assert set(after) == set(before) and all(torch.equal(after[key], value) for key, value in before.items())
    trained = {key: method.trained_parameters() for key, method in contenders.items()}
    assert trained["full"] > sum(p.numel() for p in backbone.parameters()) > trained["lora"] > 0
    assert trained["levi-eager"] == trained["hidden-states"] == trained[OURS]
    held = {key: method.held_bytes() for key, method in contenders.items()}
    assert held["full"] > 2.5 * held[FLOOR] and held["linear-probe"] > held[FLOOR]


def test_a_loss_that_differs_is_refused_before_any_time_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = peers.mean_pool
    monkeypatch.setattr(
        peers, "mean_pool", lambda hidden, mask: pool(hidden[:, 1:], None if mask is None else mask[:, 1:])
    )
    monkeypatch.setattr(steps, "interleaved", lambda *_: pytest.fail("timed"))
    options = StepOptions(("tiny",), peers=("hidden-states",))
    with pytest.raises(WrongResultError, match="hidden-states: its loss differs from levi's"):
        step_row("tiny", BACKBONES["tiny"].load(torch.float32, "cpu"), 4, 16, options)


def test_the_last_layer_behind_a_closing_norm_is_the_only_one_left_out() -> None:
    spec = SMALL["t5"]
    backbone = spec.load(torch.float32, "cpu")
    contenders = build_methods((OURS, "hidden-states"), backbone, spec.config())
    batch = spec.batches(1, 2, 8, "cpu")[0]
    check(contenders, batch, torch.float32, final_norm=True)
    with pytest.raises(WrongResultError):
        check(contenders, batch, torch.float32, final_norm=False)


def test_a_row_has_all_that_a_figure_is_judged_by(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("peft")
    monkeypatch.setattr(memory_module, "in_own_process", lambda request: {"step": 2**20, "held": 2**21})
    output = tmp_path / "steps.json"
    arguments = ["--backbone", "tiny", "--batch-size", "2,4", "--length", "8", "--seconds", "0.01", "--memory"]
    with pytest.raises(SystemExit) as ended:
        main(["bench", "step", "--device", "cpu", *arguments, "--output", str(output), "--plots", str(tmp_path)])
    assert ended.value.code == 0
    document = json.loads(output.read_text())
    assert [row["case"] for row in document["step"]] == [
        {"backbone": "tiny", "batch": batch, "length": 8} for batch in (2, 4)
    ]
    for row in document["step"]:
        assert (row["dtype"], row["pass"], row["weights"], row["skipped"]) == ("float32", "step", "random", {})
        assert set(row["median_us"]) == set(METHODS) and row["rounds"] >= 3
        assert set(row["peer_over_ours"]) == {FLOOR, *PEERS} and row["best_peer"] in PEERS
        assert row["floor_fraction"] == pytest.approx(row["median_us"][FLOOR] / row["median_us"][OURS], abs=1e-3)
        assert row["over_forward"][FLOOR] == 1
        assert row["trained_parameters"][FLOOR] == 0 < row["trained_parameters"][OURS]
        assert max(row["relative_loss_error"].values()) < 1e-4
        assert row["peak_memory"]["lora"] == {"step_mib": 1.0, "held_mib": 2.0, "total_mib": 3.0}
    assert "side-network" in capsys.readouterr().out
    for chart in ("over-forward", "scaling", "memory"):
        assert "linear-probe" in (tmp_path / f"step-{chart}.svg").read_text()


def test_memory_comes_from_processes_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(peaks, "CASES", [(6, "bare"), (6, "output_hidden_states")])
    process = memory_module.in_own_process

    def steps_here(request: Any) -> Any:  # a process takes seconds to begin: two are enough
        return process(request) if "layers" in request else memory_module.measure(request)

    monkeypatch.setattr(memory_module, "in_own_process", steps_here)
    options = StepOptions(("tiny",), (64,), peers=())
    document = peaks.bench_memory(options, tmp_path / "memory.json")
    bare, kept = document["forward"]
    hidden = document["forward_of"]["one_hidden_state_mib"]
    assert bare["beyond_bare_mib"] == 0
    assert 3 * hidden < kept["beyond_bare_mib"] < 8 * hidden  # of 6 layers and the embeddings
    [row] = document["step"]
    assert row["case"] == {"backbone": "tiny", "batch": 64, "length": 16} and set(row["peak_memory"]) == {FLOOR, OURS}
    assert row["peak_memory"][OURS]["held_mib"] > row["peak_memory"][FLOOR]["held_mib"] > 0
    assert len(peaks.memory_tables(document)) == 2
    from levi_fast.bench.plots import CHARTS

    assert all("<svg" in (draw(document) or "") for draw in CHARTS["memory"].values())
    with pytest.raises(DataError, match="parts: expected some of forward, step; got 'epoch'"):
        peaks.bench_memory(options, None, parts=("epoch",))


def test_a_process_that_is_killed_is_an_error_and_the_next_one_answers() -> None:
    request = {"layers": 1, "what": "bare", "device": "cpu"}
    peak = memory_module.in_own_process(request)["peak"]
    server = memory_module._server().process
    while psutil.Process(server.pid).children():  # it has answered, and may not have ended yet
        time.sleep(0.01)
    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(memory_module.in_own_process, {**request, "layers": 200})
        while not (measuring := psutil.Process(server.pid).children()):
            time.sleep(0.01)
        measuring[0].kill()
        with pytest.raises(DataError, match=r"memory of .*: its process was killed by signal 9; out of memory\?"):
            answer.result()
    assert memory_module._server().process is server  # only the one that measured has ended
    server.kill()
    with pytest.raises(DataError, match=r"memory of .*: its process was killed by signal 9"):
        memory_module.in_own_process(request)
    assert abs(memory_module.in_own_process(request)["peak"] - peak) < 2**20


def test_a_process_that_fails_says_why() -> None:
    with pytest.raises(DataError, match=r"its process failed: KeyError: .*nothing-like-it"):
        memory_module.in_own_process(
            {"name": "nothing-like-it", "method": OURS, "batch": 1, "length": 1, "dtype": "float32", "device": "cpu",
             "threads": 1}
        )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbones": ("gpt-5",)}, "backbones: expected some of minilm, .*; got 'gpt-5'"),
        ({"peers": ("adapter",)}, "peers: expected some of .*; got 'adapter'"),
        ({"dtype": "int8"}, "dtype: expected one of float32, bfloat16; got 'int8'"),
        ({"batch_sizes": (0,)}, "batch_sizes: expected numbers from 1; got 0"),
        ({"lengths": (513,)}, "lengths: tiny takes at most 512 tokens; got 513"),
        ({"backbones": ("vit-b16",), "lengths": (64,)}, "lengths: vit-b16 takes images of 224 pixels a side; got 64"),
        ({"seconds": 0.0}, "seconds: expected a number above 0"),
    ],
)
def test_options_that_do_not_fit(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        StepOptions(**{"backbones": ("tiny",), **arguments})


def test_a_device_that_is_not_there(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for command in ("step", "memory"):
        with pytest.raises(SystemExit) as ended:
            main(["bench", command, "--device", "cuda"])
        assert ended.value.code == 2
        assert "torch sees no CUDA device" in capsys.readouterr().err


def test_what_does_not_fit_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "free_memory", lambda device: GIB)
    with pytest.raises(DataError, match=r"backbone llama-1b: its weights in bfloat16 .* need about 3\.\d GiB"):
        StepOptions(("llama-1b",))
    spec = BACKBONES["llama-1b"]
    size = spec.size()
    assert 1.2e9 < size.parameters < 1.3e9
    needed = requirements(size, spec, 1, 64, "bfloat16")
    kept, skipped = affordable((FLOOR, OURS, *PEERS), needed, 8 * GIB)
    assert set(skipped) == {"full", "full-trainer"} and kept == tuple(name for name in METHODS if name not in skipped)
    assert "GiB are free" in skipped["full"]
    assert affordable((FLOOR, "full"), needed, 30 * GIB) == ((FLOOR, "full"), {})
    just_one = needed[FLOOR] + needed["full"]
    assert affordable(("full", "full-trainer"), needed, just_one) == (("full", "full-trainer"), {})  # they share it
    assert affordable(("full-trainer",), needed, just_one - 1)[0] == ()


def test_a_contender_left_out_is_named_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps.importlib.util, "find_spec", lambda name: None)
    options = StepOptions(("tiny",), (2,), (8,), peers=("linear-probe", "lora"), seconds=0.001)
    [row] = steps.bench_step(options, tmp_path / "steps.json")["step"]
    assert set(row["median_us"]) == {FLOOR, OURS, "linear-probe"}
    assert row["skipped"] == {"lora": "peft is not installed: pip install levi_fast[lora]"}


def test_the_memory_command(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_module, "in_own_process", lambda request: {"step": 2**20, "held": 2**21})
    monkeypatch.setattr(peaks, "free_memory", lambda device: 100 * GIB)
    output = tmp_path / "memory.json"
    with pytest.raises(SystemExit) as ended:
        main(["bench", "memory", "--device", "cpu", "--parts", "step", "--peers", "full", "--backbone", "tiny,minilm",
              "--output", str(output)])  # fmt: skip
    assert ended.value.code == 0
    rows = json.loads(output.read_text())["step"]
    assert [row["case"]["backbone"] for row in rows] == ["tiny", "minilm"]
    assert all(set(row["peak_memory"]) == {FLOOR, OURS, "full"} for row in rows)
    assert "2.0 + 1.0" in capsys.readouterr().out


def test_published_sizes() -> None:
    millions = {name: BACKBONES[name].size().parameters / 1e6 for name in backbones.DEFAULT}
    published = {"minilm": 22.6, "bert-base": 108.9, "vit-b16": 85.8, "t5-base": 109.6, "llama-1b": 1235.8}
    assert millions == pytest.approx(published, rel=0.01)
