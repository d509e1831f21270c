# SPDX-License-Identifier: Apache-2.0
"""
An extension of griffe: docstrings in transformers' style become Markdown that the site understands.

References such as [`GeodeConfig`] link to the API pages where these show the name, and are plain code elsewhere. A line
`> Parameters that control ...` becomes a bold one, and every later list of arguments stays a list of arguments.
"""

import re
from pathlib import Path

from griffe import Extension, Object


PAGES = Path(__file__).resolve().parent / "api"
_REFERENCE = re.compile(r"\[`(~?)([\w.]+)`\](?![\[(])")
_GROUP = re.compile(r"^> (Parameters .*|Other parameters.*)$", flags=re.MULTILINE)


def shown_names() -> dict[str, str]:
    """Return the full path of each name that the API pages show, by its last part."""
    lines = [line for page in PAGES.glob("*.md") for line in page.read_text("utf-8").splitlines()]
    paths = [line.removeprefix("::: ").strip() for line in lines if line.startswith("::: ")]
    return {path.rsplit(".", 1)[-1]: path for path in paths}


class TransformersDocstrings(Extension):
    """Rewrites each docstring before it is parsed."""

    def __init__(self):
        super().__init__()
        self.shown = shown_names()

    def on_object(self, *, obj: Object, **_) -> None:
        """Rewrite the docstring of an object."""
        if obj.docstring is not None:
            obj.docstring.value = self.rewritten(obj.docstring.value)

    def rewritten(self, text: str) -> str:
        """Return a docstring with references as the site writes them."""
        return _GROUP.sub(r"**\1**", _REFERENCE.sub(self._link, text))

    def _link(self, match: re.Match) -> str:
        *owner, name = match[2].split(".")
        if name in self.shown:
            return f"[`{name}`][{self.shown[name]}]"
        if owner and owner[-1] in self.shown:
            # Some of these are methods of transformers' classes, which no page shows.
            return f'<autoref optional identifier="{self.shown[owner[-1]]}.{name}"><code>{name}</code></autoref>'
        return f"`{name}`"
