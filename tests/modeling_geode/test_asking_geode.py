# SPDX-License-Identifier: Apache-2.0
"""Many questions about a scene that is encoded once: the answers are those of raw frames, asked one by one."""

import dataclasses
import os
import re
from pathlib import Path

import pytest
import torch
from transformers import LogitsProcessor, set_seed

import geode
from geode.modeling_geode.chat_geode import CHAT_TEMPLATE
from geode.modeling_geode.modeling_geode import GeodeForConditionalGeneration
from geode.modeling_geode.scene_encoding_geode import SceneEncoding
from tests.common_tiny import make_config, make_processor


ROOM = geode.embedded_scene()
# Of unlike lengths, with a choice, and together longer than the prefix, so that they are computed in groups.
QUESTIONS = [
    "How many chairs are in this room?",
    "What is the size of this room (in square meters)? If multiple rooms are shown, estimate the size of the combined space.",
    "Locate the sofa.",
    "Which of these objects (table, lamp, sofa, plant) is the closest to the door? Options: A. table B. lamp C. sofa D. plant "
    "Answer with the letter of the option alone.",
    "Measuring from the closest point of each object, what is the distance between the armchair and the sofa (in feet)?",
    "?",
] * 2
NEW_TOKENS = 6
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


class Favour(LogitsProcessor):
    """Makes control tokens likely, so that random weights emit them among other tokens, and never the same twice."""

    def __init__(self, processor, bias: float = 3.0):
        self.bias = bias
        self.tokens = [entry["token_id"] for entry in processor.control_tokens.values()]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, self.tokens] += self.bias * scores.std(dim=1, keepdim=True)
        return scores.scatter(1, input_ids[:, -1:], -1e4)


class Script(LogitsProcessor):
    """Generates exactly the given tokens."""

    def __init__(self, tokens: list[int]):
        self.tokens, self.step = tokens, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.step += 1
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([self.tokens[self.step - 1]]), 0.0)


@pytest.fixture(scope="module")
def processor():
    return make_processor()


def make_model(processor, **overrides) -> GeodeForConditionalGeneration:
    set_seed(0)
    config = make_config(processor)
    for part, changes in overrides.items():
        for name, value in changes.items():
            setattr(getattr(config, part), name, value)
    config.initializer_range = 0.04
    return GeodeForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def model(processor):
    return make_model(processor, drh_config={"uncertainty": True})


def encode(model, processor, **options) -> SceneEncoding:
    return model.encode_scene(**processor.prepare_scene(ROOM / "room.mp4", geometry=ROOM / "geometry", **options))


@pytest.fixture(scope="module")
def scene(model, processor):
    return encode(model, processor)


def one_by_one(model, processor, questions, favour, **options) -> list:
    """An independent path: each question alone, from the video file."""
    answers = []
    part = {"type": "video", "path": str(ROOM / "room.mp4"), "geometry": str(ROOM / "geometry")}
    template = {name: options.pop(name) for name in ("use_geometry", "num_rationale_tokens") if name in options}
    for question in questions:
        chat = [{"role": "user", "content": [part, {"type": "text", "text": question}]}]
        inputs = processor.apply_chat_template(
            chat, tokenize=True, return_dict=True, add_generation_prompt=True, **template
        )
        output = model.generate(
            **inputs,
            **{"do_sample": False, "max_new_tokens": NEW_TOKENS, **options},
            logits_processor=[favour()],
            return_dict_in_generate=True,
        )
        answers += processor.post_process_answers(output, input_ids=inputs["input_ids"])
    return answers


def assert_same_answers(got, want) -> int:
    """Texts are equal, numbers to rounding, in texts to that of their last digit; returns how many values there were."""
    assert [NUMBER.sub("#", answer.text) for answer in got] == [NUMBER.sub("#", answer.text) for answer in want]
    for one, other in zip(got, want, strict=True):
        pairs = zip(NUMBER.findall(one.text), NUMBER.findall(other.text), strict=True)
        assert all(float(first) == pytest.approx(float(second), rel=1e-5, abs=0.011) for first, second in pairs)
    count = 0
    for one, other in zip(got, want, strict=True):
        one, other = one.to_dict(), other.to_dict()
        assert one.keys() == other.keys()
        one.pop("text"), other.pop("text")
        for first, second in zip(flat(one), flat(other), strict=True):
            if isinstance(first, float):
                assert first == pytest.approx(second, rel=1e-5, abs=1e-5)
                count += 1
            else:
                assert first == second
    return count


