# SPDX-License-Identifier: Apache-2.0
"""Every recipe is read by its script's parser, and describes its run without weights, data or network."""

import importlib
import re
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file


CONFIGURATION = Path(__file__).resolve().parents[2] / "configuration"
RECIPES = sorted(path for path in (CONFIGURATION / "recipes").rglob("*.yaml") if path.parent.name != "mixtures")
ACCELERATE = sorted((CONFIGURATION / "accelerate").glob("*.yaml"))
ON_CPU = ["--use_cpu", "--bf16", "false"]

# peft still reads the old name of the library's `is_activation_checkpointing`.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def label(path: Path) -> str:
    return path.relative_to(CONFIGURATION).as_posix()


def parse(path: Path, *arguments: str):
    script = importlib.import_module(f"geode.trainers.{path.parent.name}")
    return script, script.make_parser().parse_args_and_config(["--config", str(path), *ON_CPU, *arguments])


def test_every_stage_has_a_recipe():
    assert {path.parent.name for path in RECIPES} == {"alignment", "stage1", "stage2"}


@pytest.mark.parametrize("path", [*RECIPES, *ACCELERATE], ids=label)
def test_file_says_what_it_is_for(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    headings = [line.split(":")[0] for line in lines if re.match(r"# \w+:", line)]
    assert headings[:3] == ["# Purpose", "# Hardware", "# Run"]
    if path in RECIPES:
        assert headings[3] == "# Expect"
    assert label(path).removeprefix("recipes/") in "".join(lines[:5])


@pytest.mark.parametrize("path", RECIPES, ids=label)
def test_recipe_is_read_and_every_value_arrives(path):
    _, parsed = parse(path)
    found = {name: value for part in parsed for name, value in vars(part).items()}
    for name, value in yaml.safe_load(path.read_text("utf-8")).items():
        if name != "bf16":  # switched off here
            assert found[name] == value, name
            assert type(found[name]) is type(value) or name == "lr_scheduler_type", name


@pytest.mark.parametrize("path", RECIPES, ids=label)
def test_recipe_describes_its_run_without_weights_and_data(path, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script, parsed = parse(path, "--dry_run")
    script.main(*parsed)
    report = capsys.readouterr().out
    assert "model: geode-1.5b, by its configuration" in report
    assert re.search(r"data: not found at DATA/.*, [\d,]+ rows expected", report)
    assert re.search(r"steps: at least [\d,]+, in [12] epochs", report)
    assert "an estimate, not measured" in report
    assert list(tmp_path.iterdir()) == []


def test_effective_batches_are_those_of_the_specification(capsys):
    expected = {"alignment": 256, "stage1": 64, "stage2": 128}
    for path in RECIPES:
        if path.stem == "geode_1.5b_8x80gb":
            script, parsed = parse(path, "--dry_run")
            script.main(*parsed)
            assert f"questions, {expected[path.parent.name]} in all (8 devices" in capsys.readouterr().out


@pytest.mark.parametrize("path", ACCELERATE, ids=label)
def test_accelerate_reads_its_file(path):
    config = load_config_from_file(str(path))
    expected = {
        "cpu": "NO",
        "single_gpu": "NO",
        "multi_gpu": "MULTI_GPU",
        "fsdp2": "FSDP",
        "multi_node_fsdp2": "FSDP",
        "zero2": "DEEPSPEED",
        "zero3": "DEEPSPEED",
    }
    assert config.distributed_type.value == expected[path.stem]
    if "fsdp2" in path.stem:
        assert config.fsdp_config["fsdp_version"] == 2
    if "zero" in path.stem:
        assert config.deepspeed_config["zero_stage"] == int(path.stem[-1])


def test_all_accelerate_files_are_there():
    assert len(ACCELERATE) == 7
    script = (CONFIGURATION / "accelerate" / "slurm.sh").read_text("utf-8")
    assert "multi_node_fsdp2.yaml" in script
