"""README says what is: its links lead somewhere, its Python runs, its command lines have the options they name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer.main

from levi_fast.backbones import DEFAULT_BACKBONE, packaged_folder
from levi_fast.cli import app

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DATA = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")


def test_every_link_to_a_file_leads_to_one() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    missing = [link for link in links if not link.startswith("http") and not (ROOT / link).is_file()]
    assert links and not missing


def test_the_python_runs() -> None:
    if packaged_folder(DEFAULT_BACKBONE) is None:
        pytest.skip("needs the MiniLM weights of the extra `demo`")
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, object] = {}
    exec(blocks[0], names)  # a model
    exec(
        "import levi_fast\n" + blocks[1], names
    )  # swapped there and back; it holds no reference ensemble to begin with


@pytest.mark.parametrize("text", [README, DATA], ids=["README.md", "docs/data.md"])
def test_every_command_and_option_exists(text: str) -> None:
    """Commands indented or fenced, continued by backslashes."""
    lines = text.replace("\\\n", " ").splitlines()
    commands = [line.strip().split() for line in lines if line.strip().startswith("levi-fast ")]
    assert len(commands) >= 5
    root = typer.main.get_command(app)
    for words in commands:
        command = root
        for word in words[1:]:
            if not word.startswith("-") and word in getattr(command, "commands", {}):
                command = command.commands[word]
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        used = {word for word in words if word.startswith("--")}
        assert used <= known | {"--help"}, (words, used - known)