def flat(value) -> list:
    if isinstance(value, dict):
        return [part for key in sorted(value) for part in flat(value[key])]
    if isinstance(value, list | tuple):
        return [part for entry in value for part in flat(entry)]
    return [value]


@pytest.mark.parametrize("hidden_position", ["token", "previous"])
@pytest.mark.parametrize("value_feedback", [False, True])
def test_answers_equal_those_of_raw_frames_asked_one_by_one(processor, hidden_position, value_feedback):
    options = {"hidden_position": hidden_position, "value_feedback": value_feedback, "uncertainty": True}
    model = make_model(processor, drh_config=options)
    want = one_by_one(model, processor, QUESTIONS[:6], lambda: Favour(processor))
    got = model.ask(
        processor,
        encode(model, processor),
        QUESTIONS,
        max_new_tokens=NEW_TOKENS,
        logits_processor=[Favour(processor)],
    )
    assert len({answer.text for answer in want}) > 1
    assert any(value.interval is not None for answer in got for value in answer.values)
    assert assert_same_answers(got, want * 2) > 100
    assert {len(answer.boxes) for answer in got} != {0}


@pytest.mark.parametrize(
    "options",
    [{"use_geometry": False}, {"num_rationale_tokens": 3}, {"num_beams": 3}],
    ids=lambda options: next(iter(options)),
)
def test_options_of_a_question_hold_for_all(model, processor, scene, options):
    # A beam's value at the very end is not known behind a given cache, so beams get no control tokens.
    bias = -1e4 if "num_beams" in options else 3.0
    want = one_by_one(model, processor, QUESTIONS[:5], lambda: Favour(processor, bias), **options)
    favour = {"logits_processor": [Favour(processor, bias)], "max_new_tokens": NEW_TOKENS}
    assert_same_answers(model.ask(processor, scene, QUESTIONS[:5], **favour, **options), want)
    assert len({answer.text for answer in want}) > 1


def test_the_last_token_may_be_a_control_token(model, processor, scene):
    reg, box = (processor.control_tokens[token]["token_id"] for token in ("<REG>", "<3DBBOX>"))
    script = [7, reg, 8, box]
    want = one_by_one(model, processor, QUESTIONS[:4], lambda: Script(script), max_new_tokens=4)
    got = model.ask(processor, scene, QUESTIONS[:4], max_new_tokens=4, logits_processor=[Script(script)])
    assert assert_same_answers(got, want) > 4 * 8
    assert [(len(answer.values), len(answer.boxes)) for answer in got] == [(1, 1)] * 4


class Rows:
    """Counts what goes through the first layer of the language model, and the rows that it sees."""

    def __init__(self, model):
        self.shapes = []
        layer = model.model.language_model.layers[0]
        self.handle = layer.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module, arguments, options) -> None:
        states = options["hidden_states"] if "hidden_states" in options else arguments[0]
        self.shapes.append(tuple(states.shape[:2]))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.handle.remove()


def prompt_lengths(processor, scene, questions) -> list[int]:
    part = {"type": "scene", "scene": scene}
    chats = [[{"role": "user", "content": [part, {"type": "text", "text": text}]}] for text in questions]
    inputs = processor.apply_chat_template(chats, tokenize=True, return_dict=True, add_generation_prompt=True)
    return inputs["attention_mask"].sum(dim=1).tolist()


def test_the_prefix_is_computed_once_and_padding_never(model, processor, scene):
    lengths = prompt_lengths(processor, scene, QUESTIONS)
    (empty,) = prompt_lengths(processor, scene, [""])
    tail = len(processor.tokenizer("\n<|im_end|>\n<|im_start|>assistant\n")["input_ids"])
    prefix = empty - tail
    with Rows(model) as rows:
        model.ask(processor, scene, QUESTIONS, max_new_tokens=3, min_new_tokens=3, batch_size=12)
    assert rows.shapes[0] == (1, prefix)
    prefills = [shape for shape in rows.shapes[1:] if shape != (1, 12)]
    assert len(prefills) > 1  # in groups
    assert {number for number, _ in prefills} == {1}
    assert sum(length for _, length in prefills) == sum(lengths) - 12 * prefix
    assert rows.shapes.count((1, 12)) >= 2
    # A batch has its own rows, and shares the prefix with the others.
    with Rows(model) as rows:
        model.ask(processor, scene, QUESTIONS, max_new_tokens=1, batch_size=5)
    assert rows.shapes.count((1, prefix)) == 1


