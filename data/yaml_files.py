# SPDX-License-Identifier: Apache-2.0
"""YAML that people write: mixtures, recipes and the facts of cards. Tags that make objects are not known to the reader."""

from pathlib import Path

import yaml


MAX_YAML_BYTES = 64 * 1024
MAX_YAML_DEPTH = 50  # PyYAML's scanner takes quadratic time in it
# PyYAML lets what its constructors of dates, numbers and tags run into pass.
_YAML_ERRORS = (yaml.YAMLError, ValueError, RecursionError, AttributeError, LookupError, OverflowError, TypeError)


class _PlainLoader(yaml.SafeLoader):
    """The safe loader without what takes more than its share: aliases, by which a small file stands for a large one, and depth."""

    def fetch_flow_collection_start(self, token):
        self._check_depth(self.flow_level)
        return super().fetch_flow_collection_start(token)

    def add_indent(self, column):
        self._check_depth(len(self.indents))
        return super().add_indent(column)

    def _check_depth(self, depth):
        if depth > MAX_YAML_DEPTH:
            raise yaml.scanner.ScannerError(None, None, f"it is nested deeper than {MAX_YAML_DEPTH}", self.get_mark())

    def compose_node(self, parent, index):
        if self.check_event(yaml.events.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(None, None, f"the alias *{event.anchor} is not taken", event.start_mark)
        return super().compose_node(parent, index)


def read_yaml(path: str | Path, what: str):
    """
    Read a YAML file.

    Args:
        path (`str` or `Path`): The file.
        what (`str`): What it is, for the message.

    Returns:
        What it says, in plain types.

    Raises:
        OSError: If it cannot be opened.
        ValueError: If it is not YAML in UTF-8, has an alias, or is larger than 64 KiB, or nested deeper than 50.
    """
    path = Path(path)
    size = path.stat().st_size
    if size > MAX_YAML_BYTES:
        raise ValueError(f"{what} {path} may have at most {MAX_YAML_BYTES} bytes, got {size}. It is some other file.")
    try:
        return _PlainLoader(path.read_bytes().decode("utf-8-sig")).get_single_data()
    except _YAML_ERRORS as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{what} {path} is not a YAML file: {reason} ({type(error).__name__}). Correct it; text that looks like something else "
            "needs quotes."
        ) from error


__all__ = ["MAX_YAML_BYTES", "read_yaml"]
