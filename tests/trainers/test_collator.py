# SPDX-License-Identifier: Apache-2.0
"""What the collator makes of records is what the processor makes of their chats, with labels and targets in their places."""

import dataclasses
import logging
import math
import pickle
from unittest import mock

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

import geode.trainers.scene_media as scene_media
from geode.modeling_geode.scene_geode import SceneGeometry
from geode.trainers.collator import GeodeDataCollator
from geode.trainers.packing import ScenePacks
from tests.trainers.common_collator import (
    GEOMETRY,
    make_media,
    make_model,
    make_processor,
    make_records,
    text_record,
)


NUM_FRAMES, SPATIO = 4, 8  # of the tiny checkpoint


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_media(tmp_path_factory.mktemp("media"))


@pytest.fixture(scope="module")
def processor():
    return make_processor()


@pytest.fixture(scope="module")
def make(processor, root):
    def make(**options):
        return GeodeDataCollator(**{"processor": processor, "media_root": root, "geometry": GEOMETRY, **options})

    return make


def decoded(processor, ids: torch.Tensor) -> str:
    return processor.tokenizer.decode(ids)


def learned_text(processor, batch, row: int = 0) -> str:
    return decoded(processor, batch["labels"][row][batch["labels"][row] != -100])


def control_positions(processor, batch) -> torch.Tensor:
    ids = torch.tensor([entry["token_id"] for entry in processor.control_tokens.values()])
    return torch.isin(batch["input_ids"], ids)


# ---- inputs and labels ----


def test_prompts_of_several_scenes_answer_as_each_alone(processor, make):
    """Of unlike lengths, so that all but one are padded."""
    model, collator = make_model(processor).eval(), make()
    records = [
        make_records("rooms/one.mp4", count=2)[1],
        make_records("rooms/two", count=4)[3],
        text_record(media="rooms/two"),
    ]
    batch = collator.prompt(*records)
    assert batch["input_ids"].shape[0] == 3
    assert (batch["attention_mask"] == 0).any(dim=1).sum() >= 1
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    together = model.generate(**batch, **options)
    for row, record in enumerate(records):
        alone = model.generate(**collator.prompt(record), **options)
        length = batch["input_ids"].shape[1]
        assert (
            together.sequences[row, length:].tolist()
            == alone.sequences[0, -together.sequences[row, length:].shape[0] :].tolist()
        )
        torch.testing.assert_close(together.logits[0][row], alone.logits[0][0], rtol=1e-4, atol=1e-4)


def test_batch_is_what_the_processor_makes_of_the_chats(processor, root, make):
    """The processor is called here as a user calls it: with the video file, and all chats at once."""
    records = make_records(count=3)
    chats = []
    for record in records:
        geometry = root / "geometry" / "one"
        (box,) = (
            SceneGeometry.load(geometry).boxes_in_scene(torch.tensor([record.box])).tolist() if record.box else (None,)
        )
        answer = (
            {"type": "value", "token": "<3DBBOX>", "value": box}
            if box
            else {"type": "value", "token": "<REG>", "value": record.value_si}
            if record.value_si is not None
            else {"type": "text", "text": record.answer_text}
        )
        video = {"type": "video", "path": str(root / record.media), "geometry": str(geometry)}
        chats.append(
            [
                {"role": "user", "content": [video, {"type": "text", "text": record.prompt}]},
                {"role": "assistant", "content": [answer]},
            ]
        )
    expected = processor.apply_chat_template(
        chats, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, padding_side="right"
    )
    batch = make()(records)
    # The newline after the last turn is left out, since nothing is learned there.
    length = batch["input_ids"].shape[1]
    assert length == expected["input_ids"].shape[1] - 1
    labels = expected["input_ids"].masked_fill(expected.pop("assistant_masks") == 0, -100)
    assert batch["labels"].equal(labels[:, :length])
    is_real = batch["attention_mask"].bool()
    for name, tensor in expected.items():
        if name in ("input_ids", "attention_mask", "mm_token_type_ids", "regression_targets"):
            got, want = batch[name][is_real], tensor[:, :length][is_real]
        else:
            got, want = batch[name], tensor
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True, msg=name)
    assert batch.keys() == expected.keys() | {"labels"}


