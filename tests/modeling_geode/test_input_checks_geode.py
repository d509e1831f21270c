# SPDX-License-Identifier: Apache-2.0
"""Tensors of a caller: what is wrong raises by name before anything runs, and what is right costs nothing in decoding."""

import functools
import re

import pytest
import torch
from transformers import DynamicCache, StaticCache, set_seed

from geode.modeling_geode import generation_geode, modeling_geode
from geode.modeling_geode.input_checks_geode import check_finite, check_prompt
from geode.modeling_geode.modeling_geode import GeodeForConditionalGeneration
from tests.modeling_geode.common_geode import IMAGE_TOKEN, prepare_inputs, tiny_config


CLOUD = ("point_features", "point_coords", "point_grid_coords", "point_mask")
TEXT = torch.tensor([[11, 12, 13, 14, 15], [21, 22, 23, 24, 25]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


@pytest.fixture(scope="module")
def model() -> GeodeForConditionalGeneration:
    set_seed(0)
    model = GeodeForConditionalGeneration(tiny_config()).eval()
    model.generation_config.pad_token_id = 0
    return model


@pytest.fixture(scope="module")
@torch.no_grad()
def batches(model) -> dict[str, dict[str, torch.Tensor]]:
    """Inputs with every tensor that the tiny model takes: with pixels and clouds, and with what was made of them."""
    raw = prepare_inputs(model.config, has_control_tokens=True)
    raw["labels"] = raw["input_ids"].clone()
    raw["regression_targets"] = torch.full((*raw["input_ids"].shape, 7), torch.nan)
    raw["position_ids"] = torch.arange(raw["input_ids"].shape[1]).expand(len(raw["input_ids"]), -1)
    raw["video_frame_mask"] = torch.ones(raw["pixel_values_videos"].shape[:3], dtype=torch.bool)
    raw["scene_mask"] = torch.ones(raw["pixel_values_videos"].shape[:2], dtype=torch.bool)
    features = {name: tensor for name, tensor in raw.items() if name not in (*CLOUD, "pixel_values_videos")}
    features["video_features"] = model.get_video_features(raw["pixel_values_videos"]).last_hidden_state
    features |= model.get_point_tokens(**{name: raw[name] for name in CLOUD})
    given = {name: tensor for name, tensor in features.items() if not name.startswith(("point_", "camera_"))}
    given["rationale_features"] = model(**raw).rationale_hidden_states
    return {"raw": raw, "features": features, "rationale": given}


def test_what_is_right_passes(model, batches):
    """The three forms say the same of the same scenes, so no check is in the way of any."""
    with torch.no_grad():
        raw, features, given = (model(**batches[name]).logits for name in ("raw", "features", "rationale"))
    torch.testing.assert_close(features, raw, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(given, raw, atol=1e-4, rtol=1e-4)


def spoilt(tensor: torch.Tensor):
    """Every way in which a shape can be wrong: a dimension less, one more, one that is empty, one that is cut."""
    yield tensor[0]
    yield tensor[None, None, None]
    for axis, size in enumerate(tensor.shape):
        yield tensor.narrow(axis, 0, 0)
        if size > 1:
            yield tensor.narrow(axis, 0, size - 1)


@pytest.mark.parametrize("form", ["raw", "features", "rationale"])
def test_every_tensor_of_a_wrong_shape_raises_with_names_and_shape(model, batches, form):
    batch = batches[form]
    for name, tensor in batch.items():
        for wrong in spoilt(tensor):
            with pytest.raises(ValueError) as caught:
                model(**{**batch, name: wrong})
            message = str(caught.value)
            # Its own name, or that of what it no longer fits: a tensor is compared with those before it.
            assert re.search(r"^`\w+` must have|^Images must have|^Image features|^Each scene takes", message), message
            assert re.search(r"got [(\[]|\d+ features", message), message


@pytest.mark.parametrize("form", ["raw", "features", "rationale"])
def test_every_tensor_that_is_none_or_of_another_kind_raises_its_name(model, batches, form):
    for name, tensor in batches[form].items():
        with pytest.raises(TypeError, match=f"`{name}` must be a tensor, got list"):
            model(**{**batches[form], name: [1]})
        if tensor.dtype == torch.bool:
            with pytest.raises(TypeError, match=rf"`{name}` must hold booleans, got torch.int64. .*`\.bool\(\)`"):
                model(**{**batches[form], name: tensor.long()})
        elif not tensor.is_floating_point() and name not in ("attention_mask", "position_ids"):
            with pytest.raises(TypeError, match=rf"`{name}` must hold .*whole numbers, got torch.float32"):
                model(**{**batches[form], name: tensor.float()})


@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("raw", "pixel_values"),
        ("raw", "pixel_values_videos"),
        ("raw", "camera_poses"),
        ("raw", "log_scale"),
        ("features", "video_features"),
        ("rationale", "rationale_features"),
    ],
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_one_value_that_is_not_finite_raises(model, batches, form, name, value):
    wrong = batches[form][name].clone()
    wrong.view(-1)[-1] = value
    with pytest.raises(ValueError, match=f"must be finite, got 1 values that are not, of {wrong.numel()}"):
        model(**{**batches[form], name: wrong})


def test_what_is_masked_need_not_be_finite(model, batches):
    """A padded frame and a scale that is not known are never read."""
    inputs = dict(batches["features"])
    inputs["video_features"] = torch.nn.functional.pad(inputs["video_features"], (0, 0, 0, 0, 0, 1), value=torch.nan)
    inputs["video_frame_mask"] = torch.nn.functional.pad(inputs["video_frame_mask"], (0, 1))
    inputs["scale_known"] = torch.zeros_like(inputs["scale_known"])
    inputs["log_scale"] = torch.full_like(inputs["log_scale"], torch.nan)
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_sum_that_overflows_is_no_infinity(dtype):
    check_finite("Numbers", torch.full((3000,), torch.finfo(dtype).max, dtype=dtype), "")
    check_finite("Numbers", torch.tensor([3e38, 3e38, -1.0]), "")
    with pytest.raises(ValueError, match="Numbers must be finite, got 2 values that are not, of 3"):
        check_finite("Numbers", torch.tensor([torch.inf, -torch.inf, 1.0], dtype=dtype), "")


def test_masks_may_cover_a_cache_and_pairs(model):
    cache = DynamicCache()
    pairs = torch.ones(1, 1, 5, 9, dtype=torch.bool)
    check_prompt(model.config, TEXT, attention_mask=torch.ones(2, 9), past_key_values=cache)
    check_prompt(model.config, TEXT, attention_mask=pairs, past_key_values=cache)
    check_prompt(model.config, TEXT, attention_mask={"full_attention": pairs})
    check_prompt(model.config, TEXT, attention_mask=pairs[..., :5], position_ids=torch.arange(5)[None])
    for mask, has_cache in (
        (torch.ones(2, 9), False),
        (torch.ones(2, 4), True),
        (pairs, False),
        (pairs[:, :, 1:], True),
    ):
        with pytest.raises(ValueError, match=rf"`attention_mask` must have .*got {re.escape(str(tuple(mask.shape)))}"):
            check_prompt(
                model.config, TEXT, attention_mask=mask, past_key_values=DynamicCache() if has_cache else None
            )


def test_placeholders_behind_a_cache_of_their_media_raise_only_if_new(model, batches):
    """The media of an earlier turn are in the cache; those of a new one must come with it."""
    inputs = {name: tensor for name, tensor in batches["raw"].items() if name not in ("labels", "regression_targets")}
    inputs.pop("position_ids")
    with torch.no_grad():
        cache = model(**inputs, past_key_values=DynamicCache()).past_key_values
    longer = torch.cat([inputs["input_ids"], TEXT[:1].expand(3, -1)], dim=1)
    output = model.generate(longer, past_key_values=cache, max_new_tokens=1)
    assert output.shape == (3, longer.shape[1] + 1)
    new = longer.clone()
    new[:, -2] = IMAGE_TOKEN
    cache.crop(inputs["input_ids"].shape[1] - cache.get_seq_length())
    with pytest.raises(ValueError, match=r"has 3 placeholders \(token 3\)"):
        model.generate(new, past_key_values=cache, max_new_tokens=1)


def one_layer() -> GeodeForConditionalGeneration:
    """As little to trace as there can be: the checks are the same."""
    set_seed(0)
    return GeodeForConditionalGeneration(tiny_config(text_config={"num_hidden_layers": 1})).eval()


def counted(monkeypatch) -> dict[str, int]:
    """Count the calls of the checks that a prompt goes through; they run all the same."""
    counts = {}

    def watch(module, name):
        check = getattr(module, name)

        @functools.wraps(check)
        def call(*args, **kwargs):
            counts[name] = counts.get(name, 0) + 1
            return check(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    for module in (modeling_geode, generation_geode):
        for name in ("check_prompt", "check_token_values", "check_no_placeholders"):
            watch(module, name)
    return counts


@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
def test_only_the_prompt_is_checked_and_no_step_behind_a_cache(model, monkeypatch, cache):
    counts = counted(monkeypatch)
    options = {"none": {"use_cache": False}, "static": {"cache_implementation": "static", "disable_compile": True}}
    model.generate(
        TEXT, attention_mask=MASK, max_new_tokens=6, min_new_tokens=6, do_sample=False, **options.get(cache, {})
    )
    # Once by `generate` and once by the first forward; without a cache every forward is of a whole prompt.
    expected = 1 + (6 if cache == "none" else 1)
    assert counts == {"check_prompt": expected, "check_token_values": expected, "check_no_placeholders": expected}


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_a_step_of_a_loop_by_hand_is_not_checked(model, monkeypatch, kind):
    cache = kind() if kind is DynamicCache else kind(config=model.config.text_config, max_cache_len=9)
    with torch.no_grad():
        output = model(TEXT, attention_mask=MASK, past_key_values=cache)
        counts = counted(monkeypatch)
        token = output.logits[:, -1:].argmax(dim=-1)
        model(token, attention_mask=torch.nn.functional.pad(MASK, (0, 1), value=1), past_key_values=cache)
        assert not counts
        # The usual slip: a token of each row without the dimension of the sequence.
        with pytest.raises(ValueError, match=r"got \(2,\)\. It lacks a dimension"):
            model(token[:, 0], past_key_values=cache)


@torch.no_grad()
def test_checks_are_traced_in_one_graph():
    model = one_layer()
    options = {"return_regression_values": False, "use_cache": False}
    expected = model(TEXT, attention_mask=MASK, **options).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(TEXT, attention_mask=MASK, **options).logits, expected)
    torch._dynamo.reset()
    with pytest.raises(ValueError, match=r"`attention_mask` must have shape .*got \(2, 4\)"):
        torch.compile(model, backend="eager")(TEXT, attention_mask=MASK[:, 1:], **options)
    torch._dynamo.reset()


class Logits(torch.nn.Module):
    """The model with the outputs that an exported program can have."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(
            input_ids, attention_mask=attention_mask, return_regression_values=False, use_cache=False
        ).logits


@torch.no_grad()
def test_checks_leave_an_exported_program_free_in_its_length():
    model = one_layer()
    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(Logits(model), (TEXT, MASK), dynamic_shapes=({1: length}, {1: length}), strict=False)
    longer, mask = torch.cat([TEXT, TEXT + 30], dim=1), torch.cat([MASK, torch.ones_like(MASK)], dim=1)
    torch.testing.assert_close(program.module()(longer, mask), Logits(model)(longer, mask), atol=1e-5, rtol=1e-5)
