# SPDX-License-Identifier: Apache-2.0
"""The benchmark of Sonata measures what it says, at sizes that take no time."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from benchmarks import sonata
from benchmarks.vggt import ROOT
from geode.configuration.configuration_geode import SonataConfig


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")

TINY = {"enc_depths": [1] * 5, "enc_channels": [16, 16, 32, 32, 64], "enc_num_head": [1, 1, 2, 2, 4]}


@pytest.fixture
def measured_here(monkeypatch):
    """Measure in this process, which has computed before."""
    monkeypatch.setattr(sonata, "in_fresh_process", lambda function, *arguments: function(*arguments))
    monkeypatch.setitem(sonata.SIZES, "small", TINY)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_ratios_are_printed_and_the_last_line_is_json(measured_here, capsys):
    sonata.main(["--cases", "small:900", "--repeats", "2", "--json"])
    line, last = capsys.readouterr().out.splitlines()
    (found,) = json.loads(last)["results"]
    assert line.startswith(f"small, 900 points, {found['num_voxels']} voxels: ")
    for name in sonata.PROGRAMS:
        assert found["cpu_seconds"][name] == min(found["all_cpu_seconds"][name])
    assert found["cpu_seconds_ratio"] == found["cpu_seconds"]["ours"] / found["cpu_seconds"]["plain"]
    assert 0 < found["least_cpu_seconds"] < found["cpu_seconds"]["plain"]


def test_programs_that_compute_something_else_are_refused(measured_here, monkeypatch):
    plain = sonata.sonata_plain.plain_forward
    monkeypatch.setattr(sonata.sonata_plain, "plain_forward", lambda *arguments: -plain(*arguments))
    with pytest.raises(RuntimeError, match=r"must compute the same for 900 points and the size 'small'"):
        sonata.main(["--cases", "small:900", "--repeats", "1"])


def test_cases_that_do_not_exist_are_refused(capsys):
    with pytest.raises(SystemExit):
        sonata.main(["--cases", "large:100"])
    assert "with a size of ['108m', 'small'], got 'large:100'" in capsys.readouterr().err


def test_points_lie_on_the_surfaces_of_a_room():
    points = sonata.room_points(5000)
    assert points.shape == (5000, 3)
    assert points.min() >= 0
    assert (points.max(axis=0) == sonata.ROOM).all()
    on_wall = (np.isclose(points, 0) | np.isclose(points, sonata.ROOM)).any(axis=1)
    # The walls, floor and ceiling have 86.8 of the 126.1 square metres; a box's bottom lies on the floor.
    assert 0.69 < on_wall.mean() < 0.80


def test_multiplications_of_one_voxel_are_counted_by_hand():
    config = SonataConfig(**TINY)
    # A voxel has itself for a neighbour, so a block of width C has 1 + 5 + 8 matrices of C x C, and 2 C for attention.
    embedding, pooling = 9 * 16, 16 * 16 + 16 * 32 + 32 * 32 + 32 * 64
    blocks = sum(14 * width**2 + 2 * width for width in TINY["enc_channels"])
    assert sonata.count_multiplications(config, torch.tensor([[4, 5, 6]])) == embedding + pooling + blocks


@pytest.mark.slow
def test_each_measurement_runs_in_a_process_of_its_own():
    command = [sys.executable, "-m", "benchmarks.sonata", "--cases", "small:3000", "--repeats", "1", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    (found,) = json.loads(done.stdout.splitlines()[-1])["results"]
    assert found["peak_growth_bytes_ratio"] < 1
