# SPDX-License-Identifier: Apache-2.0
"""
The script of the Space: it serves the page with the model that the variable GEODE_MODEL names, or with the tiny checkpoint.

`geode-vlm` in requirements.txt brings everything else.
"""

import os

from geode.ui import run_ui


if __name__ == "__main__":
    run_ui(os.environ.get("GEODE_MODEL"), os.environ.get("GEODE_REVISION"))
