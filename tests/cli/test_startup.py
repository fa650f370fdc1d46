"""How the command line begins: imports without the garbage collector, a sweep's server of workers before them."""

from __future__ import annotations

import gc
import json
import subprocess
import sys

import pytest
import torch

from levi_fast.startup import importing


def run(code: str) -> list[bool]:
    """What a fresh Python prints as JSON after ``code``."""
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found: list[bool] = json.loads(done.stdout)
    return found


def test_the_collector_is_off_while_importing_and_passes_over_what_came() -> None:
    found = run(
        "import gc, json, sys\n"
        "from levi_fast.startup import importing\n"
        "with importing():\n"
        "    inside = gc.isenabled()\n"
        "    import fractions\n"
        "print(json.dumps([inside, gc.isenabled(), gc.get_freeze_count() > 1000, 'fractions' in sys.modules]))"
    )
    assert found == [False, True, True, True]


def test_without_anything_to_import_the_collector_goes_on_as_before() -> None:
    before = gc.get_freeze_count()
    with importing():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() == before


def test_the_collector_is_on_again_after_an_import_that_fails() -> None:
    with pytest.raises(ImportError), importing():
        import levi_fast.no_such_module  # noqa: F401
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with importing():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


STARTED = (
    "import json, multiprocessing.forkserver as server, os, sys\n"
    "from levi_fast.training.workers import start_server_early\n"
    "light = 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    "before = dict(os.environ)\n"
    "start_server_early({device!r})\n"
    "print(json.dumps([light, server._forkserver._forkserver_pid is not None, before == dict(os.environ)]))"
)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere workers may be spawned, without a server")
@pytest.mark.parametrize(("device", "expected"), [("cpu", True), ("cuda", False), ("nonsense", False)])
def test_the_server_is_started_before_torch_is_imported(device: str, expected: bool) -> None:
    assert run(STARTED.format(device=device)) == [True, expected, True]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere workers may be spawned, without a server")
def test_where_a_gpu_would_train_no_server_is_started() -> None:
    pretend = "import torch\ntorch.cuda.is_available = lambda: True\n"
    assert run(pretend + STARTED.format(device="auto"))[1:] == [False, True]
    assert run(STARTED.format(device="auto"))[1] is not torch.cuda.is_available()
