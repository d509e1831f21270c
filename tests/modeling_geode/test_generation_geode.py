# SPDX-License-Identifier: Apache-2.0
"""Values that `generate` returns are those of a teacher-forced forward over the same sequence, in every mode."""

import shutil

import pytest
import torch
from transformers import CompileConfig, LogitsProcessor, LogitsProcessorList, set_seed
from transformers.generation.streamers import BaseStreamer

from geode.modeling_geode.generation_geode import GeodeGenerateBeamOutput, GeodeGenerateOutput
from geode.modeling_geode.modeling_geode import GeodeForConditionalGeneration
from tests.modeling_geode.common_geode import (
    BOX_TOKEN,
    IMAGE_TOKEN,
    RATIONALE_TOKEN,
    REG_TOKEN,
    prepare_inputs,
    tiny_config,
)


CONTROL_TOKENS = (REG_TOKEN, BOX_TOKEN)
DIMS = {REG_TOKEN: 1, BOX_TOKEN: 7}
MODES = {
    "greedy": {"do_sample": False},
    "sample": {"do_sample": True, "top_k": 0},
    "sample_two": {"do_sample": True, "top_k": 0, "num_return_sequences": 2},
    "beams": {"do_sample": False, "num_beams": 3},
    "beams_all": {"do_sample": False, "num_beams": 3, "num_return_sequences": 3},
    "beam_sample": {"do_sample": True, "num_beams": 3, "num_return_sequences": 2},
    "no_cache": {"do_sample": False, "use_cache": False},
    "static_cache": {"do_sample": False, "cache_implementation": "static", "disable_compile": True},
}


class Favour(LogitsProcessor):
    """Makes control tokens likely, so that random weights emit them among other tokens."""

    def __init__(self, bias: float):
        self.bias = bias

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, list(CONTROL_TOKENS)] += self.bias
        # A greedy search would repeat one token for ever.
        return scores.scatter(1, input_ids[:, -1:], -20.0)


def make_model(**overrides) -> GeodeForConditionalGeneration:
    set_seed(0)
    model = GeodeForConditionalGeneration(tiny_config(**overrides)).eval()
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = 2
    return model


def left_padded_inputs(model, padding: int = 3) -> dict:
    """A batch of three whose first sample is shorter, so that it is padded on the left."""
    inputs = prepare_inputs(model.config, batch_size=3)
    ids, types = inputs["input_ids"], inputs["mm_token_type_ids"]
    pad = torch.zeros(3, padding, dtype=torch.long)
    inputs["input_ids"] = torch.cat([pad, ids], dim=1)
    inputs["mm_token_type_ids"] = torch.cat([pad, types], dim=1)
    inputs["attention_mask"] = torch.cat([pad, torch.ones_like(ids)], dim=1)
    for row in (1, 2):
        inputs["input_ids"][row, :padding] = torch.tensor([11, 12, 13])[:padding]
        inputs["attention_mask"][row, :padding] = 1
    return inputs