def test_batches_do_not_change_answers(model, processor, scene):
    options = {"max_new_tokens": NEW_TOKENS, "logits_processor": [Favour(processor)]}
    whole = model.ask(processor, scene, QUESTIONS, **options)
    assert assert_same_answers(model.ask(processor, scene, QUESTIONS, batch_size=5, **options), whole) > 50
    assert_same_answers(model.ask(processor, scene, QUESTIONS[3:4], **options), whole[3:4])


def test_a_language_model_that_cannot_share_answers_all_the_same(processor):
    sliding = {"layer_types": ["sliding_attention", "full_attention", "full_attention"], "sliding_window": 4096}
    model = make_model(processor, text_config={"use_sliding_window": True, **sliding})
    scene = encode(model, processor)
    options = {"max_new_tokens": NEW_TOKENS, "logits_processor": [Favour(processor)]}
    want = one_by_one(model, processor, QUESTIONS[:3], lambda: Favour(processor))
    assert_same_answers(model.ask(processor, scene, QUESTIONS[:3], **options), want)
    with pytest.raises(ValueError, match="A prefix needs full attention"):
        model.prefill_scene(processor, scene)


def test_a_prefix_is_kept_in_the_file_and_not_computed_again(model, processor, scene, tmp_path):
    options = {"max_new_tokens": NEW_TOKENS, "logits_processor": [Favour(processor)]}
    want = model.ask(processor, scene, QUESTIONS[:3], **options)
    model.prefill_scene(processor, scene).save(tmp_path / "scene.safetensors")
    loaded = SceneEncoding.load(tmp_path / "scene.safetensors")
    length = len(loaded.prefix.input_ids)
    with Rows(model) as rows:
        got = model.ask(processor, loaded, QUESTIONS[:3], **options)
    assert max(length for _, length in rows.shapes) < length
    assert assert_same_answers(got, want) > 10
    # Another number of rationale tokens is another prefix.
    with Rows(model) as rows:
        model.ask(processor, loaded, QUESTIONS[:1], num_rationale_tokens=2, max_new_tokens=1)
    assert rows.shapes[0] == (1, length - processor.num_rationale_tokens + 2)


def test_what_another_model_made_is_refused(processor, scene, model):
    other = make_model(processor, drh_config={"uncertainty": True})
    prefilled = other.prefill_scene(processor, encode(other, processor))
    assert other.ask(processor, scene, ["?"], max_new_tokens=1)  # the same weights
    with torch.no_grad():
        other.model.language_model.layers[0].mlp.up_proj.weight.mul_(1.5)
    with pytest.raises(ValueError, match=r"another language model.*prefill_scene"):
        other.ask(processor, prefilled, ["?"], max_new_tokens=1)
    with torch.no_grad():
        other.model.drm.queries.add_(1e-3)
    chat = [{"role": "user", "content": [{"type": "scene", "scene": scene}, {"type": "text", "text": "?"}]}]
    inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True)
    for call in (
        lambda: other.ask(processor, scene, ["?"], max_new_tokens=1),
        lambda: other.ask(processor, prefilled, ["?"], max_new_tokens=1),
        lambda: other.prefill_scene(processor, scene),
        lambda: other.generate(**inputs, **scene.to_model_inputs(), max_new_tokens=1),
        lambda: other(**inputs, **scene.to_model_inputs()),
    ):
        with pytest.raises(ValueError, match=r"other weights or settings.*encode_scene"):
            call()


def test_ask_refuses_what_it_cannot_answer(model, processor, scene):
    for arguments, options, error, message in (
        ((scene, "How many?"), {}, TypeError, "got the string 'How many"),
        (({"path": "room.mp4"}, ["?"]), {}, TypeError, "must be a SceneEncoding, got dict"),
        ((scene, ["?"]), {"batch_size": 0}, ValueError, "at least 1, got 0"),
        ((scene, ["?"]), {"num_rationale_tokens": 99}, ValueError, "got 99"),
    ):
        with pytest.raises(error, match=message):
            model.ask(processor, *arguments, max_new_tokens=1, **options)
    assert model.ask(processor, scene, []) == []


