# SPDX-License-Identifier: Apache-2.0
"""Weights of the language model in 8 and 4 bits, as users load them. The oracle is the float32 model on the same questions."""

import json
import logging

import pytest
import torch
from torch import nn
from transformers import AutoProcessor, BitsAndBytesConfig, GPTQConfig, TorchAoConfig

from geode import embedded_scene, tiny_checkpoint
from geode.data.synthetic_rooms.questions import prompt_of
from geode.modeling_geode.modeling_geode import GeodeForConditionalGeneration, GeodeModel
from geode.modeling_geode.quantization_geode import UNQUANTIZED, quantize_language_model_only


bitsandbytes = pytest.importorskip("bitsandbytes", reason="the extra `quantization`")
torchao = pytest.importorskip("torchao.quantization", reason="the extra `quantization`")

INT4 = {"weight_dtype": torch.int4, "granularity": torchao.PerGroup(32)}
QUANTIZERS = {
    "bitsandbytes, 8 bits": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "bitsandbytes, 4 bits": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "torchao, 8 bits": lambda: TorchAoConfig(torchao.Int8WeightOnlyConfig()),
    "torchao, 4 bits": lambda: TorchAoConfig(torchao.IntxWeightOnlyConfig(**INT4)),
}
# Relative differences of regressed values to float32's: the median over the questions, and the largest. docs/deployment.md.
BOUNDS = {"8 bits": (0.01, 0.03), "4 bits": (0.05, 0.2)}


def load(quantization_config=None, *, name=None, dtype=torch.float32, model_class=GeodeForConditionalGeneration):
    # It logs each cast to half precision.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    name = tiny_checkpoint() if name is None else name
    return model_class.from_pretrained(name, dtype=dtype, quantization_config=quantization_config).eval()


@pytest.fixture(scope="module")
def plain() -> GeodeForConditionalGeneration:
    return load()


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(tiny_checkpoint())


@pytest.fixture(scope="module")
def scene(plain, processor):
    room = embedded_scene()
    return plain.encode_scene(**processor.prepare_scene(video=room / "room.mp4", geometry=room / "geometry"))


@pytest.fixture(scope="module")
def questions(plain, processor, scene) -> dict:
    """Inputs of the questions about the embedded scene whose answer is a number, each ending in `<REG>`."""
    rows = map(json.loads, (embedded_scene() / "questions.jsonl").read_text(encoding="utf-8").splitlines())
    texts = [{"type": "text", "text": prompt_of(row)} for row in rows if row["value_si"] is not None]
    inputs = processor.apply_chat_template(
        [[{"role": "user", "content": [{"type": "scene", "scene": scene}, text]}] for text in texts],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        padding=True,
    )
    control = torch.full((len(texts), 1), plain.config.control_tokens["<REG>"]["token_id"])
    added = {"input_ids": control, "attention_mask": torch.ones_like(control), "mm_token_type_ids": 0 * control}
    inputs = {name: torch.cat([inputs[name], value], dim=1) for name, value in added.items()}
    return {**inputs, **scene.to_model_inputs(len(texts))}


@torch.no_grad()
def values(model, questions) -> torch.Tensor:
    return model(**questions).regression_values[:, -1, 0]


@pytest.mark.parametrize(
    "name",
    [
        "bitsandbytes, 4 bits",
        "torchao, 8 bits",
        pytest.param("bitsandbytes, 8 bits", marks=pytest.mark.slow),
        pytest.param("torchao, 4 bits", marks=pytest.mark.slow),
    ],
)
def test_quantised_values_are_near_those_of_float32_and_survive_a_folder(name, plain, questions, tmp_path):
    expected = values(plain, questions)
    model = load(QUANTIZERS[name]())
    model.save_pretrained(tmp_path)
    got = values(model, questions)
    differences = ((got - expected) / expected).abs()
    median, largest = BOUNDS[name.split(", ")[1]]
    assert len(expected) == 10
    assert 0 < differences.median() <= median, differences
    assert differences.max() <= largest, differences
    assert torch.equal(values(load(name=tmp_path), questions), got)


@pytest.mark.parametrize(
    ("name", "dtype"), [("bitsandbytes, 4 bits", torch.bfloat16), ("torchao, 8 bits", torch.float32)]
)
def test_every_layer_of_the_language_model_is_quantised_and_nothing_else(name, dtype):
    plain, model = load(dtype=dtype), load(QUANTIZERS[name](), dtype=dtype)
    prefix = "model.language_model.layers."
    layers = {key for key, module in plain.named_modules() if isinstance(module, nn.Linear) and key.startswith(prefix)}
    weights = dict(model.named_parameters())
    assert len(layers) == 7 * plain.config.text_config.num_hidden_layers
    for key, want in plain.named_parameters():
        if key.removesuffix(".weight") in layers:
            assert type(weights[key]).__name__ in ("Params4bit", "Int8Tensor"), key
        else:
            assert type(weights[key]) is nn.Parameter, key
            assert weights[key].dtype == want.dtype, key
            assert torch.equal(weights[key], want), key
    assert {weight.dtype for key, weight in weights.items() if key.startswith("drh.")} == {torch.float32}


@pytest.mark.parametrize("name", ["bitsandbytes, 8 bits", "torchao, 8 bits"])
def test_a_kept_prefix_is_the_quantised_models_own(name, plain, processor, scene):
    model = load(QUANTIZERS[name]())
    asked = ["How many chairs are in this room?", "What is the size of this room (in square meters)?"]
    kept = model.prefill_scene(processor, scene)
    answers = [[answer.text for answer in model.ask(processor, given, asked)] for given in (scene, kept)]
    assert answers[0] == answers[1]
    with pytest.raises(ValueError, match="computed by another language model"):
        plain.ask(processor, kept, asked)


def test_a_4_bit_weight_that_was_packed_for_the_cpu_is_not_read(questions, tmp_path):
    if not bitsandbytes.functional.has_avx512bf16():
        pytest.skip("bitsandbytes packs weights on CPUs with AVX512-BF16 only")
    model = load(QUANTIZERS["bitsandbytes, 4 bits"]())
    values(model, questions)
    before = values(model, questions)
    with pytest.raises(
        ValueError, match=r"Saving needs .*has packed `model\.language_model\.layers\.0\.self_attn\.q_proj\.weight`"
    ):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"A digest needs .*has packed `layers\.0\..* just been loaded"):
        model.model.language_digest()
    assert torch.equal(values(model, questions), before)


def test_the_base_model_keeps_its_encoders_too():
    model = load(QUANTIZERS["torchao, 8 bits"](), model_class=GeodeModel)
    quantised = {name for name, weight in model.named_parameters() if type(weight) is not nn.Parameter}
    assert {name.split(".")[0] for name in quantised} == {"language_model"}


def test_the_callers_list_is_added_to():
    given = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head", "model.language_model.layers.0"])
    made = quantize_language_model_only(given)
    assert made.llm_int8_skip_modules == ["lm_head", "model.language_model.layers.0", *UNQUANTIZED[1:]]
    assert given.llm_int8_skip_modules == ["lm_head", "model.language_model.layers.0"]
    from_dict = quantize_language_model_only({"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert from_dict.llm_int8_skip_modules == list(UNQUANTIZED)


def test_a_quantiser_that_would_take_the_head_is_refused():
    with pytest.raises(ValueError, match=r"got GPTQConfig without\. Use BitsAndBytesConfig or TorchAoConfig"):
        load(GPTQConfig(bits=4))
