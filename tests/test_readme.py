"""README.md: short, true to the committed results, and without a dead link."""

import re
from pathlib import Path

import pytest
import readme

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_readme_holds_the_committed_numbers():
    text = readme.README.read_text()
    assert readme.updated(text) == text, "run: make readme"
    assert readme.updated(text.replace("tokens/s", "tokens an hour")) == text


def test_readme_is_short():
    text = readme.README.read_text()
    assert len(text.splitlines()) <= 110
    assert len(text.split()) <= 900


def test_the_figure_can_be_drawn(tmp_path):
    readme.draw(tmp_path / "memory.png")
    assert (tmp_path / "memory.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_local_link_leads_to_a_file(page):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing
