# SPDX-License-Identifier: Apache-2.0
"""Each example is run as its README says, offline, on the shipped room and checkpoint."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

import geode
from geode import GeodeForConditionalGeneration, SceneGeometry
from geode.hub_cards.check import check_files


EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
ROW = re.compile(r"^\| `(\w+\.py)` \| .+ \| `python examples/(.+)` \| `(.+)` \|$", flags=re.MULTILINE)
TABLE = {name: (command, last) for name, command, last in ROW.findall((EXAMPLES / "README.md").read_text())}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run an example in an empty folder, and return what it prints; its last line must be the one that the README shows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)  # as for a script
    monkeypatch.delitem(sys.modules, "sample_data", raising=False)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def run(name: str, *options: str) -> str:
        assert TABLE[name][0] == name
        monkeypatch.setattr(sys, "argv", [name, *options])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        text = capsys.readouterr().out
        want = re.sub(r"\b[XY]\b", r"\\d+\\.\\d", re.escape(TABLE[name][1]))
        assert re.fullmatch(want, text.splitlines()[-1])
        return text

    return run


def test_every_example_is_in_the_table_and_short():
    scripts = {path.name: path.read_text() for path in EXAMPLES.glob("*.py")}
    assert set(TABLE) == set(scripts) - {"sample_data.py"}
    assert {name: len(text.splitlines()) for name, text in scripts.items() if len(text.splitlines()) > 60} == {}


def test_a_video_is_asked(run):
    text = run("ask_video.py")
    (count,) = re.findall(r"^  (\S+) count$", text, flags=re.MULTILINE)
    (area,) = re.findall(r"^  (\S+) m2$", text, flags=re.MULTILINE)
    assert float(count) == round(float(count)) >= 0
    assert float(area) > 0
    assert re.search(r"^  center \(.+\), size \(.+\), yaw ", text, flags=re.MULTILINE)


def test_without_geometry_it_is_said_that_the_answer_is_a_guess(run, tmp_path):
    (tmp_path / "room.mp4").write_bytes((geode.embedded_scene() / "room.mp4").read_bytes())
    asked = ["--question", "How many chairs are in this room?"] * 3
    assert "note: no geometry for room.mp4" in run("ask_video.py", "room.mp4", *asked)


def test_a_scan_on_disk_becomes_the_geometry_of_the_room(run):
    run("own_rgbd.py")
    made, want = SceneGeometry.load("example-rgbd/geometry"), SceneGeometry.load(geode.embedded_scene() / "geometry")
    assert made.is_metric
    assert made.gravity == "estimated"
    # The shipped geometry was made from the same depth with +z as up, and thinned by another grid.
    distance = torch.cdist(made.points[::20].double(), want.points.double()).amin(dim=1)
    assert distance.median() < 0.05
    assert distance.quantile(0.99) < 0.2


def test_a_model_is_evaluated_seeing_and_blind(run):
    seeing, blind = map(float, re.findall(r"\d+\.\d", run("evaluate_model.py").splitlines()[-1]))
    for name, total in (("seeing", seeing), ("blind", blind)):
        scores = json.loads((Path("example-results") / name / "scores.json").read_text())
        assert scores["run"]["control"] == ("none" if name == "seeing" else "blind")
        assert round(scores["tasks"]["overall"], 1) == total
        assert (Path("example-results") / name / "README.md").is_file()


def test_a_folder_is_published(run):
    text = run("publish.py")
    assert "the whole: apache-2.0\n" in text
    assert check_files(Path("example-export")) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_rows_of_ones_own_are_learnt_by_an_adapter(run):
    text = run("finetune_lora.py")
    first, last = map(
        float, re.search(r"^loss: (\S+) in the first step, (\S+) in the last$", text, re.MULTILINE).groups()
    )
    assert last < first / 2
    assert Path("example-lora/adapter/adapter_model.safetensors").is_file()
    model = GeodeForConditionalGeneration.from_pretrained("example-lora/merged")
    base = GeodeForConditionalGeneration.from_pretrained(geode.tiny_checkpoint())
    weights = [each.state_dict()["model.language_model.layers.0.self_attn.q_proj.weight"] for each in (base, model)]
    assert not torch.equal(*weights)