def teacher_forced_values(model, inputs: dict, output) -> list[list[torch.Tensor]]:
    """An independent path: one forward per returned sequence, without cache, from the raw media."""
    expected = []
    samples_per_input = len(output.sequences) // len(inputs["input_ids"])
    for row, sequence in enumerate(output.sequences):
        sample = row // samples_per_input
        single = {name: tensor[sample : sample + 1] for name, tensor in inputs.items()}
        new = len(sequence) - single["input_ids"].shape[1]
        single["input_ids"] = sequence[None]
        single["attention_mask"] = torch.nn.functional.pad(single["attention_mask"], (0, new), value=1)
        single["mm_token_type_ids"] = torch.nn.functional.pad(single["mm_token_type_ids"], (0, new))
        single["position_ids"] = (single["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
        if model.config.drh_config.value_feedback:
            fed = torch.full((1, len(sequence), 7), torch.nan)
            positions = [p for p in range(output.prompt_length, len(sequence)) if int(sequence[p]) in CONTROL_TOKENS]
            for position, value in zip(positions, output.values[row], strict=True):
                fed[0, position, : len(value)] = value
            single["feedback_values"] = fed
        values = model(**single).regression_values
        found = []
        for position in range(output.prompt_length, len(sequence)):
            if int(sequence[position]) in CONTROL_TOKENS:
                found.append(values[0, position, : DIMS[int(sequence[position])]])
        expected.append(found)
    return expected


def assert_values_match(output, expected) -> int:
    count = 0
    for got, want in zip(output.values, expected, strict=True):
        assert len(got) == len(want)
        for value, other in zip(got, want, strict=True):
            torch.testing.assert_close(value, other, atol=2e-4, rtol=2e-4)
            count += 1
    return count


@pytest.mark.parametrize("hidden_position", ["token", "previous"])
@pytest.mark.parametrize("mode", MODES)
def test_generate_values_equal_teacher_forcing(mode, hidden_position):
    model = make_model(drh_config={"hidden_position": hidden_position})
    inputs = left_padded_inputs(model)
    set_seed(1)
    output = model.generate(
        **inputs,
        **MODES[mode],
        max_new_tokens=9,
        logits_processor=LogitsProcessorList([Favour(8.0)]),
        return_dict_in_generate=True,
    )
    expected_class = GeodeGenerateBeamOutput if "beam" in mode else GeodeGenerateOutput
    assert type(output) is expected_class
    assert output.prompt_length == inputs["input_ids"].shape[1]
    assert output.hidden_states is None
    assert assert_values_match(output, teacher_forced_values(model, inputs, output)) >= 6


@pytest.mark.parametrize("hidden_position", ["token", "previous"])
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "static_cache"])
def test_generate_values_equal_teacher_forcing_with_value_feedback(mode, hidden_position):
    model = make_model(drh_config={"hidden_position": hidden_position, "value_feedback": True})
    inputs = left_padded_inputs(model)
    arguments = {**MODES[mode], "max_new_tokens": 8, "return_dict_in_generate": True}
    set_seed(1)
    output = model.generate(**inputs, **arguments, logits_processor=LogitsProcessorList([Favour(8.0)]))
    assert assert_values_match(output, teacher_forced_values(model, inputs, output)) >= 6


def test_compiled_decoding_with_a_static_cache_gives_the_same_values():
    model = make_model()
    inputs = left_padded_inputs(model)
    arguments = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
    expected = model.generate(**inputs, **arguments, logits_processor=[Favour(8.0)])
    # The graph is traced whole, which is what can fail; the backend only decides how it is run.
    model.generation_config.compile_config = CompileConfig(backend="eager", fullgraph=True, mode=None)
    model.generation_config.compile_config._compile_all_devices = True
    output = model.generate(**inputs, **arguments, logits_processor=[Favour(8.0)], cache_implementation="static")
    assert torch.equal(output.sequences, expected.sequences)
    assert assert_values_match(output, expected.values) >= 6


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the default backend compiles C++")
# PyTorch 2.13's compiler calls a deprecated function of its own.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("hidden_position", ["token", "previous"])
def test_compiled_code_gives_the_same_values(hidden_position):
    """The default backend, as a user runs it: the decoding step is compiled in one graph."""
    model = make_model(drh_config={"hidden_position": hidden_position})
    inputs = left_padded_inputs(model)
    arguments = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    expected = model.generate(**inputs, **arguments, logits_processor=[Favour(8.0)])
    model.generation_config.compile_config = CompileConfig(fullgraph=True, mode=None)
    model.generation_config.compile_config._compile_all_devices = True
    output = model.generate(**inputs, **arguments, logits_processor=[Favour(8.0)], cache_implementation="static")
    assert torch.equal(output.sequences, expected.sequences)
    assert assert_values_match(output, expected.values) >= 6


def test_continuous_batching_is_refused():
    model = make_model()
    with pytest.raises(NotImplementedError, match=r"no hidden states.*`model\.ask"):
        model.generate_batch([[7, 8, 9]], max_new_tokens=2)
    with pytest.raises(NotImplementedError, match="`generate` with a padded batch"):
        model.init_continuous_batching()


