# SPDX-License-Identifier: Apache-2.0
"""What all stages share, on stage 2, whose loss has both terms."""

import dataclasses
import json

import pytest
import torch
from peft import LoraConfig

from geode.trainers.alignment_config import GeodeAlignmentConfig
from geode.trainers.alignment_trainer import GeodeAlignmentTrainer
from geode.trainers.base_trainer import EXAMPLES_FILE
from geode.trainers.collator import GeodeDataCollator, exchanged_scenes
from geode.trainers.packing import ScenePacks, scene_key
from geode.trainers.stage1_config import GeodeStage1Config
from geode.trainers.stage1_trainer import GeodeStage1Trainer
from geode.trainers.stage2_config import GeodeStage2Config
from geode.trainers.stage2_trainer import GeodeStage2Trainer
from geode.trainers.training_metrics import MRA_TOLERANCES
from tests.trainers.common_collator import GEOMETRY, make_media, make_model, make_processor, make_records, text_record
from tests.trainers.common_training import settings, steps


STAGES = {
    "alignment": (GeodeAlignmentTrainer, GeodeAlignmentConfig),
    "stage1": (GeodeStage1Trainer, GeodeStage1Config),
    "stage2": (GeodeStage2Trainer, GeodeStage2Config),
    "adapter": (GeodeStage2Trainer, GeodeStage2Config),
}
# peft still reads the old name of the library's `is_activation_checkpointing`.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_media(tmp_path_factory.mktemp("media"))


@pytest.fixture(scope="module")
def processor():
    return make_processor()


@pytest.fixture
def trainer_of(processor, root, tmp_path):
    def trainer_of(records=None, *, model=None, eval_dataset=None, **changes):
        args = GeodeStage2Config(**settings(tmp_path, root, **changes))
        model = make_model(processor) if model is None else model
        return GeodeStage2Trainer(
            model, args, train_dataset=records, eval_dataset=eval_dataset, processing_class=processor
        )

    return trainer_of


def uneven_records(count: int = 16) -> list:
    """Numbers, boxes and texts, so that micro-batches have very different numbers of targets and tokens."""
    records = make_records(count=count)
    texts = [text_record(answer="A room. " * (number + 1), uid=f"text:{number}") for number in range(4)]
    numbers = [record for record in records if record.kind != "choice"]
    return [*numbers[:8], *texts, *numbers[8:], *texts][:count]


def two_scenes() -> list:
    """Questions about two rooms. The second has pictures of another place, but boxes would be those of the first."""
    other = [record for record in make_records("rooms/two", count=9) if record.kind != "box"]
    return [*make_records(count=6), *other[:3]]


# ---- means over the global batch ----


@pytest.mark.parametrize(
    ("batch_size", "accumulation"),
    [(4, 2), *(pytest.param(*pair, marks=pytest.mark.invariant) for pair in ((2, 4), (1, 8)))],
)
def test_accumulated_batch_trains_as_one_large_batch(trainer_of, batch_size, accumulation):
    runs = []
    for size, number in ((8, 1), (batch_size, accumulation)):
        trainer = trainer_of(
            uneven_records(16),
            questions_per_pack=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=number,
            train_sampling_strategy="sequential",
            max_steps=2,
            learning_rate=1.0e-3,
        )
        trainer.train()
        runs.append(steps(trainer))
    names = {"loss", "grad_norm", "loss/ce", "loss/drh", "token_accuracy", "mae/<REG>"}
    for large, small in zip(*runs, strict=True):
        assert names <= large.keys() & small.keys()
        assert {name: small[name] for name in names} == pytest.approx({name: large[name] for name in names}, rel=2e-4)


def test_packed_micro_batches_have_the_loss_of_their_questions(trainer_of, processor, root):
    """Three packs of unequal size, one of them without a value, in three micro-batches: attention masks of four dimensions."""
    records = make_records(count=6)
    packs = [records[:3], [text_record(), text_record(answer="No.", uid="text:1")], records[3:5]]
    trainer = trainer_of(
        packs,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=3,
        train_sampling_strategy="sequential",
        learning_rate=0.0,
    )
    trainer.train()
    model = make_model(processor).train()
    questions = [record for pack in packs for record in pack]
    with torch.no_grad():
        expected = model(**GeodeDataCollator(processor=processor, media_root=root, geometry=GEOMETRY)(questions))
    (step,) = steps(trainer)
    assert step["loss/ce"] == pytest.approx(expected.ce_loss.item(), rel=1e-4)
    assert step["loss/drh"] == pytest.approx(expected.regression_loss.item(), rel=1e-4)
    assert step["loss"] == pytest.approx(expected.loss.item(), rel=1e-4)


