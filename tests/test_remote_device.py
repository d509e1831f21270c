# SPDX-License-Identifier: Apache-2.0
"""
On a device other than the CPU nothing is left behind, and the same comes out: see `tests/run_remote_device.py`.

It takes the place of an accelerator as far as places of tensors go; kernels, speed and memory are none of it.
"""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

from tests.trainers.common_launch import ROOT


pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch cannot register a device in Python",
)
# The first of each kind are enough to find most of what could be left behind.
QUICK = ["packs", "rationales", "generate", "ask", "stage2"]
SLOW = [
    "rows of two rooms",
    "packs, eager",
    "digits",
    "no geometry",
    "fewer tokens",
    "question conditioned",
    "beams",
    "sample",
]
SLOW += ["frames alone", "store", "alignment", "stage1", "adapter in bf16"]


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "ignore", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)


@pytest.fixture(scope="module")
def found_among(tmp_path_factory):
    """What some cases gave in both places, which one process finds out."""

    @functools.cache
    def found_among(*names: str) -> dict:
        folder: Path = tmp_path_factory.mktemp("remote")
        result = run("-m", "tests.run_remote_device", str(folder), *names)
        assert result.returncode == 0, result.stderr[-3000:]
        return json.loads((folder / "found.json").read_text("ascii"))

    return found_among


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_same_comes_out_as_on_the_cpu(found_among, name):
    found = found_among(*(QUICK if name in QUICK else SLOW))[name]
    assert "error" not in found, found["error"]
    here, there = found["cpu"], found["remote"]
    assert len(here) > 1
    if isinstance(here[0], str):
        assert all(here)
        assert there == here
    else:  # losses, and norms of gradients or of features
        assert there == pytest.approx(here, rel=1e-2 if "bf16" in name else 1e-3, abs=1e-5)


def test_device_refuses_what_was_left_behind():
    lines = [
        "import torch",
        "from tests.remote_device import REMOTE, RemoteDevice",
        "with RemoteDevice():",
        "    there, here = torch.ones(3, device=REMOTE), torch.ones(3)",
        "    assert (there + torch.tensor(1.0)).tolist() == [2.0, 2.0, 2.0]",
        "    assert there[torch.tensor([0, 2])].device == REMOTE",
        "    assert (there + here.to(REMOTE)).cpu().device.type == 'cpu'",
        "    for mixed in (lambda: there + here, lambda: here[there.long()], lambda: torch.where(here > 0, there, 0.0)):",
        "        try:",
        "            mixed()",
        "        except RuntimeError as error:",
        "            print(error)",
    ]
    result = run("-c", "\n".join(lines))
    assert result.stdout.count("must be on one device") == 3, result.stdout + result.stderr
