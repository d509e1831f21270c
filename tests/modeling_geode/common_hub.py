# SPDX-License-Identifier: Apache-2.0
"""What tests share that use a saved folder as somebody does who has transformers, and no `geode`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path


COMMIT = "0123456789abcdef0123456789abcdef01234567"

# Goes before the stranger's script: it makes `import geode` fail as where the package is not installed.
BLOCKER = """
import sys


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "geode":
            raise ModuleNotFoundError("No module named 'geode'", name="geode")


sys.meta_path.insert(0, Blocker())
"""


def run_stranger(script: str, *arguments: object, cwd: Path) -> str:
    """Run a script where `geode` is absent, with the Hub's cache in `cwd / "hf"`, and return what it prints."""
    environment = {**os.environ, "HF_HOME": str(cwd / "hf"), "HF_MODULES_CACHE": str(cwd / "modules")}
    command = [sys.executable, "-W", "ignore", "-c", BLOCKER + script, *map(str, arguments)]
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    # transformers asks "run the custom code? [y/N]" on standard output where it was not told.
    assert "custom code" not in result.stdout
    return result.stdout


def put_in_hub_cache(folder: Path, repository: str, hf_home: Path) -> None:
    """Lay a folder out as a download from the Hub: there all files of a commit share one module folder."""
    cached = hf_home / "hub" / f"models--{repository.replace('/', '--')}"
    shutil.copytree(folder, cached / "snapshots" / COMMIT)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT)