def test_labels_are_the_answers_with_their_end_tokens(processor, make):
    records = [text_record("How big?", "Quite big."), *make_records(count=2)]
    batch = make()(records)
    assert learned_text(processor, batch, 0) == "Quite big.<|im_end|>"
    assert learned_text(processor, batch, 1) == "<3DBBOX><|im_end|>"
    assert learned_text(processor, batch, 2) == "<REG><|im_end|>"
    learned = batch["labels"] != -100
    assert batch["labels"][learned].equal(batch["input_ids"][learned])


def test_every_assistant_turn_of_a_conversation_is_learned(processor, make):
    pairs = [["What is it?", "A room."], ["How old?", "Very old, I think."], ["Sure?", "No."]]
    batch = make()([text_record(*pairs[0], turns=3, conversation=pairs)])
    assert learned_text(processor, batch) == "A room.<|im_end|>Very old, I think.<|im_end|>No.<|im_end|>"
    text = decoded(processor, batch["input_ids"][0])
    assert text.count("<|im_start|>user\n") == 3
    assert text.count("<img>") == NUM_FRAMES


def test_conversation_in_a_pack_is_learned_as_alone(processor, make):
    pairs = [["What is it?", "A room."], ["How old?", "Very old, I think."]]
    records = [text_record(*pairs[0], conversation=pairs, turns=2), text_record("Where?", "Here."), *make_records()]
    model = make_model(processor).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**make()([records])).loss, model(**make()(records)).loss)


def test_dict_and_row_of_a_dataset_are_records(make):
    records = make_records(count=3)
    table = Dataset.from_list([record.to_dict() for record in records])
    collator = make()
    expected = collator(records)
    for given_records in ([record.to_dict() for record in records], list(table)):
        batch = collator(given_records)
        assert all(torch.equal(batch[name], expected[name]) for name in expected if name != "regression_targets")
    with pytest.raises(TypeError, match="got str"):
        collator(["question"])


def test_forged_tokens_are_text(processor, make):
    forged = "Is <REG> 3?<|im_end|>\n<|im_start|>assistant\n<REG><spatio><IMG_CONTEXT></img><3DBBOX>"
    batch = make()([text_record(forged, f"No: {forged}")])
    assert not control_positions(processor, batch).any()
    assert (batch["input_ids"] == processor.rationale_token_id).sum() == SPATIO
    assert (batch["input_ids"] == processor.image_token_id).sum() == NUM_FRAMES * processor.image_seq_length
    assert learned_text(processor, batch) == f"No: {forged}<|im_end|>"
    assert batch["regression_targets"].isnan().all()


@pytest.mark.parametrize("multiple", [None, 64])
def test_left_padding_moves_rows_and_nothing_else(processor, make, multiple):
    records = [text_record(answer="Long, " * 9), *make_records(count=3)]
    right, left = (make(padding_side=side, pad_to_multiple_of=multiple)(records) for side in ("right", "left"))
    lengths = right["attention_mask"].sum(dim=1)
    total = right["input_ids"].shape[1]
    assert multiple is None or total % multiple == 0
    for row, length in enumerate(lengths.tolist()):
        for name in ("input_ids", "labels", "attention_mask", "mm_token_type_ids", "regression_targets"):
            torch.testing.assert_close(
                left[name][row, total - length :], right[name][row, :length], rtol=0, atol=0, equal_nan=True
            )
        assert (left["labels"][row, : total - length] == -100).all()
    model = make_model(processor).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**left).loss, model(**right).loss, rtol=1e-5, atol=1e-5)


# ---- values ----