def test_value_feedback_changes_what_follows():
    model = make_model(drh_config={"value_feedback": True})
    inputs = prepare_inputs(model.config, batch_size=1, has_control_tokens=True)
    fed = torch.full((1, inputs["input_ids"].shape[1], 7), torch.nan)
    position = (inputs["input_ids"][0] == REG_TOKEN).nonzero().item()
    fed[0, position, 0] = 1.5
    low = model(**inputs, feedback_values=fed).logits
    fed[0, position, 0] = 9.0
    high = model(**inputs, feedback_values=fed).logits
    torch.testing.assert_close(low[:, : position + 1], high[:, : position + 1])
    assert (low[:, position + 1] - high[:, position + 1]).abs().max() > 1e-3


@pytest.mark.parametrize("hidden_position", ["token", "previous"])
@pytest.mark.parametrize("assistant", ["model", "prompt_lookup"])
def test_assisted_decoding_values_equal_teacher_forcing(assistant, hidden_position):
    model = make_model(drh_config={"hidden_position": hidden_position})
    inputs = {name: tensor[:1] for name, tensor in prepare_inputs(model.config, batch_size=1).items()}
    if assistant == "model":
        arguments = {"assistant_model": make_model(drh_config={"hidden_position": hidden_position})}
    else:
        arguments = {"prompt_lookup_num_tokens": 2}
    output = model.generate(
        **inputs,
        **arguments,
        do_sample=False,
        max_new_tokens=9,
        logits_processor=LogitsProcessorList([Favour(8.0)]),
        return_dict_in_generate=True,
    )
    assert assert_values_match(output, teacher_forced_values(model, inputs, output)) >= 2


def test_assisted_decoding_with_value_feedback_raises():
    model = make_model(drh_config={"value_feedback": True})
    inputs = prepare_inputs(model.config, batch_size=1)
    with pytest.raises(ValueError, match="Assisted decoding cannot feed values back"):
        model.generate(**inputs, prompt_lookup_num_tokens=2, max_new_tokens=3)


class Force(LogitsProcessor):
    """Generates exactly the given tokens."""

    def __init__(self, tokens: list[int], prompt_length: int):
        self.tokens, self.prompt_length = tokens, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.tokens[input_ids.shape[1] - self.prompt_length]] = 0.0
        return forced


@pytest.mark.parametrize("hidden_position", ["token", "previous"])
@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("value_feedback", [False, True])
def test_max_new_tokens_may_end_on_a_control_token(hidden_position, num_beams, value_feedback):
    model = make_model(drh_config={"hidden_position": hidden_position, "value_feedback": value_feedback})
    inputs = left_padded_inputs(model)
    tokens = [7, REG_TOKEN, 8, BOX_TOKEN]
    force = Force(tokens, inputs["input_ids"].shape[1])
    output = model.generate(
        **inputs,
        max_new_tokens=4,
        num_beams=num_beams,
        do_sample=False,
        logits_processor=LogitsProcessorList([force]),
        return_dict_in_generate=True,
    )
    assert output.sequences[:, -4:].tolist() == [tokens] * 3
    assert [[len(value) for value in values] for values in output.values] == [[1, 7]] * 3
    assert assert_values_match(output, teacher_forced_values(model, inputs, output)) == 6


def test_generate_from_embeddings_gives_the_values_of_the_tokens():
    model = make_model()
    inputs = prepare_inputs(model.config, batch_size=2)
    from_ids = model.generate(
        **inputs, max_new_tokens=6, logits_processor=[Favour(8.0)], return_dict_in_generate=True, do_sample=False
    )
    # Without the prompt's last token in `input_ids`, the first step cannot forbid repeating it; start from another.
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    generator_inputs = {**inputs, "inputs_embeds": embeds}
    tokens = from_ids.sequences[:, from_ids.prompt_length :]
    from_embeds = model.generate(
        **generator_inputs,
        max_new_tokens=6,
        logits_processor=[Replay(tokens)],
        return_dict_in_generate=True,
        do_sample=False,
    )
    assert from_embeds.prompt_length == 0
    assert torch.equal(from_embeds.sequences, tokens)
    for got, want in zip(from_embeds.values, from_ids.values, strict=True):
        for value, other in zip(got, want, strict=True):
            torch.testing.assert_close(value, other, atol=2e-4, rtol=2e-4)