def test_step_without_values_has_no_regression_loss(trainer_of):
    trainer = trainer_of([text_record(), text_record(answer="No.", uid="text:1")], questions_per_pack=1)
    trainer.train()
    (step,) = steps(trainer)
    assert "loss/drh" not in step
    assert step["loss"] == pytest.approx(step["loss/ce"])


# ---- a run that had ended ----


def test_resuming_a_run_that_had_ended_makes_no_step(trainer_of, tmp_path):
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 3, "learning_rate": 1.0e-2}
    first = trainer_of(uneven_records(16), **options)
    first.train()
    again = trainer_of(uneven_records(16), **options)
    result = again.train(resume_from_checkpoint=True)
    assert (result.global_step, again.state.global_step) == (3, 3)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    for one, other in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


# ---- mixed precision ----


@pytest.mark.parametrize("stage", ["alignment", "stage1", "stage2", "adapter"])
def test_run_in_bf16_is_near_one_in_float32(processor, root, tmp_path, stage):
    """As every recipe for accelerators asks for: autocast, activation checkpoints, an evaluation that generates."""
    trainer_class, config_class = STAGES[stage]
    options = {"peft_config": LoraConfig(r=2, task_type="CAUSAL_LM")} if stage == "adapter" else {}
    records = make_records(count=6)
    if stage == "stage1":
        records = [text_record(uid=f"text:{number}", rationale=f"Because of {number}.") for number in range(4)]
    runs = []
    for is_half in (False, True):
        changes = {"bf16": is_half, "activation_checkpointing": True, "max_steps": 2, "num_eval_examples": 1}
        trainer = trainer_class(
            make_model(processor),
            config_class(**settings(tmp_path / str(is_half), root, **changes)),
            train_dataset=records,
            eval_dataset=records,
            processing_class=processor,
            **options,
        )
        trainer.train()
        losses = [step["loss"] for step in steps(trainer)]
        runs.append([*losses, trainer.evaluate()["eval_loss"]])
        assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    whole, half = runs
    assert half != whole
    assert half == pytest.approx(whole, rel=2e-2)


# ---- what is logged ----


def test_logged_metrics_are_those_of_all_batches_of_the_window_together(trainer_of, processor, root):
    records = uneven_records(8)
    trainer = trainer_of(
        records,
        questions_per_pack=1,
        train_sampling_strategy="sequential",
        max_steps=4,
        logging_steps=4,
        learning_rate=0.0,
        drh_learning_rate=1.0e-30,
    )
    trainer.train()
    (entry,) = steps(trainer)
    batch = GeodeDataCollator(processor=processor, media_root=root, geometry=GEOMETRY)(records)
    with torch.no_grad():
        outputs = make_model(processor).train()(**batch)
    learned = batch["labels"][:, 1:] != -100
    right = (outputs.logits[:, :-1].argmax(-1) == batch["labels"][:, 1:])[learned]
    assert entry["token_accuracy"] == pytest.approx(right.double().mean().item())
    assert entry["loss/ce"] == pytest.approx(outputs.ce_loss.item(), rel=1e-4)
    assert entry["loss/drh"] == pytest.approx(outputs.regression_loss.item(), rel=1e-4)
    errors, shares = [], []
    for row, column in (batch["input_ids"] == processor.control_tokens["<REG>"]["token_id"]).nonzero().tolist():
        value, target = (
            tensor[row, column, 0].item() for tensor in (outputs.regression_values, batch["regression_targets"])
        )
        errors.append(abs(value - target))
        shares.append(sum(abs(value - target) / target <= tolerance for tolerance in MRA_TOLERANCES) / 10)
    assert len(errors) == 3
    assert entry["mae/<REG>"] == pytest.approx(sum(errors) / len(errors), rel=1e-4)
    assert entry["mra/<REG>"] == pytest.approx(sum(shares) / len(shares))