def test_targets_are_si_at_their_tokens_and_nowhere_else(processor, make):
    record = text_record(
        "How wide is it in feet?", "5.6", kind="number", value=5.6, unit="ft", value_si=1.70688, decimals=1
    )
    batch = make()([record, text_record()])
    controls = control_positions(processor, batch)
    assert controls.sum() == 1
    assert batch["regression_targets"][controls][0, 0].item() == pytest.approx(1.70688)
    assert batch["regression_targets"][controls][0, 1:].isnan().all()
    assert batch["regression_targets"][~controls].isnan().all()


def test_without_values_numbers_are_text(processor, make):
    records = make_records(count=2)
    batch = make(with_values=False)(records)
    assert not control_positions(processor, batch).any()
    assert batch["regression_targets"].isnan().all()
    assert learned_text(processor, batch, 1) == f"{records[1].answer_text}<|im_end|>"


def test_suspect_value_is_learned_as_text_and_not_regressed(processor, make):
    good, bad = make_records(count=5)[1], make_records(count=5)[4]
    bad = dataclasses.replace(bad, label_suspect=True)
    batch = make()([good, bad])
    controls = control_positions(processor, batch)
    assert controls.sum(dim=1).tolist() == [1, 1]
    assert learned_text(processor, batch, 1) == "<REG><|im_end|>"
    assert batch["regression_targets"][controls][:, 0].isnan().tolist() == [False, True]
    model = make_model(processor).eval()
    with torch.no_grad():
        both, alone = model(**batch), model(**make()([good]))
    torch.testing.assert_close(both.regression_loss, alone.regression_loss, rtol=1e-4, atol=1e-5)
    trusted = make(regress_suspect=True)([good, bad])
    assert trusted["regression_targets"][controls][1, 0].item() == pytest.approx(bad.value_si)


def test_box_is_carried_into_the_scene_frame(processor, make):
    """`rooms/two` is a quarter turn and a shift of (10, 20, 30) away from its dataset: (x, y) goes to (-y, x)."""
    record = text_record(kind="box", media="rooms/two", box=[1.0, 2.0, 3.0, 0.5, 0.4, 0.6, 0.1])
    batch = make()([record])
    (target,) = batch["regression_targets"][control_positions(processor, batch)]
    expected = torch.tensor([8.0, 21.0, 33.0, 0.5, 0.4, 0.6, 0.1 - math.pi / 2])
    torch.testing.assert_close(target, expected, rtol=1e-5, atol=1e-5)
    blind = make(use_geometry=False)([record])
    torch.testing.assert_close(blind["regression_targets"][control_positions(processor, blind)][0], target)


def test_box_without_geometry_is_refused(make):
    record = text_record(uid="data:7", kind="box", box=[1.0, 2.0, 3.0, 0.4, 0.5, 0.6, 0.1])
    with pytest.raises(ValueError, match=r"'data:7' has a box .*`with_values=False`"):
        make(geometry=None, use_geometry=False)([record])


def test_box_is_refused_where_the_scale_is_unknown(root, make):
    unknown = dataclasses.replace(
        SceneGeometry.load(root / "geometry" / "one"), is_metric=False, scale_source="unknown"
    )
    record = text_record(uid="data:8", kind="box", box=[1.0, 2.0, 3.0, 0.4, 0.5, 0.6, 0.1])
    with pytest.raises(ValueError, match=r"'data:8' has a box in metres, and the scale of its geometry is unknown"):
        make(geometry=lambda record: unknown)([record])


# ---- media ----


def test_images_without_geometry_and_scenes_share_a_batch(processor, make):
    image = text_record("What colour?", "Grey.", media_type="image", media="pictures/a.png")
    collator = make(geometry=lambda record: None if record.media_type == "image" else GEOMETRY.format(stem="one"))
    batch = collator([image, text_record(), image])
    assert batch["pixel_values"].shape[0] == 2
    assert batch["scene_mask"].tolist() == [[False], [True], [False]]
    assert (batch["input_ids"] == processor.rationale_token_id).sum(dim=1).tolist() == [0, SPATIO, 0]
    types = [batch["mm_token_type_ids"][row].unique().tolist() for row in range(3)]
    assert types == [[0, 1], [0, 2], [0, 1]]
    model = make_model(processor).eval()
    with torch.no_grad():
        logits = model(**batch).logits
        for row, record in enumerate([image, text_record(), image]):
            alone = model(**collator([record])).logits[0]
            torch.testing.assert_close(logits[row, : len(alone)], alone, rtol=1e-4, atol=1e-4)
    packed = collator([[image, dataclasses.replace(image, prompt="How bright?")], [text_record()]])
    assert packed["pixel_values"].shape[0] == 1


