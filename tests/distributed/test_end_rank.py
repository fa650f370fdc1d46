"""A rank ends without Python's shutdown, but not without what it has to write."""

from __future__ import annotations

import subprocess
import sys

from levi_fast.ranks import end_rank

SCRIPT = """
import atexit, os, sys, torch
from levi_fast.ranks import end_rank

class Last:
    def __del__(self, write=os.write):
        write(2, b"Python shut down")

last = Last()
atexit.register(lambda: print("registered function ran"))
if sys.argv[1] == "in a group":
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
print("written", end="; ")
end_rank()
print("went on", end="; ")
"""


def test_outside_a_process_group_nothing_happens() -> None:
    end_rank()
    ran = subprocess.run([sys.executable, "-c", SCRIPT, "alone"], capture_output=True, text=True, check=True)
    assert ran.stdout == "written; went on; registered function ran\n" and "Python shut down" in ran.stderr


def test_in_a_process_group_the_process_ends_at_once() -> None:
    ran = subprocess.run([sys.executable, "-c", SCRIPT, "in a group"], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (0, "written; registered function ran\n"), ran.stderr
    assert "Python shut down" not in ran.stderr
