# SPDX-License-Identifier: Apache-2.0
"""What a check of a folder says."""

import json
from pathlib import Path
from typing import NamedTuple


class Problem(NamedTuple):
    """One thing that is wrong: where, what, and what to do."""

    where: str
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.where}: {' '.join(self.what.split())}. {self.remedy}."


class Report(NamedTuple):
    """What a check has found; `notes` say what was done or left undone."""

    problems: list[Problem]
    notes: list[str]


def read_json(path: Path) -> object:
    """Return what a JSON file holds; None if there is none or it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


__all__ = ["Problem", "Report", "read_json"]
