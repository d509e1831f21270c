# SPDX-License-Identifier: Apache-2.0
"""The benchmark of VGGT measures what it says, at sizes that take no time; and the memory of a long video is bounded."""

import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks import vggt


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")

TINY = ["--hidden-size", "16", "--depth", "4", "--dense-hidden-size", "8", "--num-frames", "3", "--height", "28"]
TINY += ["--width", "42", "--repeats", "1"]
# Bytes of one layer of TINY: 3 frames of 1 + 4 + 2 * 3 tokens of width 2 * 16.
LAYER_BYTES = 4 * 3 * (1 + 4 + 2 * 3) * 2 * 16


@pytest.fixture
def measured_here(monkeypatch):
    """Measure in this process: a fresh one spends five seconds on imports."""
    monkeypatch.setattr(vggt, "run_variant", lambda name, options: vggt.measure(vggt.VARIANTS[name], options))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_benchmark_prints_ratios_and_writes_its_measurements(measured_here, capsys, tmp_path):
    vggt.main([*TINY, "--json", str(tmp_path / "report.json")])
    sizes, header, *rows = capsys.readouterr().out.splitlines()
    assert "hidden_size=16 num_heads=1 depth=4 dense_hidden_size=8 num_frames=3 height=28 width=42 threads=1" in sizes
    assert header.split() == ["variant", "CPU", "s", "ratio", "peak", "MiB", "ratio", "kept", "MiB", "ratio"]
    assert [row[:38].strip() for row in rows] == list(vggt.VARIANTS)
    assert rows[0].split()[-5::2] == ["1.00"] * 3
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["sizes"]["hidden_size"] == 16
    kept = {name: row["kept_bytes"] for name, row in report["summaries"].items()}
    # Four layers, all of them tapped here; the camera alone needs the last one.
    assert kept.pop("ours, camera") == LAYER_BYTES
    assert set(kept.values()) == {4 * LAYER_BYTES}
    for results in report["runs"].values():
        assert results[0]["cpu_seconds"] > 0


def test_benchmark_refuses_variants_that_compute_something_else(measured_here, monkeypatch):
    other = vggt.vggt_plain.plain_forward
    monkeypatch.setattr(
        vggt.vggt_plain, "plain_forward", lambda state, config, frames: other(state, config, 1 - frames)
    )
    with pytest.raises(
        RuntimeError, match=r"The mean of \|`pose_enc`\| must be [\d.]+ as the baseline's, ours, all heads"
    ):
        vggt.main(TINY)


def test_benchmark_refuses_sizes_that_cannot_be_measured(capsys):
    with pytest.raises(SystemExit):
        vggt.main(["--depth", "3"])
    assert "`--depth` must be at least 4 and `--repeats` at least 1, got 3 and 2." in capsys.readouterr().err


def test_peak_growth_counts_memory_that_is_gone_again():
    """64 MiB that are freed before the end count in full, and memory of before does not count."""
    before = torch.ones(2**24)
    vggt.reset_peak()
    resident = vggt.resident_bytes("VmRSS")
    assert vggt.resident_bytes("VmHWM") - resident < 2 * vggt.MIB
    passing = torch.ones(2**24)
    del passing
    assert vggt.resident_bytes("VmHWM") - resident == pytest.approx(64 * vggt.MIB, abs=4 * vggt.MIB)
    assert before.sum() == 2**24


def test_kept_bytes_count_each_storage_once():
    base = torch.zeros(4, 8)
    assert vggt.storage_bytes([base, base[1:], torch.zeros(2, dtype=torch.float64)]) == 4 * 4 * 8 + 2 * 8


def test_public_config_taps_the_layers_of_the_public_model():
    config = vggt.public_config(vggt.parse_arguments(["--hidden-size", "1024"]))
    assert config["intermediate_layer_idx"] == [4, 11, 17, 23]
    assert config["dpt_out_channels"] == [256, 512, 1024, 1024]
    assert vggt.public_config(vggt.parse_arguments(["--depth", "4"]))["intermediate_layer_idx"] == [0, 1, 2, 3]


@pytest.mark.slow
def test_each_variant_runs_in_a_process_of_its_own():
    command = [sys.executable, "-m", "benchmarks.vggt", *TINY]
    done = subprocess.run(command, cwd=vggt.ROOT, capture_output=True, text=True, check=True)
    rows = done.stdout.splitlines()[2:]
    assert [row[:38].strip() for row in rows] == list(vggt.VARIANTS)
    assert "6/6" in done.stderr


LONG_VIDEO = """
import json, resource, torch
from geode.configuration.configuration_geode import VggtConfig
from geode.modeling_geode.vggt_geode import VggtModel

torch.set_num_threads(1)
torch.manual_seed(0)
sizes = {"hidden_size": 64, "num_hidden_layers": 4, "trunk_num_hidden_layers": 4, "tapped_layers": [0, 1, 2, 3]}
model = VggtModel(VggtConfig(num_attention_heads=4, trunk_num_attention_heads=4, **sizes)).eval()
with torch.no_grad():
    output = model(torch.rand(1, 60, 3, 252, 336))
peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"peak": peak, "shape": list(output.world_points.shape), "chunk": model.config.frames_chunk_size}))
"""


@pytest.mark.slow
def test_a_video_of_sixty_frames_fits_in_8_gb():
    """Narrow trunk, dense heads of the public widths, default chunk size; the peak is that of the whole process."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LONG_VIDEO]
    done = subprocess.run(command, cwd=vggt.ROOT, env=environment, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    assert result["shape"] == [1, 60, 252, 336, 3]
    assert result["chunk"] == 8
    # Far below: 8 GB is for wider models. All frames at once would hold a map of 2.6 GB at full resolution alone.
    assert result["peak"] < 2.5e9
