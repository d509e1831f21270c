# SPDX-License-Identifier: Apache-2.0
"""The README's example prints what the README says, and its links lead somewhere."""

import re
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_first_example_prints_what_the_readme_says(capsys):
    (example, *_) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    (promised,) = re.findall(r"^prints `([^`]+)`", TEXT, flags=re.MULTILINE)
    exec(compile(example, "README.md", "exec"), {})  # noqa: S102 - our own README
    assert capsys.readouterr().out.strip() == promised


def test_local_links_and_pictures_exist():
    targets = re.findall(r"\]\(((?!https?:)[^)#]+)\)", TEXT)
    assert len(targets) >= 8
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_readme_is_short_and_leads_with_two_commands():
    lines = TEXT.splitlines()
    assert len(lines) <= 200
    assert lines.index("make demo     # asks a rendered room 26 questions and draws the answers") < 30
    assert "## Limitations" in lines
