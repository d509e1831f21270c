# SPDX-License-Identifier: Apache-2.0
"""Links, commands, examples and names of the documents, without the tools that build the site from them."""

import importlib
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import yaml

import geode
from geode.cli import build_parser


ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "geode/tiny/README.md")),
    *sorted(DOCS.rglob("*.md")),
]
LINK = re.compile(r"\]\(([^()\s]+)\)")
PARSED_COMMANDS = ("README.md", "quickstart.md", "faq.md", "data.md", "training.md", "evaluation.md", "scaling.md")


def label(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose(path: Path) -> str:
    """A page without its code, in which brackets and # are something else."""
    return re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them and as the site does."""
    headings = re.findall(r"^#+ +(.+?) *$", prose(path), flags=re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower() for heading in headings]
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading)) for heading in plain}


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def hooks():
    spec = importlib.util.spec_from_file_location("site_hooks", DOCS / "site_hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", PAGES, ids=label)
def test_links_within_the_repository_lead_to_files_and_headings(path):
    broken = []
    for target in LINK.findall(prose(path)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


def test_links_are_seen_at_all():
    assert sum(len(LINK.findall(prose(path))) for path in PAGES) > 60
    assert "is-the-scale-metric" in anchors(DOCS / "faq.md")
    assert "no-such-heading" not in anchors(DOCS / "faq.md")


def test_pages_that_leave_docs_are_pages_of_the_site():
    """A link out of docs/ works on GitHub; the site needs a page for it."""
    outside = {
        (path.parent / target.partition("#")[0]).resolve().relative_to(ROOT).as_posix()
        for path in DOCS.rglob("*.md")
        for target in LINK.findall(prose(path))
        if not re.match(r"[a-z]+:|#", target)
    }
    outside = {name for name in outside if not name.startswith("docs/")}
    assert outside <= set(hooks().OUTSIDE)


def test_navigation_names_every_page_once():
    def names(entry):
        if isinstance(entry, str):
            yield entry
        else:
            for value in entry.values() if isinstance(entry, dict) else entry:
                yield from names(value)

    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = list(names(site["nav"]))
    there = [path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")]
    assert sorted(listed) == sorted([*there, *hooks().OUTSIDE.values()]), (
        "each page of docs/ stands in `nav` of mkdocs.yml"
    )
    assert site["strict"] is True
    assert site["theme"]["font"] is False


def test_api_pages_show_public_names_that_exist_and_are_documented():
    shown = [
        line[4:]
        for page in (DOCS / "api").glob("*.md")
        for line in page.read_text("utf-8").splitlines()
        if line[:4] == "::: "
    ]
    assert len(shown) == len(set(shown)) > 40
    for path in shown:
        module, name = path.rsplit(".", 1)
        assert getattr(importlib.import_module(module), name).__doc__, path
    public = [name for name in geode.__all__ if name != "__version__"]
    assert set(public) <= {path.rsplit(".", 1)[-1] for path in shown}


@pytest.mark.parametrize("name", PARSED_COMMANDS)
def test_commands_have_arguments_that_exist(name):
    path = ROOT / name if name == "README.md" else DOCS / name
    text = "".join(blocks(path, "bash")).replace("\\\n", " ")
    commands = [shlex.split(line, comments=True) for line in text.splitlines() if line.startswith("geode ")]
    assert commands
    parser = build_parser()
    for command in commands:
        parser.parse_args(command[1:])


def test_examples_of_the_quickstart_run():
    (example,) = blocks(DOCS / "quickstart.md", "python")
    exec(compile(example, "quickstart.md", "exec"), {})  # noqa: S102 - our own page


def test_site_finds_what_would_be_fetched_from_elsewhere():
    find = hooks().fetched_from_elsewhere
    fetched = [
        '<script src="https://cdn.example/x.js">',
        "<img alt=a src=//cdn.example/x.png>",
        '<link rel="stylesheet" href="https://cdn.example/x.css">',
        "@import 'https://cdn.example/x.css';",
        "a { background: url(https://cdn.example/x.png) }",
        '<pre class="mermaid">',
    ]
    assert [len(find(text)) for text in fetched] == [1] * len(fetched)
    kept = '<a href="https://arxiv.org">x</a> <img src="demo.png"> <link rel="canonical" href="https://x.example/">'
    assert find(kept) == []


def test_front_matter_does_not_reach_the_site():
    module = hooks()
    assert module._without_front_matter("---\na: 1\n---\n# Title\n") == "# Title\n"
    assert module._without_front_matter("# Title\n---\n") == "# Title\n---\n"
