# SPDX-License-Identifier: Apache-2.0
"""The run on the embedded world: its stages come in order, once, and go on after an interruption."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from geode.data.mixtures import Mixture
from geode.data.schemas import Record
from geode.data.synthetic_rooms.dataset import build_dataset
from geode.data.synthetic_rooms.questions import QUESTION_TYPES
from geode.modeling_geode.modeling_geode import GeodeForConditionalGeneration
from geode.modeling_geode.processing_geode import GeodeProcessor
from geode.trainers import world as module
from geode.trainers.world import (
    CURRICULUM,
    STAGES,
    STEPS,
    World,
    curriculum_trainer,
    find_checkpoint,
    recipe_of,
    run_stages,
)
from geode.trainers.world_card import build_world_card
from geode.trainers.world_mentions import MentionTrainer


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


def test_run_of_other_steps_or_seed_is_refused(world):
    """Its card would say what was not done."""
    run_stages(world, [])
    run_stages(replace(world), [])
    for other, what in (
        (replace(world, scale=1.0), r"steps: \{"),
        (replace(world, seed=1), r"seed: 0 there, 1 now\)"),
    ):
        with pytest.raises(ValueError, match=rf"out holds another run \({what}.* Ask for the same"):
            run_stages(other, [])


def test_curriculum_asks_rare_questions_as_often_as_it_says(world, monkeypatch):
    def record(question_type: str, scene: str) -> Record:
        plain = {
            "source": "rooms",
            "media_type": "video",
            "media": f"rooms/{scene}.mp4",
            "prompt": "?",
            "kind": "text",
        }
        return Record(uid=question_type, question_type=question_type, scene=scene, answer_text="", **plain)

    world.records = [record(name, world.train_scenes[0]) for name in QUESTION_TYPES]
    held_out, other = world.held_out_scenes[0], "room_000009"
    asked = [record(name, scene) for name in QUESTION_TYPES for scene in (held_out, other)]
    monkeypatch.setattr(World, "questions", lambda *_: asked)
    for stage, times in CURRICULUM.items():
        found = curriculum_trainer(
            world, stage, None, None, output_dir=world.out / stage, trainer_class=lambda *args, **options: options
        )
        counts = Counter(record.question_type for record in found["train_dataset"])
        assert counts == Counter(times)
        # An evaluation asks each once, of held-out rooms alone.
        assert {record.scene for record in found["eval_dataset"]} == {held_out}
        assert Counter(record.question_type for record in found["eval_dataset"]) == Counter(dict.fromkeys(times, 1))


def test_curriculum_learns_what_questions_about_training_rooms_name(world, monkeypatch):
    made = {}

    class Trainer:
        data_collator, geode_model = "batches", "model"
        train = evaluate = end = lambda self, **options: {"loss": 1.0}

    def make(*given, **options):
        made["options"], made["trainer"] = options, Trainer()
        return made["trainer"]

    monkeypatch.setattr(World, "load", lambda *given: ("model", "processor"))
    monkeypatch.setattr(World, "save", lambda *given: None)
    monkeypatch.setattr(World, "train_scenes", ["room_1", "room_2"])
    box = [1.0, 2.0, 0.5, 1.0, 1.0, 1.0, 0.0]
    scene = {"objects": [{"category": "bed", "box": box}]}
    monkeypatch.setattr(module, "read_scene_record", lambda folder, name: scene)
    monkeypatch.setattr(module, "curriculum_trainer", make)
    monkeypatch.setattr(module, "MentionCollator", lambda *given: given)
    assert module.train_curriculum(world, "measure", source="locate", drm_path="drm") == {"loss": 1.0}
    assert made["options"] == {
        "output_dir": world.out / "measure",
        "trainer_class": MentionTrainer,
        "drm_path": "drm",
    }
    assert made["trainer"].data_collator == ("batches", {"room_1": {"bed": box}, "room_2": {"bed": box}})


def test_curriculum_has_the_rationale_module_of_stage_1(world, monkeypatch):
    calls = {}
    monkeypatch.setattr(module, "train_curriculum", lambda _, stage, **options: calls.update({stage: options}))
    monkeypatch.setattr(module, "run_recipe", lambda _, stage, **options: calls.update({stage: options}))
    for stage in ("stage1", "locate", "measure", "stage2"):
        module.RUNS[stage](world)
    assert calls["stage1"] == {"source": "alignment"}
    assert calls["locate"] == {"source": "alignment", "drm_path": str(world.out / "stage1")}
    assert calls["measure"] == {"source": "locate"}
    assert calls["stage2"] == {"source": "measure", "drm_path": world.out / "stage1"}


@pytest.mark.slow
def test_whole_run_on_a_few_rooms(tmp_path):
    """Every stage for real, a few steps each, from rooms to the card; what is there is not done again."""
    pytest.importorskip("embreex", reason="rendering needs embreex, the extra `world`")
    size = dict(image_size=(60, 80), num_frames=16, depth_size=(24, 32), max_points=2048, show_progress=False)
    build_dataset(tmp_path / "data" / "rooms", num_scenes=20, num_workers=1, **size)
    world = World(data=tmp_path / "data", out=tmp_path / "out", scale=0.001)
    run_stages(world, STAGES)
    folder = world.out / "checkpoint"
    facts = json.loads((folder / "facts.json").read_text("ascii"))
    assert facts["train_scenes"] == 16
    assert (folder / "README.md").read_text("ascii") == build_world_card(facts)
    parts, lookup, aligned, final = (
        world.load(name)[0].state_dict() for name in ("parts", "lookup", "alignment", "stage2")
    )
    for name, tensor in final.items():
        if name.startswith(("model.vision_tower", "model.point_encoder")):
            assert tensor.equal(parts[name]), name
    trained = load_file(world.out / "stage1" / "drm.safetensors")
    assert all(
        any(name.endswith(key) and tensor.equal(final[name]) for name in final) for key, tensor in trained.items()
    )
    assert any(not lookup[name].equal(parts[name]) for name in lookup if ".drm." in name)
    assert all(aligned[name].equal(lookup[name]) for name in lookup if ".drm." in name)
    assert not list(folder.glob("*.py"))
    model = GeodeForConditionalGeneration.from_pretrained(folder)
    assert GeodeProcessor.from_pretrained(folder).num_rationale_tokens == 16
    assert model.num_parameters() == facts["parameters"]
    assert model.config.drh_config.uncertainty
    scales = {token: entry["scale"] for token, entry in facts["calibration"]["tokens"].items()}
    assert model.config.drh_config.interval_scales == scales
    before = {path: path.stat().st_mtime_ns for path in world.out.rglob("*.json")}
    run_stages(world, STAGES)
    assert before == {path: path.stat().st_mtime_ns for path in world.out.rglob("*.json")}


def test_every_stage_has_a_run_and_its_recipe_and_steps(world):
    assert set(module.RUNS) == set(STAGES)
    for stage in ("alignment", "stage1", "stage2"):
        recipe = yaml.safe_load(Path(recipe_of(stage)).read_text("utf-8"))
        assert recipe["mixture"] == "rooms"
        assert "max_steps" not in recipe
        assert world.steps(stage) == max(2, round(0.01 * STEPS[stage]))
    for stage, times in CURRICULUM.items():
        assert stage in STAGES
        assert set(times) <= set(QUESTION_TYPES)
        assert min(times.values()) >= 1
    # Localisation comes first.
    assert set(CURRICULUM["locate"]) == {"object_localization"}
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