class Replay(LogitsProcessor):
    """Generates the given tokens of each row, counting its own calls."""

    def __init__(self, tokens: torch.Tensor):
        self.tokens, self.step = tokens, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, -torch.inf).scatter(1, self.tokens[:, self.step, None], 0.0)
        self.step += 1
        return forced


@pytest.mark.parametrize("argument", ["past_key_values", "cache"])
def test_generation_continues_from_a_cache_that_holds_the_media(argument):
    model = make_model()
    inputs = prepare_inputs(model.config, batch_size=2)
    arguments = {"do_sample": False, "return_dict_in_generate": True, "logits_processor": [Favour(8.0)]}
    whole = model.generate(**inputs, **arguments, max_new_tokens=6)
    start = model.generate(**inputs, **arguments, max_new_tokens=3)
    inputs["input_ids"] = start.sequences
    for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0)):
        inputs[name] = torch.nn.functional.pad(inputs[name], (0, 3), value=value)
    rest = model.generate(**inputs, **arguments, max_new_tokens=3, **{argument: start.past_key_values})
    assert torch.equal(rest.sequences, whole.sequences)
    tail = [values[len(first) :] for values, first in zip(whole.values, start.values, strict=True)]
    for got, want in zip(rest.values, tail, strict=True):
        for value, other in zip(got, want, strict=True):
            torch.testing.assert_close(value, other, atol=2e-4, rtol=2e-4)


def test_two_caches_raise():
    model = make_model()
    start = model.generate(
        **prepare_inputs(model.config, batch_size=1), max_new_tokens=2, return_dict_in_generate=True
    )
    caches = {"past_key_values": start.past_key_values, "cache": start.past_key_values}
    with pytest.raises(ValueError, match="two names of one argument, got both"):
        model.generate(start.sequences, max_new_tokens=1, **caches)
    with pytest.raises(ValueError, match="two names of one argument, got both"):
        model(start.sequences[:, -1:], **caches)


def test_value_of_a_last_token_of_beams_behind_a_given_cache_raises_with_the_remedy():
    model = make_model()
    inputs = prepare_inputs(model.config, batch_size=1)
    start = model.generate(**inputs, max_new_tokens=2, num_beams=1, do_sample=False, return_dict_in_generate=True)
    start.past_key_values.batch_repeat_interleave(2)
    length = start.sequences.shape[1]
    with pytest.raises(ValueError, match="Raise `max_new_tokens` by one"):
        model.generate(
            input_ids=start.sequences,
            past_key_values=start.past_key_values,
            max_new_tokens=1,
            num_beams=2,
            return_dict_in_generate=True,
            logits_processor=[Force([REG_TOKEN], length)],
        )