def test_a_template_with_the_question_first_is_refused(model, scene):
    processor = make_processor()
    media, text = CHAT_TEMPLATE.split("{%- for part in content -%}")[1:]
    processor.chat_template = CHAT_TEMPLATE.replace(media, "@").replace(
        text.partition("{%- endfor -%}")[0], media.partition("{%- endfor -%}")[0]
    )
    processor.chat_template = processor.chat_template.replace(
        "@", text.partition("{%- endfor -%}")[0] + "{%- endfor -%}"
    )
    with pytest.raises(ValueError, match="must begin alike"):
        model.ask(processor, scene, ["How many?", "Where?"], max_new_tokens=1)


def test_trusted_text_takes_encoded_scenes(model, processor, scene):
    """`processor(..., scene=...)` and plain `generate` give what the videos give."""
    other = encode(model, processor, num_frames=scene.num_frames)
    other = dataclasses.replace(other, rationale_tokens=other.rationale_tokens.flip(0))
    texts = [f"<|im_start|>user\n<video>\n{text}<|im_end|>\n<|im_start|>assistant\n" for text in QUESTIONS[:3]]
    favour = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "return_dict_in_generate": True}
    videos = processor(
        text=texts, videos=[str(ROOM / "room.mp4")] * 3, geometry=[str(ROOM / "geometry")] * 3, padding_side="left"
    )
    want = model.generate(**videos, **favour, logits_processor=[Favour(processor)])
    inputs = processor(text=texts, scene=scene, padding_side="left")
    assert not {"pixel_values_videos", "point_coords"} & inputs.keys()
    got = model.generate(**inputs, **favour, logits_processor=[Favour(processor)])
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(got.values, want.values, atol=1e-5, rtol=1e-5)
    # Each row takes its own scene.
    mixed = processor(text=texts[:2], scene=[scene, other], padding_side="left")
    logits = model(**mixed).logits[:, -1]
    alone = model(**processor(text=texts[:2], scene=scene, padding_side="left")).logits[:, -1]
    torch.testing.assert_close(logits[0], alone[0], atol=1e-4, rtol=1e-4)
    assert (logits[1] - alone[1]).abs().max() > 1e-3


def test_trusted_text_refuses_scenes_that_do_not_fit(processor, scene):
    foreign = dataclasses.replace(scene, encoder_digest="0" * 64)
    bare = dataclasses.replace(scene, rationale_tokens=scene.rationale_tokens[:0])
    text = "<video>\n?"
    for arguments, message in (
        ({"text": [text], "scene": [scene, scene]}, "Got 2 scenes and 0 videos for 1 texts"),
        ({"text": [text + text], "scene": scene}, r"1 texts with \[2\]"),
        ({"text": [text], "scene": scene, "videos": ["room.mp4"]}, "1 scenes and 1 videos"),
        ({"text": [text, text], "scene": [scene, foreign]}, "same encoders"),
        ({"text": [text, text], "scene": [scene, bare]}, r"numbers \[0, 8\]"),
    ):
        with pytest.raises(ValueError, match=message):
            processor(**arguments)


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_two_thousand_questions_about_fifty_scenes_take_no_more_memory(model, processor, tmp_path):
    store = model.open_scene_store(tmp_path, max_bytes=2**20)
    inputs = processor.prepare_scene(ROOM / "room.mp4", geometry=ROOM / "geometry")
    pixels, memory, answered = inputs["pixel_values_videos"], [], 0
    for number in range(50):
        inputs["pixel_values_videos"] = pixels + 0.01 * number
        store.put(f"scene{number}", model.encode_scene(**inputs))
        answered += len(model.ask(processor, store.get(f"scene{number}"), QUESTIONS[:10] * 4, max_new_tokens=4))
        memory.append(resident_mib())
    assert answered == 2000
    # The allocator needs some scenes to settle; a scene with its prefix and rows would be a MiB each.
    assert max(memory[25:]) - max(memory[10:25]) < 10, memory
    assert len(store) < 50
