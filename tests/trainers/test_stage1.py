# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, BertConfig, BertModel

from geode.modeling_geode.modeling_geode import GeodeForConditionalGeneration
from geode.trainers.drm_files import load_drm
from geode.trainers.stage1_config import GeodeStage1Config
from geode.trainers.stage1_trainer import PROJECTION_FILE, GeodeStage1Trainer, info_nce, same_scenes
from tests.trainers.common_collator import make_media, make_model, make_processor, make_records, text_record
from tests.trainers.common_training import changed, settings, snapshot, steps


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_media(tmp_path_factory.mktemp("media"))


@pytest.fixture(scope="module")
def processor():
    return make_processor()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory, processor):
    """A small random text encoder, with a tokenizer of its own folder."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    size = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=len(processor.tokenizer), **size)).save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).pad_token is not None
    return str(folder)


def rationales(count: int = 6, media: str = "rooms/one.mp4") -> list:
    return [
        text_record(media=media, uid=f"{media}:{number}", rationale=f"Because {number} is {'near ' * (number + 1)}it.")
        for number in range(count)
    ]


@pytest.fixture
def trainer_of(processor, root, tmp_path):
    def trainer_of(records=None, *, folder="out", model=None, eval_dataset=None, **changes):
        args = GeodeStage1Config(**settings(tmp_path / folder, root, **changes))
        return GeodeStage1Trainer(
            make_model(processor) if model is None else model,
            args,
            train_dataset=rationales() if records is None else records,
            eval_dataset=eval_dataset,
            processing_class=processor,
        )

    return trainer_of


@pytest.mark.parametrize("is_checkpointing", [False, True])
def test_rationale_module_alone_changes_and_the_loss_falls(trainer_of, is_checkpointing):
    trainer = trainer_of(max_steps=10, learning_rate=3.0e-3, activation_checkpointing=is_checkpointing)
    before = snapshot(trainer.model)
    trainer.train()
    drm = {name for name in before if name.startswith("model.drm.")}
    assert {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad} == drm
    # These scenes have cameras and a known scale, of which the logarithm is 0.
    names = ("no_camera_token", "unknown_scale_token", "scale_projection.weight")
    unused = {f"model.drm.context_encoder.{name}" for name in names}
    assert drm - unused <= changed(before, trainer.model) <= drm
    losses = [entry["loss"] for entry in steps(trainer)]
    assert sum(losses[-3:]) < 0.97 * sum(losses[:3])
    assert not any(layer.self_attn.training for layer in trainer.model.model.language_model.layers)
    assert trainer.model.model.drm.training


def test_checkpointing_changes_no_loss(trainer_of):
    runs = []
    for is_checkpointing in (False, True):
        trainer = trainer_of(max_steps=2, activation_checkpointing=is_checkpointing)
        trainer.train()
        runs.append([(entry["loss"], entry["grad_norm"]) for entry in steps(trainer)])
    assert runs[0] == [pytest.approx(pair, rel=1e-5) for pair in runs[1]]


def test_frames_reach_the_language_model_only_through_the_module(trainer_of, processor):
    trainer = trainer_of()
    batch = trainer.data_collator([rationales()[:1]])
    assert not (batch["input_ids"] == processor.image_token_id).any()
    assert int((batch["input_ids"] == processor.rationale_token_id).sum()) == processor.num_rationale_tokens
    text = processor.tokenizer.decode(batch["labels"][batch["labels"] != -100])
    assert text == "Because 0 is near it.<|im_end|>"
    shown = trainer_of(keep_visual_tokens=True).data_collator([rationales()[:1]])
    assert (shown["input_ids"] == processor.image_token_id).any()


def test_number_of_tokens_is_drawn_for_each_batch_and_the_same_again(trainer_of, processor):
    trainer = trainer_of(sample_num_rationale_tokens=[1, 3, 8])
    token_id = processor.rationale_token_id

    def drawn(collator):
        return [int((collator([[record]])["input_ids"] == token_id).sum()) for record in rationales(12)]

    numbers = drawn(trainer.data_collator)
    assert set(numbers) == {1, 3, 8}
    assert drawn(dataclasses.replace(trainer.data_collator)) == numbers
    assert drawn(dataclasses.replace(trainer.data_collator, seed=1)) != numbers
    assert drawn(trainer.eval_collator) == [8] * 12
    with pytest.raises(ValueError, match=r"from 1 to 8, .* got \[4, 16\]"):
        trainer_of(sample_num_rationale_tokens=[4, 16])


def test_records_without_a_rationale_are_left_out(trainer_of):
    records = [*rationales(2), *make_records(count=3), text_record(uid="answer"), text_record(uid="turns", turns=2)]

    def uids(trainer):
        return sorted(record.uid for pack in trainer.train_dataset for record in pack)

    assert uids(trainer_of(records)) == ["answer", "rooms/one.mp4:0", "rooms/one.mp4:1"]
    assert uids(trainer_of(records, rationale_from_answer=False)) == ["rooms/one.mp4:0", "rooms/one.mp4:1"]
    with pytest.raises(ValueError, match="none of 3 has one"):
        trainer_of(make_records(count=3))


def test_evaluation_generates_rationales(trainer_of, tmp_path):
    trainer = trainer_of(eval_dataset=rationales(3), num_eval_examples=1, max_new_tokens=4)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_loss/ce"])
    (line,) = (tmp_path / "out" / "eval_examples.jsonl").read_text("utf-8").splitlines()
    assert json.loads(line)["expected"] == "Because 0 is near it."


# ---- checkpoints ----


def test_checkpoint_and_result_hold_the_module_alone(trainer_of, tmp_path):
    trainer = trainer_of(save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model()
    drm = dict(trainer.model.model.drm.state_dict())
    for folder in (tmp_path / "out" / "checkpoint-1", tmp_path / "out"):
        saved = load_file(folder / "drm.safetensors")
        assert saved.keys() == drm.keys()
        assert all(torch.equal(saved[name], drm[name]) for name in drm)
        assert not list(folder.glob("model*.safetensors"))
        origin = json.loads((folder / "stage1.json").read_text("utf-8"))
        assert origin["drm_config"]["num_rationale_tokens"] == 8
        assert set(origin["encoders"]) == {"point_encoder", "vision_tower"}
    assert (tmp_path / "out" / "checkpoint-1" / "trainer_state.json").is_file()
    # Weights and the two moments of Adam: everything else is small.
    size = sum(file.stat().st_size for file in (tmp_path / "out" / "checkpoint-1").iterdir())
    assert size < 1.2 * 3 * sum(tensor.nbytes for tensor in drm.values())


def test_full_model_is_saved_if_asked_for(trainer_of, tmp_path, encoder):
    options = {"alignment_loss_weight": 0.5, "rationale_encoder_name_or_path": encoder}
    trainer = trainer_of(save_full_model=True, **options)
    trainer.train()
    trainer.save_model()
    loaded = GeodeForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.model.drm.queries, trainer.model.model.drm.queries)
    assert not any("alignment_projection" in name for name in load_file(tmp_path / "out" / "model.safetensors"))


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_resumed_run_goes_on_as_the_uninterrupted_one(trainer_of, tmp_path, encoder, weight):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1.0e-3}
    if weight:
        options |= {"alignment_loss_weight": weight, "rationale_encoder_name_or_path": encoder}
        # Both scenes in every batch: rows of one scene are no contrast.
        options |= {"questions_per_pack": 1, "per_device_train_batch_size": 6}
    records = [*rationales(4), *rationales(4, "rooms/two")]
    whole = trainer_of(records, folder="whole", **options)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert (checkpoint / PROJECTION_FILE).is_file() is bool(weight)
    resumed = trainer_of(records, folder="resumed", **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert steps(resumed)[2:] == steps(whole)[2:]
    for name, tensor in whole.model.model.drm.state_dict().items():
        assert torch.equal(tensor, resumed.model.model.drm.state_dict()[name]), name


def test_best_module_is_loaded_at_the_end(trainer_of):
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    # At this rate the loss goes up and down.
    trainer = trainer_of(
        eval_dataset=rationales(2),
        load_best_model_at_end=True,
        learning_rate=0.3,
        metric_for_best_model="loss",
        **options,
    )
    trainer.train()
    values = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(values), rel=1e-4)


def test_module_does_not_load_into_another_model(trainer_of, processor, tmp_path):
    trainer = trainer_of()
    trainer.save_model()
    model = make_model(processor)
    model.model.drm.queries.data.zero_()
    load_drm(model, tmp_path / "out" / "drm.safetensors")
    assert torch.equal(model.model.drm.queries, trainer.model.model.drm.queries)
    model.config.drm_config.num_rationale_tokens = 4
    with pytest.raises(
        ValueError, match=r"does not fit this model: `drm_config.num_rationale_tokens` 4 instead of the stored 8"
    ):
        load_drm(model, tmp_path / "out")
    model.config.drm_config.num_rationale_tokens = 8
    model.model.vision_tower.embeddings.cls_token.data.add_(1)
    with pytest.raises(ValueError, match=r"`encoders\.vision_tower`"):
        load_drm(model, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"result of stage 1, and there is no .*drm\.safetensors"):
        load_drm(model, tmp_path)


# ---- the InfoNCE term ----


def info_nce_by_hand(queries, keys, temperature, is_same):
    def similarity(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b) / temperature

    losses = []
    for row in range(len(queries)):
        others = [number for number in range(len(queries)) if number == row or not is_same[row][number]]
        there = [math.exp(similarity(queries[row], keys[number])) for number in others]
        back = [math.exp(similarity(queries[number], keys[row])) for number in others]
        own = math.exp(similarity(queries[row], keys[row]))
        losses.append(-0.5 * (math.log(own / sum(there)) + math.log(own / sum(back))))
    return losses


def test_info_nce_is_that_of_the_loop():
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(2, 4, 5, generator=generator)
    is_same = torch.eye(4, dtype=torch.bool)
    is_same[0, 2] = is_same[2, 0] = True
    for same in (torch.eye(4, dtype=torch.bool), is_same):
        expected = info_nce_by_hand(queries.tolist(), keys.tolist(), 0.3, same.tolist())
        assert info_nce(queries, keys, temperature=0.3, is_same=same).tolist() == pytest.approx(expected, rel=1e-4)
    assert info_nce(queries, queries, temperature=0.01).max() < 1e-3


def test_same_scenes_are_told_by_their_points():
    points = torch.tensor([[[[0.0, 1, 2]]], [[[3.0, 4, 5]]], [[[0.0, 1, 2]]]])
    expected = [[True, False, True], [False, True, False], [True, False, True]]
    assert same_scenes({"point_coords": points}).tolist() == expected
    assert same_scenes({"input_ids": points}) is None


def test_term_is_added_to_the_loss_and_trains_the_projection(trainer_of, encoder):
    records = [*rationales(2), *rationales(2, "rooms/two")]
    options = {"per_device_train_batch_size": 4, "questions_per_pack": 1, "learning_rate": 1.0e-3, "max_steps": 1}
    plain = trainer_of(records, **options)
    plain.train()
    options |= {"alignment_loss_weight": 0.5, "rationale_encoder_name_or_path": encoder}
    trainer = trainer_of(records, **options)
    before = snapshot(trainer.model)
    encoder_before = snapshot(trainer.rationale_encoder)
    trainer.train()
    (without,), (entry,) = steps(plain), steps(trainer)
    assert entry["loss/ce"] == pytest.approx(without["loss/ce"], rel=1e-5)
    assert entry["loss"] == pytest.approx(entry["loss/ce"] + 0.5 * entry["loss/alignment"], rel=1e-5)
    assert {"alignment_projection.weight", "alignment_projection.bias"} <= changed(before, trainer.model)
    assert changed(encoder_before, trainer.rationale_encoder) == set()


def test_text_embedding_is_the_mean_state_of_the_encoder(trainer_of, encoder):
    trainer = trainer_of(alignment_loss_weight=0.5, rationale_encoder_name_or_path=encoder)
    spelled = trainer.rationale_tokenizer.eos_token
    texts = ["near", "far from the table", f"{spelled} is no end{spelled}"]
    found = trainer._embed(texts)
    for text, row in zip(texts, found, strict=True):
        ids = trainer.rationale_tokenizer(text, split_special_tokens=True, return_tensors="pt")["input_ids"]
        assert not set(ids[0].tolist()) & set(trainer.rationale_tokenizer.all_special_ids)
        expected = trainer.rationale_encoder(ids).last_hidden_state[0].mean(dim=0)
        torch.testing.assert_close(row, expected)
    labels = torch.full((1, 9), -100)
    labels[0, 2:5] = trainer.processing_class.tokenizer("a b c", return_tensors="pt")["input_ids"][0][:3]
    assert trainer._rationales(labels) == [trainer.processing_class.tokenizer.decode(labels[0, 2:5])]