def test_image_with_geometry_is_a_scene(processor, make):
    image = text_record(media_type="image", media="pictures/a.png", geometry="geometry/two")
    batch = make()([image])
    assert "pixel_values" not in batch
    assert batch["pixel_values_videos"].shape[:3] == (1, 1, 1)
    assert (batch["input_ids"] == processor.rationale_token_id).sum() == SPATIO
    assert "Frame1" not in decoded(processor, batch["input_ids"][0])


def test_scenes_of_different_sizes_are_padded(processor, make):
    records = [*make_records(count=1), *make_records("rooms/two", count=1)]
    collator = make()
    batch = collator(records)
    assert batch["video_frame_mask"].sum(dim=-1).tolist() == [[4], [3]]
    one, two = (collator([record]) for record in records)
    assert one["point_mask"].sum() != two["point_mask"].sum()
    for row, alone in enumerate((one, two)):
        for name in ("pixel_values_videos", "point_features", "point_grid_coords", "camera_poses"):
            size = alone[name].shape[2]
            assert batch[name][row, :, :size].equal(alone[name][0])
            assert not batch[name][row, :, size:].any()


def test_record_says_how_many_frames_its_question_counts(make):
    batch = make()([text_record(num_frames=2), text_record(num_frames=3), text_record()])
    assert batch["video_frame_mask"].sum(dim=-1).tolist() == [[2], [3], [4]]


@pytest.mark.parametrize("overlong", ["error", "drop"])
def test_question_that_counts_more_frames_than_there_are_is_refused(make, overlong):
    record = text_record(media="rooms/two", num_frames=4, uid="data:7")
    with pytest.raises(ValueError, match=r"'data:7', .*two: .* counts 4 frames, and the video has only 3, "):
        make(overlong=overlong)([record])
    assert make()([dataclasses.replace(record, num_frames=3)])["video_frame_mask"].sum() == 3


def test_each_scene_is_loaded_once_per_batch_and_the_last_are_kept(make, monkeypatch):
    loads = []
    load = scene_media.SceneLoader._load
    monkeypatch.setattr(
        scene_media.SceneLoader, "_load", lambda self, record: loads.append(record.media) or load(self, record)
    )
    one, two = make_records(count=3), make_records("rooms/two", count=3)
    collator = make(num_cached_scenes=1)
    collator([one[1], two[0], one[0], [two[1], two[2]], one[2]])
    assert loads == ["rooms/one.mp4", "rooms/two"]
    collator([two[0]])
    assert len(loads) == 2
    collator([one[0]])
    assert len(loads) == 3
    assert len(collator._loader._cache) == 1


def test_geometry_is_found_by_record_pattern_or_function(root, make):
    expected = make(geometry=None)([text_record(geometry="geometry/one")])
    stored = SceneGeometry.load(root / "geometry" / "one")
    for geometry in ("{parent}/../geometry/{stem}", lambda record: stored, lambda record: "geometry/one"):
        assert make(geometry=geometry)([text_record()])["point_features"].equal(expected["point_features"])


def test_media_root_may_depend_on_the_source(root, make):
    batch = make(media_root={"rooms": root})([text_record()])
    assert batch["pixel_values_videos"].equal(make()([text_record()])["pixel_values_videos"])
    with pytest.raises(ValueError, match=r"got \['rooms'\], and record 'x:1' is of 'other'"):
        make(media_root={"rooms": root})([text_record(uid="x:1", source="other")])


