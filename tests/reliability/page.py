# SPDX-License-Identifier: Apache-2.0
"""
Writes `docs/reliability.md` from the table of bad input.

```bash
python -m tests.reliability.page
```
"""

from itertools import groupby
from pathlib import Path

from tests.reliability import cases_chats, cases_data, cases_models, cases_scenes, cases_tensors
from tests.reliability.common_reliability import Case, ExitCode2


PAGE = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"
TEXT = Path(__file__).with_name("page.md")
MODULES = (cases_chats, cases_scenes, cases_tensors, cases_models, cases_data)
CASES: tuple[Case, ...] = tuple(case for module in MODULES for case in module.CASES)


def cell(text: str) -> str:
    """Text as it stands, in a cell of a table."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def code(text: str) -> str:
    """A part of a message, in a cell of a table."""
    text = text.replace("|", "\\|")
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def page_text() -> str:
    """Return the page: what stands in `page.md`, and a table for each entry point."""
    lines = [TEXT.read_text(encoding="utf-8").rstrip().format(num_cases=len(CASES)), ""]
    for entry, cases in groupby(CASES, key=lambda case: case.entry):
        lines += [f"### {entry}", "", "| Given | Error | What came | What helps |", "| --- | --- | --- | --- |"]
        for case in cases:
            error = "exit code 2" if case.error is ExitCode2 else f"`{case.error.__name__}`"
            lines.append(f"| {cell(case.given)} | {error} | {code(case.received)} | {code(case.remedy)} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page_text(), encoding="utf-8")
