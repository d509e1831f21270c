# SPDX-License-Identifier: Apache-2.0
"""The run on the embedded world: its stages come in order, once, and go on after an interruption."""

import json
from pathlib import Path

import pytest
import yaml

from geode.data.mixtures import Mixture
from geode.data.synthetic_rooms.questions import QUESTION_TYPES
from geode.trainers import world as module
from geode.trainers.world import CURRICULUM, STAGES, STEPS, World, find_checkpoint, recipe_of, run_stages


@pytest.fixture
def world(tmp_path) -> World:
    (tmp_path / "data" / "rooms" / "depth").mkdir(parents=True)
    for number in range(800):
        (tmp_path / "data" / "rooms" / "depth" / f"room_{number:06d}.safetensors").touch()
    (tmp_path / "out").mkdir()
    return World(data=tmp_path / "data", out=tmp_path / "out", scale=0.01)


def test_stages_run_in_order_and_once(world, monkeypatch):
    calls = []

    def run(name):
        def stage(given):
            calls.append(name)
            if len(calls) == 3:
                raise RuntimeError("killed")
            return {"loss": len(calls)}

        return stage

    monkeypatch.setattr(module, "RUNS", {name: run(name) for name in STAGES})
    with pytest.raises(RuntimeError, match="killed"):
        run_stages(world, STAGES)
    run_stages(world, STAGES)
    # The third was not finished, so it came again.
    assert calls == [*STAGES[:3], *STAGES[2:]]
    facts = json.loads((world.out / f"{STAGES[1]}.json").read_text("ascii"))
    assert facts["loss"] == 2
    assert facts["seconds"] >= 0


def test_every_stage_has_a_run_and_its_recipe_and_steps(world):
    assert set(module.RUNS) == set(STAGES)
    for stage in ("alignment", "stage1", "stage2"):
        recipe = yaml.safe_load(Path(recipe_of(stage)).read_text("utf-8"))
        assert recipe["mixture"] == "rooms"
        assert "max_steps" not in recipe
        assert world.steps(stage) == max(2, round(0.01 * STEPS[stage]))
    for stage, types in CURRICULUM.items():
        assert stage in STAGES
        assert set(types) <= set(QUESTION_TYPES)
    # Localisation comes first.
    assert CURRICULUM["locate"] == ("object_localization",)
    assert STAGES.index("lookup") < STAGES.index("locate") < STAGES.index("measure") < STAGES.index("stage2")
    # The frozen language model must still know the words of a rationale.
    assert STAGES.index("alignment") < STAGES.index("stage1") < STAGES.index("locate")


def test_held_out_mixture_is_a_share_of_the_validation_split(world):
    (source,) = Mixture.from_yaml(world.held_out_mixture()).sources
    assert source.data_files == ["questions/validation.parquet"]
    assert source.fraction == 0.5  # 40 of 80 scenes
    assert len(world.held_out_scenes) == 40
    assert not set(world.held_out_scenes) & set(world.train_scenes)


def test_find_checkpoint_takes_the_last(tmp_path):
    assert find_checkpoint(tmp_path / "absent") is None
    assert find_checkpoint(tmp_path) is None
    for step in (9, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert find_checkpoint(tmp_path) == str(tmp_path / "checkpoint-100")
