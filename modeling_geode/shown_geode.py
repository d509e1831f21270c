# SPDX-License-Identifier: Apache-2.0
"""How messages show what a caller gave."""

import reprlib


class _Shown(reprlib.Repr):
    """Values in messages, cut to a line; `repr` itself takes as long as they are, and fails where they are deep."""

    def __init__(self):
        super().__init__()
        self.maxlevel, self.maxlist, self.maxtuple, self.maxdict = 4, 8, 8, 8
        self.maxstring = self.maxother = self.maxlong = 80

    def repr_int(self, x, level):
        """Python refuses to write whole numbers of thousands of digits."""
        return super().repr_int(x, level) if x.bit_length() < 10_000 else f"a whole number of {x.bit_length()} bits"


shown = _Shown().repr


__all__ = ["shown"]