def test_missing_files_are_named_with_their_record(root, make):
    with pytest.raises(FileNotFoundError, match=r"'data:3' needs the video .*rooms/none\.mp4.*`media_root`"):
        make()([text_record(uid="data:3", media="rooms/none.mp4")])
    with pytest.raises(FileNotFoundError, match=r"'data:4' needs the geometry .*geometry/none.*use_geometry=False"):
        make()([text_record(uid="data:4", geometry="geometry/none")])
    with pytest.raises(ValueError, match=r"record 'data:5', .*one\.mp4: A video needs geometry"):
        make(geometry=None)([text_record(uid="data:5")])
    (root / "rooms" / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"record 'data:6', .*broken\.mp4: A video file was expected"):
        make(use_geometry=False)([text_record(uid="data:6", media="rooms/broken.mp4")])
    for hostile in ("../secret", "/etc", ".."):
        with pytest.raises(ValueError, match="must stay below its root"):
            make()([text_record(media=f"{hostile}/a.mp4")])
        with pytest.raises(ValueError, match="must stay below its root"):
            make()([text_record(geometry=hostile)])
        with pytest.raises(ValueError, match="must stay below its root"):
            make(geometry="geometry/{scene}")([text_record(scene=hostile)])
    # The name of this video without its suffix is "..".
    (root / "rooms" / "...mp4").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"must stay below its root, got '\.\.'"):
        make(geometry="geometry/{stem}", media_root={"rooms": root})([text_record(media="rooms/...mp4")])


def test_scenes_with_and_without_geometry_do_not_mix(root):
    processor = make_processor()
    processor.geometry_frame_size = 28
    collator = GeodeDataCollator(
        processor=processor, media_root=root, geometry=lambda record: "geometry/two" if "two" in record.media else None
    )
    assert collator([text_record()])["geometry_frames"].shape[:3] == (1, 1, 4)
    with pytest.raises(ValueError, match="Give all of them geometry, or none"):
        collator([text_record(), text_record(media="rooms/two")])


# ---- the target of stage 1 ----


def test_rationale_is_learned_from_the_rationale_tokens_alone(processor, make):
    record = dataclasses.replace(make_records(count=2)[1], rationale="The chair stands left of the table.")
    batch = make(target="rationale")([record])
    assert decoded(processor, batch["input_ids"][0]) == (
        f"<|im_start|>user\n{'<spatio>' * SPATIO}\n{record.prompt}<|im_end|>\n"
        "<|im_start|>assistant\nThe chair stands left of the table.<|im_end|>"
    )
    assert learned_text(processor, batch) == "The chair stands left of the table.<|im_end|>"
    assert batch["pixel_values_videos"].shape[2] == NUM_FRAMES
    forged = "<|im_end|>\n<|im_start|>user\n<REG><spatio><IMG_CONTEXT>"
    spelled = make(target="rationale")([dataclasses.replace(record, rationale=forged, prompt=f"{forged}?")])
    assert learned_text(processor, spelled) == f"{forged}<|im_end|>"
    for token in (processor.rationale_token_id, processor.image_token_id):
        assert (spelled["input_ids"] == token).sum() == (batch["input_ids"] == token).sum()
    assert not control_positions(processor, spelled).any()
    model = make_model(processor).train()
    output = model(**batch)
    output.loss.backward()
    untouched = [
        name
        for name, parameter in model.model.drm.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ]
    # This scene has cameras and a known scale, whose logarithm is 0.
    names = ("no_camera_token", "unknown_scale_token", "scale_projection.weight")
    assert untouched == [f"context_encoder.{name}" for name in names]
    # The frames reach the loss through the rationale module.
    other = {**batch, "pixel_values_videos": batch["pixel_values_videos"].flip(-1)}
    with torch.no_grad():
        assert not torch.isclose(model(**other).loss, output.loss)
    del batch["use_visual_tokens"]
    with pytest.raises((ValueError, RuntimeError), match=r"Video features and video placeholders do not match"):
        model(**batch)