def test_evaluation_is_a_mean_over_the_set_not_of_its_batches(trainer_of, processor, root):
    records = uneven_records(7)
    trainer = trainer_of([text_record()], eval_dataset=records, questions_per_pack=1)
    metrics = trainer.evaluate()
    batch = GeodeDataCollator(processor=processor, media_root=root, geometry=GEOMETRY)(records)
    with torch.no_grad():
        expected = make_model(processor).eval()(**batch)
    assert metrics["eval_loss"] == pytest.approx(expected.loss.item(), rel=1e-4)
    assert metrics["eval_loss/drh"] == pytest.approx(expected.regression_loss.item(), rel=1e-4)
    assert "eval_mae/<REG>" in metrics
    assert not any("shuffled" in name for name in metrics)


def test_evaluation_within_training_leaves_the_training_window_alone(trainer_of):
    logs = []
    for strategy in ("no", "steps"):
        trainer = trainer_of(
            uneven_records(4), eval_dataset=[text_record()], eval_strategy=strategy, eval_steps=1, max_steps=2
        )
        trainer.train()
        logs.append([entry["token_accuracy"] for entry in steps(trainer)])
    assert logs[0] == logs[1]


def test_best_checkpoint_can_be_chosen_by_relative_accuracy(trainer_of, tmp_path):
    trainer = trainer_of(
        make_records(count=3),
        eval_dataset=make_records(count=3),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        max_steps=2,
        metric_for_best_model="mra/<REG>",
        greater_is_better=True,
        load_best_model_at_end=True,
    )
    trainer.train()
    values = [entry["eval_mra/<REG>"] for entry in trainer.state.log_history if "eval_mra/<REG>" in entry]
    assert trainer.state.best_metric == max(values)
    assert (tmp_path / "checkpoint-2" / "model.safetensors").is_file()


def test_several_sets_are_evaluated_under_their_names(trainer_of):
    trainer = trainer_of([text_record()], eval_dataset={"a": [text_record()], "b": make_records(count=2)})
    metrics = trainer.evaluate()
    assert {"eval_a_loss", "eval_b_loss", "eval_b_mae/<REG>"} <= metrics.keys()
    assert "eval_a_mae/<REG>" not in metrics


# ---- the gate ----


def test_exchanged_scenes_are_never_the_own_ones():
    records = [*two_scenes(), text_record(media="rooms/three.mp4", uid="x")]
    exchanged = exchanged_scenes(records)
    assert len(exchanged) == 3
    assert all(scene_key(record) != key for key, record in exchanged.items())
    assert exchanged_scenes(make_records(count=3)) == {}
    assert exchanged_scenes([*records, text_record(media="a.png", media_type="image")]) == {}


def test_shuffled_evaluation_shows_other_scenes_and_keeps_the_targets(trainer_of, processor, root):
    records = two_scenes()
    trainer = trainer_of([text_record()], eval_dataset=records, shuffled_scene_gate=True, questions_per_pack=1)
    metrics = trainer.evaluate()
    # By hand: the same questions, with the other room's paths; targets are those of the true scenes.
    collator = GeodeDataCollator(processor=processor, media_root=root, geometry=GEOMETRY)
    other = {"rooms/one.mp4": "rooms/two", "rooms/two": "rooms/one.mp4"}
    moved = [dataclasses.replace(record, media=other[record.media]) for record in records]
    model, ce, tokens, drh, values = make_model(processor).eval(), 0.0, 0, 0.0, 0
    for record, shown in zip(records, moved, strict=True):
        truth, batch = collator([record]), collator([shown])
        assert batch["input_ids"].shape[1] != truth["input_ids"].shape[1]  # three frames against four
        targets = truth["regression_targets"][~truth["regression_targets"].isnan().all(-1)]
        is_target = ~batch["regression_targets"].isnan().all(-1)
        batch["regression_targets"][is_target] = targets
        with torch.no_grad():
            outputs = model(**batch, num_regression_targets=1)
        count = int((batch["labels"][:, 1:] != -100).sum())
        ce, tokens = ce + outputs.ce_loss.item() * count, tokens + count
        drh, values = drh + outputs.regression_loss.item(), values + int(is_target.sum())
    assert metrics["eval_shuffled_loss/ce"] == pytest.approx(ce / tokens, rel=1e-4)
    assert metrics["eval_shuffled_loss/drh"] == pytest.approx(drh / values, rel=1e-4)
    assert metrics["eval_shuffled_loss"] != pytest.approx(metrics["eval_loss"], rel=1e-4)
    assert "eval_shuffled_mra/<REG>" in metrics


