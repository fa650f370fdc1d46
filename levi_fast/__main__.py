"""``python -m levi_fast``: the command line."""

from levi_fast.cli import main

main()
