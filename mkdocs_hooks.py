"""What `make docs` does beyond Markdown: the repository's own pages join the site, and links to them are followed.

README.md, CONTRIBUTING.md, SECURITY.md, CHANGELOG.md and benchmarks/RESULTS.md stand outside docs/, in their usual places of a
repository. They become pages of the site while it is built; no second copy is kept.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent
# Page of the site -> its file in the repository.
PAGES = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
    "changelog.md": "CHANGELOG.md",
    "results.md": "benchmarks/RESULTS.md",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    for picture in (ROOT / "benchmarks" / "results").glob("*.png"):
        files.append(File.generated(config, f"results/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Resolves each link as in the repository, then as a page of the site. A source file becomes text: the site holds none."""
    here = page.file.src_uri
    source = PAGES.get(here, f"docs/{here}")

    def follow(match: re.Match[str]) -> str:
        bang, text, target, anchor = match.groups()
        if not target or re.match(r"[a-z]+:", target):
            return match[0]
        in_repository = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        pages = {file: name for name, file in PAGES.items()}
        name = pages.get(in_repository, re.sub("^(docs|benchmarks)/", "", in_repository))
        if files.get_file_from_path(name) is None and (ROOT / in_repository).exists():
            return text
        return f"{bang}[{text}]({posixpath.relpath(name, posixpath.dirname(here) or '.')}{anchor or ''})"

    if here == "models.md":  # the reasons in its tables are other libraries' messages, with brackets that are no links
        markdown = re.sub(r"\[(\w+)\](?=[ |\n])", r"\\[\1\\]", markdown)
    return re.sub(r"(!?)\[([^\]]*)\]\(([^)#\s]*)(#[^)\s]*)?\)", follow, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The roles of docstrings (``:func:`name` ``) are for readers of the source; the site shows the name."""
    return re.sub(r":(?:func|class|mod|data|meth|attr):(?=<code>)", "", html)
