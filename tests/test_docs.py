"""The documentation beside the code: messages that are quoted are the code's, and every page is in the menu.

`make docs` checks links, anchors and docstrings.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TROUBLESHOOTING = (ROOT / "docs" / "troubleshooting.md").read_text()
MESSAGES = re.findall(r"^### `(.+)`$", TROUBLESHOOTING, re.M)


def texts():
    """Every string of the code, with … for what changes."""
    for path in (
        ROOT / "setup.py",
        *(ROOT / "csrc" / "flashmla_build").glob("*.py"),
        *(ROOT / "flashmla_hf").rglob("*.py"),
    ):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            elif isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)


@pytest.fixture(scope="module")
def code():
    return "\n".join(texts())


def test_there_are_messages():
    assert len(MESSAGES) > 40


@pytest.mark.parametrize("message", MESSAGES)
def test_every_quoted_message_is_the_code_s(message, code):
    """What stands between two … is one piece of a message; the pieces follow each other in one string."""
    pieces = [re.escape(piece) for piece in message.split("…") if piece.strip(" .:,")]
    assert re.search("[^\n]*".join(pieces), code), message


def test_every_page_is_in_the_menu():
    menu = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    named = set(re.findall(r": (\S+\.md)$", menu, re.M))
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    outside = {"index.md", "contributing.md", "security.md", "changelog.md", "results.md"}  # mkdocs_hooks.py
    assert named == pages | outside