# ---- examples and the card ----


def test_answers_are_generated_at_evaluation(trainer_of, tmp_path):
    trainer = trainer_of([text_record()], eval_dataset=two_scenes(), num_eval_examples=3, max_new_tokens=4)
    trainer.evaluate()
    lines = [json.loads(line) for line in (tmp_path / EXAMPLES_FILE).read_text("utf-8").splitlines()]
    assert [sorted(line) for line in lines] == [["answer", "expected", "question", "set", "step", "uid"]] * 3
    assert len({line["uid"] for line in lines}) == 3


def test_expected_box_is_in_the_frame_of_its_scene(processor, root):
    record = next(record for record in make_records("rooms/two", count=3) if record.kind == "box")
    collator = GeodeDataCollator(processor=processor, media_root=root, geometry=GEOMETRY)
    x, y, z = record.box[:3]
    center = json.loads(collator.expected_answer(record))[:3]
    assert center == pytest.approx([10 - y, 20 + x, 30 + z], abs=1e-3)  # a quarter turn, then the shift
    digits = dataclasses.replace(collator, with_values=False)
    assert digits.expected_answer(record) == record.answer_text


def test_card_says_what_was_done_and_what_was_not(trainer_of, tmp_path):
    trainer = trainer_of([text_record()])
    trainer.train()
    trainer.create_model_card(model_name="a room model", dataset_name="rooms")
    card = (tmp_path / "README.md").read_text("utf-8")
    assert "Not evaluated." in card
    assert "- Data: `rooms`" in card
    assert "# a room model" in card
    trainer.eval_dataset = trainer._eval_packs(make_records(count=2), trainer.args)
    metrics = trainer.evaluate()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text("utf-8")
    assert f"| `eval_mae/<REG>` | {metrics['eval_mae/<REG>']:.4g} |" in card
    assert "Not evaluated" not in card


# ---- data ----


def test_mixture_is_read_packed_and_found_below_its_media_root(processor, root, tmp_path):
    rows = [
        {"media": "rooms/one.mp4", "prompt": f"How long is object {number}?", "answer": number + 1, "unit": "m"}
        for number in range(5)
    ]
    data = tmp_path / "data"
    (data / "mine").mkdir(parents=True)
    (data / "media").symlink_to(root)
    (data / "mine" / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (data / "mine.yaml").write_text("sources:\n  - {reader: jsonl, path: mine, media_root: media}\n", encoding="utf-8")
    options = settings(tmp_path / "out", root, questions_per_pack=3, per_device_train_batch_size=1, max_steps=2)
    options |= {"media_root": None, "data_root": str(data), "mixture": str(data / "mine.yaml")}
    args = GeodeStage2Config(**options, eval_mixture=str(data / "mine.yaml"), cache_dir=str(tmp_path / "cache"))
    trainer = GeodeStage2Trainer(make_model(processor), args, processing_class=processor)
    trainer.train()
    assert isinstance(trainer.train_dataset, ScenePacks)
    assert sorted(len(pack) for pack in trainer.train_dataset) == [2, 3]
    assert trainer.evaluate()["eval_mae/<REG>"] > 0
    assert all("mae/<REG>" in entry for entry in steps(trainer))


def test_nothing_to_train_on_is_an_error(trainer_of):
    with pytest.raises(ValueError, match="nothing to train on: give `train_dataset`, or name a `mixture`"):
        trainer_of()


def test_several_devices_in_one_process_are_refused(processor, root, tmp_path, monkeypatch):
    args = GeodeStage2Config(**settings(tmp_path, root))
    monkeypatch.setattr(type(args), "n_gpu", 4)
    with pytest.raises(ValueError, match="must have one device, got 4"):
        GeodeStage2Trainer(make_model(processor), args, train_dataset=[text_record()], processing_class=processor)


def test_nothing_is_reported_to_anyone(trainer_of, monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    sent = []
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda **facts: sent.append(facts))
    trainer_of([text_record()])
    assert sent == []