def test_placeholders_are_never_generated():
    model = make_model()
    inputs = prepare_inputs(model.config, batch_size=2)

    class WantPlaceholders(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores = scores.clone()
            scores[:, [IMAGE_TOKEN, RATIONALE_TOKEN]] = 100.0
            return scores

    sequences = model.generate(**inputs, max_new_tokens=4, logits_processor=[WantPlaceholders()], do_sample=False)
    generated = sequences[:, inputs["input_ids"].shape[1] :]
    assert not torch.isin(generated, torch.tensor([IMAGE_TOKEN, RATIONALE_TOKEN])).any()


def test_plain_generate_returns_the_sequences_of_the_full_output():
    model = make_model()
    inputs = prepare_inputs(model.config, batch_size=2)
    plain = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    full = model.generate(**inputs, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(plain, full.sequences)


def test_user_hidden_states_survive():
    model = make_model()
    inputs = prepare_inputs(model.config, batch_size=1)
    output = model.generate(
        **inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_hidden_states=True
    )
    assert len(output.hidden_states) == 3
    assert all(state is not None for state in output.hidden_states[0])
    assert len(output.hidden_states[0]) == 3  # embeddings and two layers


def test_last_states_alone_need_no_hook_on_each_layer():
    model = make_model()
    inputs = prepare_inputs(model.config, batch_size=1)
    states = model(**inputs, output_hidden_states=-1).hidden_states
    model.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    assert not any(layer._forward_hooks for layer in model.model.language_model.layers)
    # What the library records, in its form: None where nothing was asked for.
    every = model(**inputs, output_hidden_states=True).hidden_states
    assert states[:-1] == (None,) * (len(every) - 1)
    assert torch.equal(states[-1], every[-1])


def test_streamer_receives_prompt_and_every_token():
    class Collect(BaseStreamer):
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens.extend(value.flatten().tolist())

        def end(self):
            self.ended = True

    model, streamer = make_model(), Collect()
    inputs = prepare_inputs(model.config, batch_size=1)
    output = model.generate(
        **inputs, max_new_tokens=5, do_sample=False, streamer=streamer, return_dict_in_generate=True
    )
    assert streamer.ended
    assert streamer.tokens == output.sequences[0].tolist()


def test_encoders_run_once_under_four_beams_with_two_scenes():
    model = make_model()
    single = prepare_inputs(model.config, batch_size=2)
    inputs = two_scenes(single)
    counts = {}
    for name in ("vision_tower", "point_encoder", "drm"):
        module = getattr(model.model, name)
        module.register_forward_hook(lambda *_, name=name: counts.update({name: counts.get(name, 0) + 1}))
    output = model.generate(
        **inputs,
        max_new_tokens=4,
        num_beams=4,
        do_sample=False,
        return_dict_in_generate=True,
        logits_processor=[Favour(8.0)],
    )
    # The vision tower runs once for images and once for the frames of both scenes.
    assert counts == {"vision_tower": 2, "point_encoder": 1, "drm": 1}
    assert_values_match(output, teacher_forced_values(model, inputs, output))


def two_scenes(inputs: dict) -> dict:
    """The two samples of a batch as the two scenes of one sample, and the same in the other order as a second one."""
    scene_start = 9
    text_start = scene_start + 2 * 9 + 4
    ids, types = inputs["input_ids"], inputs["mm_token_type_ids"]
    joined = {}
    for name, tensor in inputs.items():
        if tensor.ndim > 1 and tensor.shape[1] == 1 and name != "attention_mask":
            scenes = tensor[:, 0]
            joined[name] = torch.stack([scenes, scenes.flip(0)])
    for name, tensor in (("input_ids", ids), ("mm_token_type_ids", types)):
        scene = tensor[:1, scene_start:text_start].expand(2, -1)
        joined[name] = torch.cat([tensor[:, :scene_start], scene, scene, tensor[:, text_start:]], dim=1)
    joined["attention_mask"] = torch.ones_like(joined["input_ids"])
    joined["pixel_values"] = inputs["pixel_values"]
    return joined


def test_history_of_values_is_fed_back_when_generating():
    model = make_model(drh_config={"value_feedback": True})
    inputs = prepare_inputs(model.config, batch_size=1, has_control_tokens=True)
    history = torch.full((1, inputs["input_ids"].shape[1], 7), torch.nan)
    position = (inputs["input_ids"][0] == REG_TOKEN).nonzero().item()
    history[0, position, 0] = 2.5
    scores = []
    for value in (2.5, 40.0):
        history[0, position, 0] = value
        output = model.generate(
            **inputs,
            regression_targets=history.clone(),
            max_new_tokens=2,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        teacher = model(**inputs, feedback_values=history).logits[:, -1]
        torch.testing.assert_close(output.logits[0], teacher, atol=1e-4, rtol=1e-4)
        scores.append(teacher)
    assert (scores[0] - scores[1]).abs().max() > 1e-3