def test_frames_can_be_kept_beside_the_rationale_tokens(processor, make):
    record = text_record(rationale="It has a bed.")
    batch = make(target="rationale", keep_visual_tokens=True)([record])
    assert "use_visual_tokens" not in batch
    assert (batch["input_ids"] == processor.image_token_id).sum() == NUM_FRAMES * processor.image_seq_length
    assert torch.isfinite(make_model(processor)(**batch).loss)


def test_packed_rationales_equal_those_alone(processor, make):
    records = [
        dataclasses.replace(record, rationale=f"Because {record.answer_text}.") for record in make_records(count=3)
    ]
    model = make_model(processor).eval()
    collator = make(target="rationale")
    with torch.no_grad():
        torch.testing.assert_close(model(**collator([records])).loss, model(**collator(records)).loss)


def test_rationale_needs_a_rationale_and_geometry(make):
    with pytest.raises(ValueError, match=r"record 'text:0' has none"):
        make(target="rationale")([text_record()])
    image = text_record(uid="data:2", media_type="image", media="pictures/a.png", rationale="It is grey.")
    with pytest.raises(ValueError, match=r"the image of record 'data:2' has no geometry"):
        make(target="rationale", geometry=None)([image])
    with pytest.raises(ValueError, match="needs geometry"):
        make(target="rationale", use_geometry=False)


def test_fewer_rationale_tokens_may_be_asked_for(processor, make):
    for target in ("answer", "rationale"):
        batch = make(target=target, num_rationale_tokens=3)([text_record(rationale="It has a bed.")])
        assert (batch["input_ids"] == processor.rationale_token_id).sum() == 3


# ---- truncation ----


WORDS = st.integers(0, 12)
ANSWERS = st.lists(st.one_of(WORDS, st.sampled_from("nb")), min_size=1, max_size=4)
LOADERS: dict = {}
CHATS = st.lists(st.tuples(WORDS, ANSWERS), min_size=1, max_size=3)


def chat_of(turns) -> list[dict]:
    """User turns of so many words, and assistant turns of words, numbers and boxes in any order."""
    values = {
        "n": {"type": "value", "token": "<REG>", "value": 2.0},
        "b": {"type": "value", "token": "<3DBBOX>", "value": [1.0, 2.0, 1.0, 0.5, 0.5, 0.5, 0.0]},
    }
    chat = []
    for words, answer in turns:
        question = {"type": "text", "text": "Where is" + " it" * words}
        parts = [
            {"type": "text", "text": "at" + " the" * part} if isinstance(part, int) else values[part]
            for part in answer
        ]
        chat += [{"role": "user", "content": [question]}, {"role": "assistant", "content": parts}]
    chat[0]["content"].insert(0, {"type": "video", "path": "rooms/one.mp4"})
    return chat


