# SPDX-License-Identifier: Apache-2.0
"""Packed questions are learned as they are alone, and packs hold each question once."""

import copy
import dataclasses

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainerCallback, TrainingArguments

from geode.modeling_geode.modeling_geode import prepared_mask
from geode.trainers.collator import GeodeDataCollator
from geode.trainers.packing import ScenePacks, block_mask
from tests.trainers.common_collator import (
    GEOMETRY,
    make_media,
    make_model,
    make_processor,
    make_records,
    text_record,
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_media(tmp_path_factory.mktemp("media"))


@pytest.fixture(scope="module")
def processor():
    return make_processor()


@pytest.fixture(scope="module")
def collator(processor, root):
    return GeodeDataCollator(processor=processor, media_root=root, geometry=GEOMETRY)


def learned(model, batch) -> dict:
    """Loss, the cross-entropy of each learned token and the value at each control token, in the order of the questions."""
    output = model(**batch)
    labels = batch["labels"][:, 1:]
    per_token = cross_entropy(output.logits[:, :-1].transpose(1, 2), labels, reduction="none")
    values = output.regression_values[model.drh.control_mask(batch["input_ids"])]
    return {"output": output, "cross_entropy": per_token[labels != -100], "values": values}


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("hidden_position", ["token", "previous"])
def test_packs_equal_their_questions_alone(processor, root, hidden_position, attention):
    model = make_model(processor, hidden_position=hidden_position, attention=attention).train()
    assert model.model.language_model.config._attn_implementation == attention
    one, two = make_records(count=5), make_records("rooms/two", count=3)
    for side in ("right", "left"):
        collator = GeodeDataCollator(processor=processor, media_root=root, geometry=GEOMETRY, padding_side=side)
        packed = collator([one, two[:2], two[2]])
        single = collator([*one, *two])
        assert packed["input_ids"].shape[0] == 3
        assert (packed["input_ids"] == processor.tokenizer.pad_token_id).any()
        want, got = learned(model, single), learned(model, packed)
        assert len(want["values"]) == 6  # of eight questions two are choices
        torch.testing.assert_close(got["cross_entropy"], want["cross_entropy"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got["values"], want["values"], rtol=1e-4, atol=1e-5, equal_nan=True)
        torch.testing.assert_close(got["output"].loss, want["output"].loss, rtol=1e-6, atol=1e-6)
        expected = gradients(model, want["output"].loss)
        found = gradients(model, got["output"].loss)
        assert found.keys() == expected.keys()
        assert any(name.startswith("model.drm.") for name in found)
        assert any(name.startswith("drh.feedback.") for name in found)
        for name, gradient in found.items():
            torch.testing.assert_close(
                gradient, expected[name], rtol=1e-4, atol=1e-5 * (1 + expected[name].abs().max().item()), msg=name
            )


def test_pack_with_the_number_of_items_equals_its_questions_alone(processor, collator):
    model = make_model(processor)
    records = make_records(count=4)
    packed, single = collator([records[:3], records[3]]), collator(records)
    for items in (7, 100):
        with torch.no_grad():
            torch.testing.assert_close(
                model(**packed, num_items_in_batch=items).loss,
                model(**single, num_items_in_batch=items).loss,
                rtol=1e-5,
                atol=1e-6,
            )


def question_starts(batch) -> list[int]:
    """Where the questions of the first row after its first begin: their positions step back to the prefix's end."""
    (steps,) = (batch["position_ids"][0].diff() != 1).nonzero(as_tuple=True)
    return (steps + 1).tolist()


def test_other_questions_of_a_pack_do_not_matter(processor, collator):
    """Changing every token of the second question leaves the logits of all others as they are, bit by bit."""
    model = make_model(processor).eval()
    batch = {**collator([make_records(count=3)])}
    batch.pop("regression_targets")
    start, end = question_starts(batch)
    changed = batch["input_ids"].clone()
    changed[:, start:end] = batch["input_ids"][:, [start]]
    with torch.no_grad():
        before = model(**batch).logits[0]
        after = model(**{**batch, "input_ids": changed}).logits[0]
    assert before[:start].equal(after[:start])
    assert before[end:].equal(after[end:])
    assert not before[start + 1 : end].equal(after[start + 1 : end])


def test_first_token_of_each_question_is_not_learned(collator):
    batch = collator([make_records(count=6)])
    positions, labels = batch["position_ids"][0], batch["labels"][0]
    starts = question_starts(batch)
    assert len(starts) == 5
    assert labels[starts].tolist() == [-100] * 5
    # Each question goes on where the prefix ends, and nothing is learned in the prefix.
    (prefix_length,) = set(positions[starts].tolist())
    assert labels[: prefix_length + 1].tolist() == [-100] * (prefix_length + 1)
    # The scene is there once.
    assert (batch["input_ids"] == collator.processor.image_token_id).sum() == 4 * collator.processor.image_seq_length


def test_same_question_with_two_answers_keeps_both_answers_apart(processor, collator):
    """The common prefix would reach into the answers if nothing stopped it."""
    model = make_model(processor)
    records = [text_record(answer=answer) for answer in ("It is a room.", "It is a hall.", "It is a room.")]
    want, got = learned(model, collator(records)), learned(model, collator([records]))
    torch.testing.assert_close(got["cross_entropy"], want["cross_entropy"], rtol=1e-5, atol=1e-5)


def test_mask_is_what_a_loop_says():
    index = torch.tensor([[0, 0, 1, 1, 1, 2, 2, -1], [-1, -1, 0, 1, 2, 3, 3, 3]])
    mask = block_mask(index)
    assert mask.shape == (2, 1, 8, 8)
    for row in range(2):
        for query in range(8):
            for key in range(8):
                asks, is_asked = index[row, query], index[row, key]
                sees = key <= query and asks != -1 and is_asked in (0, asks)
                assert mask[row, 0, query, key] == (sees or key == query)


def test_pack_of_different_scenes_is_refused(collator):
    with pytest.raises(ValueError, match=r"must be about one scene.*rooms/one\.mp4.*rooms/two"):
        collator([[*make_records(count=1), *make_records("rooms/two", count=1)]])
    with pytest.raises(ValueError, match="at least one record"):
        collator([[]])


def test_pack_of_one_is_a_single_question(collator):
    (record,) = make_records(count=1)
    packed, single = collator([[record]]), collator([record])
    assert packed.keys() == single.keys()
    assert all(packed[name].equal(single[name]) for name in packed if name != "regression_targets")
    assert packed["attention_mask"].ndim == 2


def test_pack_tokenises_its_scene_once(processor, collator, monkeypatch):
    encoded, encode = [], type(processor)._encode
    monkeypatch.setattr(type(processor), "_encode", lambda self, text: encoded.append(text) or encode(self, text))
    records = make_records(count=3)
    collator([records])
    assert len(encoded) == len(set(encoded))
    assert sum("Frame1" in text for text in encoded) == 1
    collator(records)
    assert sum("Frame1" in text for text in encoded) == 4  # single questions each hold it


def test_suspect_value_of_a_pack_is_not_regressed_and_the_others_are(processor, collator):
    first, second, _, third = make_records(count=4)  # box, number, choice, box
    targets = [
        collator([[first, dataclasses.replace(second, label_suspect=flag), third]])["regression_targets"]
        for flag in (False, True)
    ]
    (ids,) = collator([[first, second, third]])["input_ids"]
    controls = torch.isin(ids, torch.tensor([entry["token_id"] for entry in processor.control_tokens.values()]))
    honest, suspect = (~found[0, controls].isnan().all(dim=-1) for found in targets)
    assert honest.tolist() == [True, True, True]
    assert suspect.tolist() == [True, False, True]


def test_pack_is_refused_where_the_rationale_reads_the_question(root):
    processor = make_processor()
    processor.question_conditioned = True
    collator = GeodeDataCollator(processor=processor, media_root=root, geometry=GEOMETRY)
    records = make_records(count=3)
    with pytest.raises(ValueError, match="so 3 questions cannot share them"):
        collator([records])
    batch = collator(records)
    for row, record in enumerate(records):
        kept = batch["question_input_ids"][row][batch["question_attention_mask"][row].bool()]
        assert processor.tokenizer.decode(kept) == record.prompt


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention", "kernels-community/flash-attn2"])
def test_attention_without_such_masks_is_refused(processor, attention):
    model = make_model(processor)
    config = copy.deepcopy(model.model.language_model.config)
    config._attn_implementation = attention
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=rf"'{attention}'.*attn_implementation='sdpa'.*without packs"):
        prepared_mask(mask, config, dtype=torch.float32)
    plain = torch.ones(1, 3, dtype=torch.long)
    assert prepared_mask(plain, config, dtype=torch.float32) is plain


def test_layers_that_look_past_the_mask_are_refused(processor):
    config = copy.deepcopy(make_model(processor).model.language_model.config)
    config.layer_types = ["full_attention", "sliding_attention", "full_attention"]
    with pytest.raises(ValueError, match="sliding_attention"):
        prepared_mask(torch.ones(1, 1, 3, 3, dtype=torch.bool), config, dtype=torch.float32)


# ---- packs of a dataset ----


def scenes_of(counts: list[int]):
    """Records of several scenes, in turn, as a dataset has them."""
    pairs = [(scene, number) for scene, count in enumerate(counts) for number in range(count)]
    pairs.sort(key=lambda pair: (pair[1], pair[0]))
    return [text_record(uid=f"{scene}:{number}", media=f"{scene}.mp4") for scene, number in pairs]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=5),
    st.integers(1, 5),
    st.integers(0, 3),
    st.integers(0, 3),
    st.booleans(),
)
def test_packs_hold_each_question_once_with_those_of_its_scene(counts, most, seed, epoch, shuffle):
    packs = ScenePacks(scenes_of(counts), questions_per_pack=most, seed=seed, shuffle=shuffle)
    packs.set_epoch(epoch)
    found = [packs[number] for number in range(len(packs))]
    assert sorted(record.uid for pack in found for record in pack) == sorted(
        f"{scene}:{number}" for scene, count in enumerate(counts) for number in range(count)
    )
    assert all(len({record.media for record in pack}) == 1 for pack in found)
    assert len(packs) == sum(-(-count // most) for count in counts)
    for scene in range(len(counts)):
        sizes = [len(pack) for pack in found if pack[0].media == f"{scene}.mp4"]
        assert max(sizes) <= most
        assert max(sizes) - min(sizes) <= 1


def test_packs_depend_on_seed_and_epoch_alone():
    def uids(seed, epoch):
        packs = ScenePacks(scenes_of([7, 8, 9]), questions_per_pack=4, seed=seed)
        packs.set_epoch(epoch)
        return [[record.uid for record in pack] for pack in packs]

    assert uids(0, 1) == uids(0, 1)
    assert uids(0, 1) != uids(0, 2)
    assert uids(0, 1) != uids(1, 1)
    packs = ScenePacks(scenes_of([7, 8, 9]), questions_per_pack=4)
    for epoch in (3, 0):
        packs.set_epoch(epoch)
    assert [[record.uid for record in pack] for pack in packs] == uids(0, 0)


def test_packs_of_a_dataset_are_those_of_its_records():
    records = scenes_of([3, 4])
    table = Dataset.from_list([record.to_dict() for record in records])
    packs, same = (ScenePacks(given, questions_per_pack=2, seed=5) for given in (table, records))
    assert [[row["uid"] for row in pack] for pack in packs] == [[row.uid for row in pack] for pack in same]


def test_records_of_other_numbers_of_frames_are_other_scenes():
    records = [text_record(uid=str(number), num_frames=[None, 8, 8][number]) for number in range(3)]
    packs = ScenePacks(records, questions_per_pack=3, shuffle=False)
    assert [[record.uid for record in pack] for pack in packs] == [["0"], ["1", "2"]]


def test_impossible_packs_are_refused():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        ScenePacks([], questions_per_pack=0)
    with pytest.raises(TypeError, match=r"random access, got generator.*Mixture\.load"):
        ScenePacks((record for record in []), questions_per_pack=2)


def test_trainer_deals_new_packs_each_epoch(processor, root, tmp_path):
    class Epochs(TrainerCallback):
        def __init__(self):
            self.seen = []

        def on_step_end(self, args, state, control, train_dataloader=None, **kwargs):
            self.seen.append((packs.epoch, [list(pack) for pack in packs.packs]))

    packs = ScenePacks(make_records(count=6), questions_per_pack=3)
    watch = Epochs()
    trainer = Trainer(
        model=make_model(processor),
        args=TrainingArguments(
            output_dir=str(tmp_path),
            num_train_epochs=2,
            per_device_train_batch_size=2,
            remove_unused_columns=False,
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=packs,
        data_collator=GeodeDataCollator(processor=processor, media_root=root, geometry=GEOMETRY),
        callbacks=[watch],
    )
    trainer.train()
    assert [epoch for epoch, _ in watch.seen] == [0, 1]
    assert watch.seen[0][1] != watch.seen[1][1]
