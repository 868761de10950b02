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


def test_the_page_on_installing_holds_the_committed_times():
    text = readme.INSTALL.read_text()
    assert readme.updated(text, readme.INSTALL) == text, "run: make readme"
    assert readme.updated(text.replace(" s on ", " hours on "), readme.INSTALL) == text
    assert "for the CPU alone `pip install .` took" in text
    assert "with the Hopper library the build took" in text


def test_the_page_on_several_gpus_holds_the_ledgers_predictions():
    text = readme.DISTRIBUTED.read_text()
    assert readme.updated(text, readme.DISTRIBUTED) == text, "run: make readme"
    assert "| LoRA | 64 | 8 |" in text


def test_a_line_about_decoding_has_the_numbers_of_its_run():
    shapes = (
        "d128 B1 H32/8 S1/4096 dense bf16",
        "d128 B8 H32/8 S1/8192 dense bf16",
        "d128 B8 H32/8 S1/8192 paged16 bf16",
    )
    rates = {"flashmla": (2e12, 3e12, 9e12), "sdpa-cudnn": (1e12, 3e12, 1e12)}
    results = [
        {"shape": shape, "mode": "graph", "peer": peer, "status": "ok", "bytes_per_second": rate, "seconds": 1e6 / rate}
        for peer, mine in rates.items()
        for shape, rate in zip(shapes, mine, strict=True)
    ]
    environment = {"device": "a GPU", "device_type": "cuda"}
    document = {"kind": "decode", "environment": environment, "records": results, "read_bytes_per_second": 3.1e12}
    assert readme.decoding(document) == (
        "| decoding, a GPU, 2 caches of 17 to 268 MB: speed, geometric mean | 1.41 × the best peer's "
        "(cuDNN, FlashAttention 2); lowest 1.00 ×; up to 3,000 GB/s of K and V (a pure read: 3,100) |"
    )


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
