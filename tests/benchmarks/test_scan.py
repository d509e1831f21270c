# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the scan compares programs that compute the same, and measures what it says."""

import json
import subprocess
import sys

import pytest
import torch

from benchmarks import scan
from benchmarks.vggt import MIB, ROOT


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("pair", [*scan.PAIRS.values(), ("our mixer, backward", "library's mixer, backward")])
def test_programs_of_a_pair_compute_the_same(pair):
    programs = scan.make_programs(length=37, hidden_size=32)
    ours, other = (programs[name]() for name in pair)
    scan.check_same("here", ours, other)
    # Outputs and, where gradients are asked for, one of each input or parameter.
    assert len(ours) == {"our scan, backward": 8, "our mixer, backward": 11}.get(pair[0], 1)
    other[-1].view(-1)[5] += 1e-2
    with pytest.raises(RuntimeError, match=r"here: .* result \d+ differs by 0.0\d+ beside values"):
        scan.check_same("here", ours, other)


def test_gradients_of_a_scan_are_those_of_the_plain_loop_at_the_width_of_a_mixer():
    """Over chunks of several sizes, in the precision that the benchmark has and in one where rounding cannot hide a fault."""
    inputs = scan.make_scan_inputs(300, 48)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in inputs]
        results = []
        for function in (scan.selective_scan, scan.plain_scan):
            y = function(*leaves)
            results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
        for ours, plain in zip(*results, strict=True):
            assert (ours - plain).abs().max() <= tolerance * plain.abs().max()


def test_times_and_ratios_are_printed_and_the_last_line_is_json(capsys):
    scan.main(["--lengths", "16", "24", "--hidden-sizes", "32", "--rounds", "3", "--no-memory", "--json"])
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines[0] == "16 steps, width 32"
    assert [line.split(":")[0].strip() for line in lines[1:4]] == list(scan.PAIRS)
    report = json.loads(last)
    assert [(row["length"], row["hidden_size"]) for row in report["results"]] == [(16, 32), (24, 32)]
    for row in report["results"]:
        for pair in scan.PAIRS:
            speedup = row[pair]["speedup"]
            assert 0 < speedup["least"] <= speedup["median"] <= speedup["most"]


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_peak_of_the_plain_loop_is_that_of_its_states():
    """Decays, inputs and states of 256 steps, 256 channels and 16 numbers: 4 MiB each, and the products on top."""
    peak = scan.measure_peak("plain loop", 256, 128)
    assert 8 * MIB < peak < 40 * MIB


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_memory_is_measured_in_fresh_processes():
    command = [sys.executable, "-m", "benchmarks.scan", "--lengths", "1024", "--hidden-sizes", "256", "--rounds", "1"]
    done = subprocess.run([*command, "--json"], cwd=ROOT, capture_output=True, text=True, check=True)
    (row,) = json.loads(done.stdout.splitlines()[-1])["results"]
    for pair in scan.PAIRS:
        # The plain programs hold 1024 x 512 x 16 numbers, 32 MiB, more than twice.
        assert row[pair]["peak_bytes"][scan.PAIRS[pair][1]] > 64 * MIB
        assert row[pair]["ratio"] < 1
