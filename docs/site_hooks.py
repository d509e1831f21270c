# SPDX-License-Identifier: Apache-2.0
"""Hooks of the site: pages from outside docs/, and a look for what would be loaded from another host."""

from __future__ import annotations

import re
from pathlib import Path
from posixpath import relpath
from typing import TYPE_CHECKING


# The tests look at this module without mkdocs, which is in an environment of its own.
if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page


ROOT = Path(__file__).resolve().parents[1]
# Pages that lie elsewhere in the repository, where GitHub shows them.
OUTSIDE = {
    "examples/README.md": "examples.md",
    "geode/tiny/README.md": "tiny_checkpoint.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
# What a browser fetches by itself; a link that is only followed is none.
_FETCHED = (
    re.compile(r"<(?:script|img|iframe|source|video)\b[^>]*?\bsrc=[\"']?((?:https?:)?//[^\"'\s>]+)"),
    re.compile(
        r"<link\b(?=[^>]*\brel=[\"']?(?:stylesheet|icon|preload|preconnect))[^>]*\bhref=[\"']?((?:https?:)?//[^\"'\s>]+)"
    ),
    # The theme would fetch a program to draw these.
    re.compile(r"<\w+ class=\"(mermaid)\""),
    re.compile(r"(?:url\(|@import\s)[\"']?((?:https?:)?//[^\"')\s;]+)"),
)


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages from outside docs/."""
    from mkdocs.structure.files import File

    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=_without_front_matter((ROOT / source).read_text("utf-8"))))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_) -> str:
    """Lead links that leave docs/ to the pages made of their targets."""
    folder = Path(page.file.src_uri).parent.as_posix()
    for source, target in OUTSIDE.items():
        written = relpath(f"../{source}", folder)
        markdown = markdown.replace(f"]({written})", f"]({relpath(target, folder)})")
    return markdown


def on_post_build(*, config: MkDocsConfig) -> None:
    """Fail where a page, a style or a picture would be fetched from another host."""
    from mkdocs.exceptions import PluginError

    found = []
    for path in sorted(Path(config.site_dir).rglob("*")):
        if path.suffix in (".html", ".css", ".svg"):
            found += [f"{path.name}: {url}" for url in fetched_from_elsewhere(path.read_text("utf-8"))]
    if found:
        raise PluginError("The site must load nothing from other hosts, and it would load:\n" + "\n".join(found))


def fetched_from_elsewhere(text: str) -> list[str]:
    """Return the addresses on other hosts that a browser would fetch to show `text`."""
    return [url for pattern in _FETCHED for url in pattern.findall(text)]


def _without_front_matter(text: str) -> str:
    return re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
