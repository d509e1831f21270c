# SPDX-License-Identifier: Apache-2.0
"""What claims to be large takes no more memory than docs/reliability.md says: measured in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).with_name("measure_bounds.py")
# In MiB, as docs/reliability.md states them, and how the call ends.
BOUNDS = {
    "a cloud 10^9 m wide": (64, "works"),
    "a .ply file of 10^9 vertices, binary": (16, "promises 1000000000 vertices and holds 0"),
    "a .ply file of 10^9 vertices, text": (16, "must have 1 to 50000000 vertices"),
    "a safetensors file of 12 TB": (16, "is damaged"),
    "YAML of aliases": (16, "the alias *a is not taken"),
    "a picture of 72 million pixels": (16, "at most 67108864 pixels"),
    "a line of 100 MB": (128, "is longer than 16777216 bytes"),
    "an object of 100 MB": (192, "at most 16777216 characters"),
    "a row of 100 MB in a list": (192, "is not JSON of at most 16777216 characters"),
    "a video whose `stts` has 10^9 frames": (128, None),
    "a video whose `stsc` has 10^9 frames": (128, None),
    "a video whose `stsz` has 10^9 frames": (128, "cannot be read"),
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict:
    command = [sys.executable, str(SCRIPT), str(tmp_path_factory.mktemp("large"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=SCRIPT.parents[2])
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout[done.stdout.index("{") :])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure a peak")
@pytest.mark.parametrize("name", BOUNDS)
def test_claim_takes_no_more_than_its_bound(name, measured):
    bound, end = BOUNDS[name]
    assert measured[name]["mib"] <= bound, measured[name]
    if end is not None:
        assert end in measured[name]["end"]


def test_every_claim_has_a_bound(measured):
    assert measured.keys() == BOUNDS.keys()