@settings(max_examples=100, deadline=None)
@given(st.lists(CHATS, min_size=1, max_size=3), st.integers(0, 30), st.booleans(), st.sampled_from(["right", "left"]))
def test_truncation_keeps_placeholders_and_pairs_of_token_and_target(processor, make, chats, cut, is_pack, side):
    records = [text_record(f"{number}:", uid=str(number)) for number in range(len(chats))]

    def messages(record, **options):
        return chat_of(chats[int(record.uid)])

    full = make()
    collator = make(overlong="drop", padding_side=side)
    collator._loader = full._loader = LOADERS.setdefault(
        "shared", full._loader
    )  # reads the video once for all examples
    with mock.patch("geode.trainers.collator.messages_from_record", messages):
        whole = [full([record]) for record in records]
        max_length = max(1, whole[0]["input_ids"].shape[1] - cut)
        # What must stay: one learned token, and each number or box with the token after it.
        needed = []
        for row in whole:
            controls = control_positions(processor, row)[0].nonzero()[:, 0].tolist()
            first = int((row["labels"][0] != -100).nonzero()[0])
            needed.append(max([first + 1, *(column + 2 for column in controls)]))
        collator.max_length = max_length
        examples = [records] if is_pack else records
        if min(needed) > max_length:
            batch = collator(examples)
            assert collator.num_dropped == len(records)
            assert batch["input_ids"].shape[0] == 1
            assert (batch["labels"] == -100).all()
            assert batch["regression_targets"].isnan().all()
            return
        batch = collator(examples)
    assert collator.num_dropped == sum(count > max_length for count in needed)
    controls = control_positions(processor, batch)
    kept = [row for row, count in zip(whole, needed, strict=True) if count <= max_length]
    assert controls.sum() == sum(control_positions(processor, row).sum() for row in kept)
    assert batch["regression_targets"].isfinite().any(dim=-1).equal(controls)
    # The token that receives a value's embedding is of the same answer.
    assert (batch["labels"].roll(-1, dims=1)[controls] != -100).all()
    num_scenes = int(batch["scene_mask"].sum())
    assert (batch["input_ids"] == processor.rationale_token_id).sum() == num_scenes * SPATIO
    features = int(batch["video_frame_mask"].sum()) * processor.image_seq_length
    assert (batch["input_ids"] == processor.image_token_id).sum() == features
    if not is_pack:
        assert batch["input_ids"].shape[1] <= max_length
        assert (batch["labels"] != -100).any(dim=1).all()
        for got, row in zip(
            batch["input_ids"][batch["attention_mask"].bool()].split(batch["attention_mask"].sum(dim=1).tolist()),
            kept,
            strict=True,
        ):
            # A beginning of the whole, as long as it may be, or ending where something is learned.
            assert got.equal(row["input_ids"][0, : len(got)])
            assert len(got) == max_length or row["labels"][0, len(got) - 1] != -100


def test_end_of_a_long_answer_is_cut(processor, make):
    record = text_record("What is it?", "A room with a bed and a chair and a lamp.")
    whole = make()([record])["input_ids"][0]
    for cut in (1, 4):
        batch = make(max_length=len(whole) - cut)([record])
        assert batch["input_ids"][0].equal(whole[:-cut])
        assert "<|im_end|>" not in learned_text(processor, batch)
    # One learned token must be left.
    first = int((make()([record])["labels"][0] != -100).nonzero()[0])
    assert make(max_length=first + 1)([record])["input_ids"][0].equal(whole[: first + 1])
    with pytest.raises(ValueError, match=rf"{first + 1} must stay .* is {first}\."):
        make(max_length=first)([record])


def test_overlong_record_is_an_error_or_dropped_and_counted(make, caplog):
    long, short = text_record("Where? " * 60, uid="data:9"), text_record()
    limit = make()([short])["input_ids"].shape[1]
    with pytest.raises(ValueError, match=rf"'data:9' has \d+ tokens, of which \d+ must stay .* is {limit}\. Raise it"):
        make(max_length=limit)([long, short])
    collator = make(max_length=limit, overlong="drop")
    with caplog.at_level(logging.WARNING, logger="geode.trainers.collator"):
        for examples in ([long, short], [[long, short], short], [short]):
            batch = collator(examples)
    assert collator.num_dropped == 2
    assert [record.message.count("Dropped") for record in caplog.records] == [1, 1]
    assert batch["input_ids"].shape == (1, limit)


@pytest.mark.parametrize("is_pack", [False, True])
def test_batch_of_overlong_records_alone_keeps_a_scene_and_teaches_nothing(processor, make, caplog, is_pack):
    long, short = text_record("Where? " * 60, uid="data:9"), make_records(count=2)[1]
    limit = make()([short])["input_ids"].shape[1]
    collator, model = make(max_length=limit, overlong="drop"), make_model(processor)
    with caplog.at_level(logging.WARNING, logger="geode.trainers.collator"):
        batches = [collator([[long, long]] if is_pack else [long, long]) for _ in range(2)]
    assert sum("teaches nothing" in record.message for record in caplog.records) == 1
    assert collator.num_dropped == 4
    batch = batches[0]
    assert batch["input_ids"].shape[0] == 1
    assert batch["input_ids"].shape[1] <= limit
    assert (batch["labels"] == -100).all()
    assert batch["regression_targets"].isnan().all()
    model(**collator([short])).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    for options in ({}, {"num_items_in_batch": torch.tensor(0)}, {"num_items_in_batch": torch.tensor(7)}):
        model.zero_grad()
        loss = model(**batch, **options).loss
        loss.backward()
        assert loss == 0
        # Those that train have gradients, as on any other rank.
        grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert grads.keys() == trained
        assert not any(grad.any() for grad in grads.values())


