# SPDX-License-Identifier: Apache-2.0
"""Run a published folder as somebody does who has installed transformers, torch, safetensors and Pillow, and nothing else."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

from geode import embedded_scene


NAME_LINE = re.compile(r'^name = ".*?"', flags=re.MULTILINE)
BARE = ("transformers", "torch", "safetensors", "pillow")
NUM_FRAMES, FRAME_SIZE = 4, (96, 128)
# Says on a line of its own what it is about to do, so that the caller knows at what it failed.
LOADER = """
import os
import sys
from pathlib import Path

sys.path.append(os.environ["GEODE_CHECK_SITE"])
import transformers

folder = os.environ["GEODE_CHECKED_FOLDER"]
processor_class = "AutoProcessor" if Path(folder, "processor_config.json").is_file() else "AutoImageProcessor"
for name in ("AutoConfig", processor_class, "AutoModel"):
    print(f"step: {name}.from_pretrained", flush=True)
    loaded = getattr(transformers, name).from_pretrained(folder, trust_remote_code=True)
    if not type(loaded).__module__.startswith("transformers_modules."):
        raise TypeError(f"{name} took {type(loaded).__module__}.{type(loaded).__name__} instead of the folder's own class.")
del loaded
print("step: the snippet of the card", flush=True)
"""


class Outcome(NamedTuple):
    """What came of a run: the step that failed and why, or None and None; and what the snippet has printed."""

    failed_step: str | None
    error: str | None
    printed: str


def run_as_stranger(folder: str | os.PathLike, snippet: str, *, timeout_s: float = 1800.0) -> Outcome:
    """
    Load a folder by the Auto classes with `trust_remote_code=True`, then run a snippet, where `geode` is not installed.

    It runs the folder's code, in a process that finds the packages of `BARE` and what these require, and no others. The process
    has no access token in its environment, no network for the Hub's client, and caches of its own, but it is no sandbox.

    Args:
        folder (`str` or `os.PathLike`): A folder with code, as `geode export` writes it.
        snippet (`str`): Python, with a line `name = "..."` that names the folder or its repository. It finds in its working
            folder `frames/`, `frame_0.png`, `frame_1.png`, `room.mp4` and `geometry/`.
        timeout_s (`float`, defaults to 1800): Longest time for all of it.

    Returns:
        [`Outcome`]: What failed, and what was printed.
    """
    folder = Path(folder).resolve()
    code = NAME_LINE.sub(lambda _: f"name = {json.dumps(str(folder))}", snippet, count=1)
    with tempfile.TemporaryDirectory(prefix="geode-check-") as place:
        work = Path(place) / "work"
        write_inputs(work)
        link_packages(Path(place) / "site", BARE)
        environment = bare_environment(place)
        environment["GEODE_CHECKED_FOLDER"] = str(folder)
        environment["GEODE_CHECK_SITE"] = f"{place}/site"
        # Without `site`, no package is found but those that are linked.
        command = [sys.executable, "-I", "-S", "-W", "ignore", "-c", LOADER + code]
        return run_steps(command, cwd=work, environment=environment, timeout_s=timeout_s)


def bare_environment(place: str | os.PathLike) -> dict[str, str]:
    """Return this process's environment without the access token, with the client's caches in a folder of their own and offline."""
    hidden = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    return environment | {"HF_HOME": f"{place}/hf", "HF_MODULES_CACHE": f"{place}/modules", "HF_HUB_OFFLINE": "1"}


def run_steps(
    command: Sequence[str], *, cwd: str | os.PathLike, environment: dict[str, str], timeout_s: float
) -> Outcome:
    """
    Run a program that says on lines `step: ...` what it is about to do.

    Args:
        command (`Sequence[str]`): Program and arguments.
        cwd (`str` or `os.PathLike`): Its working folder.
        environment (`dict[str, str]`): Its environment.
        timeout_s (`float`): Longest time.

    Returns:
        [`Outcome`]: What failed, and what was printed after the last step was said.
    """
    try:
        result = subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, errors="replace", timeout=timeout_s
        )
    except subprocess.TimeoutExpired:
        return Outcome("the run", f"it took more than {timeout_s:g} s", "")
    step, printed = "starting", []
    for line in result.stdout.splitlines():
        if line.startswith("step: "):
            step, printed = line.removeprefix("step: "), []
        else:
            printed.append(line)
    if result.returncode == 0:
        return Outcome(None, None, "\n".join(printed))
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    return Outcome(step, lines[-1].strip() if lines else f"it ended with code {result.returncode}", "\n".join(printed))


def link_packages(folder: Path, names: Sequence[str]) -> None:
    """
    Make a folder for `sys.path` that holds some installed packages and what they require, as links.

    Args:
        folder (`Path`): The folder, which is made.
        names (`Sequence[str]`): Distributions.

    Raises:
        ValueError: If a distribution was installed without a list of its files.
    """
    folder.mkdir(parents=True)
    pending, seen = list(names), set()
    while pending:
        name = canonicalize_name(pending.pop())
        if name in seen:
            continue
        seen.add(name)
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            if name in names:
                raise
            continue  # required by a package, and left out by whoever installed it
        if found.files is None:
            raise ValueError(
                f"The package {name} lacks the list of its files, so that it cannot be set apart. Install it with pip."
            )
        for entry in {file.parts[0] for file in found.files} - {"..", "__pycache__"}:
            if not (folder / entry).exists():
                (folder / entry).symlink_to(found.locate_file(entry))
        for text in found.requires or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                pending.append(requirement.name)


def write_inputs(folder: Path) -> None:
    """Write what the snippets of cards read: frames (of noise, since no answer is judged), a video and the geometry of the shipped room."""
    (folder / "frames").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (NUM_FRAMES, *FRAME_SIZE, 3), dtype=np.uint8)
    for number, frame in enumerate(pixels):
        Image.fromarray(frame).save(folder / "frames" / f"frame_{number}.png")
        shutil.copy(folder / "frames" / f"frame_{number}.png", folder)
    shutil.copy(embedded_scene() / "room.mp4", folder)
    shutil.copytree(embedded_scene() / "geometry", folder / "geometry")


__all__ = [
    "BARE",
    "NAME_LINE",
    "Outcome",
    "bare_environment",
    "link_packages",
    "run_as_stranger",
    "run_steps",
    "write_inputs",
]
