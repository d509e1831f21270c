# SPDX-License-Identifier: Apache-2.0
"""
`SHA256SUMS` of a data set of rooms: which files are whole, to the bit. `sha256sum -c SHA256SUMS` checks a copy of it.

While rooms are made a line follows each file that is in its place, so that what an interruption leaves can be checked as well.
"""

import re
from pathlib import Path

from geode.data.whole_files import write_whole, writing
from geode.modeling_geode.scene_files_geode import sha256_of


CHECKSUMS = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64})  (\S+)")


class Checksums:
    """
    The lines of the file, by path below the data set's folder.

    A data set of an earlier version has no such file: `is_absent` is true until `write` was called.

    Args:
        out (`Path`): The data set's folder.
    """

    def __init__(self, out: Path):
        self.out = out
        self.is_absent = not (out / CHECKSUMS).is_file()
        text = "" if self.is_absent else (out / CHECKSUMS).read_text(encoding="ascii", errors="replace")
        # A line that a kill cut short is no line, and its file is made again.
        found = [_LINE.fullmatch(line) for line in text.split("\n")[:-1]]
        self.known = {match[2]: match[1] for match in found if match}

    def is_right(self, name: str) -> bool:
        """Tell whether a file holds what its line says."""
        return name in self.known and (self.out / name).is_file() and sha256_of(self.out / name) == self.known[name]

    def add(self, names: list[str]) -> None:
        """Add lines for files as they are, at the end of the file."""
        found = {name: sha256_of(self.out / name) for name in names}
        self.known |= found
        with writing(self.out / CHECKSUMS), open(self.out / CHECKSUMS, "a", encoding="ascii") as file:
            file.write("".join(f"{digest}  {name}\n" for name, digest in found.items()))

    def write(self, names: list[str]) -> None:
        """Write the whole file anew, in the order of the names, with a line for each of them; files without one are read."""
        self.known = {name: self.known.get(name) or sha256_of(self.out / name) for name in sorted(names)}
        write_whole(self.out / CHECKSUMS, "".join(f"{digest}  {name}\n" for name, digest in self.known.items()))
        self.is_absent = False


__all__ = ["CHECKSUMS", "Checksums"]