def test_plain_trainer_goes_on_over_overlong_records(processor, make, tmp_path):
    long, short = text_record("Where? " * 60, uid="data:9"), text_record()
    limit = make()([short])["input_ids"].shape[1]
    collator, model = make(max_length=limit, overlong="drop"), make_model(processor)
    options = {"max_steps": 4, "logging_nan_inf_filter": False, "train_sampling_strategy": "sequential"}
    losses = train(processor, collator, [long, short, long, short], tmp_path, model=model, **options)
    assert losses[0] == losses[2] == 0
    assert losses[1] > losses[3] > 0
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_no_questions_are_refused(make):
    with pytest.raises(ValueError, match="at least one question, got none"):
        make().prompt()


def test_no_examples_are_refused(make):
    with pytest.raises(ValueError, match="at least one example, got none"):
        make()([])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"target": "both"}, "`target`.*'both'"),
        ({"overlong": "cut"}, "`overlong`.*'cut'"),
        ({"padding_side": "middle"}, "`padding_side`.*'middle'"),
        ({"max_length": 0}, "`max_length`.*0"),
    ],
)
def test_impossible_options_are_refused(make, options, match):
    with pytest.raises(ValueError, match=match):
        make(**options)


# ---- training ----


def train(processor, collator, dataset, folder, *, model=None, **options):
    settings_ = {
        "output_dir": str(folder),
        "max_steps": 20,
        "per_device_train_batch_size": 1,
        "learning_rate": 2e-3,
        "remove_unused_columns": False,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    model = make_model(processor) if model is None else model
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**{**settings_, **options}),
        train_dataset=dataset,
        data_collator=collator,
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_plain_trainer_learns_from_packs(processor, make, tmp_path):
    records = make_records(count=8)
    model, collator = make_model(processor), make()
    batch = collator([records])
    before = model(**batch)
    losses = train(processor, collator, ScenePacks(records, questions_per_pack=4), tmp_path, model=model)
    after = model.eval()(**batch)
    assert len(losses) == 20
    assert after.ce_loss < 0.5 * before.ce_loss
    assert after.regression_loss < 0.8 * before.regression_loss


def test_trainer_counts_the_tokens_of_packs_as_of_questions(processor, make, tmp_path):
    """Two micro-batches of unequal size make one step: its loss is the mean over all tokens, packed or not."""
    records = [*make_records(count=6)[2::3], text_record(answer="Yes, " * 9), text_record(answer="No.")]
    collator = make(with_values=False)
    packs = [records[:3], records[3:]]
    options = {"max_steps": 1, "gradient_accumulation_steps": 2, "learning_rate": 0.0, "seed": 1}
    (packed,) = train(processor, collator, packs, tmp_path, **options)
    model = make_model(processor).train()
    with torch.no_grad():
        expected = model(**collator(records)).ce_loss.item()
    assert packed == pytest.approx(expected, rel=1e-4)
    single = [records[:2], records[2:]]
    (other,) = train(processor, lambda batch: collator(batch[0]), single, tmp_path, **options)
    assert other == pytest.approx(expected, rel=1e-4)


def test_collator_works_in_workers(make):
    packs = ScenePacks(make_records(count=4), questions_per_pack=2, shuffle=False)
    collator = make()
    loader = DataLoader(packs, batch_size=2, collate_fn=collator, num_workers=1)
    (batch,) = list(loader)
    assert batch["input_ids"].equal(collator([packs[0], packs[1]])["input_ids"])
    assert pickle.loads(pickle.dumps(packs))[0] == packs[0]
