# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of plans, against PyTorch's own counter of operations and against tensors that are really there."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Config, Qwen2Model

from geode.configuration.configuration_geode import GeodeConfig
from geode.trainers.costs import (
    ModelFacts,
    Workload,
    activation_bytes,
    encoder_flops,
    rank_bytes,
    rationale_flops,
    row_tokens,
    sent_bytes,
    training_flops,
    transformer_flops,
)
from geode.trainers.dry_run import model_on_meta
from geode.trainers.plan import count_model
from geode.trainers.plan_arguments import Assumptions
from geode.trainers.training_setup import freeze_except


LARGE = Workload(
    frames=5,
    geometry_frames=3,
    questions=7,
    rows_per_device=2,
    accumulation=3,
    shows_frames=True,
    uses_geometry=False,
    reads_store=False,
    has_checkpointing=True,
    weight_bytes=4,
)


@pytest.fixture(scope="module")
def large():
    """geode-1.5b without memory, its language model, projector and regression head trained."""
    config = GeodeConfig()
    model = model_on_meta(config)
    freeze_except(model, ["model.language_model", "model.multi_modal_projector", "drh"])
    return model, config, count_model(model, config, LARGE, (392, 518))


def counted(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def facts_of_text(**changes) -> ModelFacts:
    """A language model of easy numbers, and nothing else."""
    values = dict.fromkeys(ModelFacts._fields, 0)
    parts = {"language_model": 1100, "multi_modal_projector": 0, "drm": 0}
    values |= {"parameters": parts, "trained": parts, "drm_parameters": {}}
    values |= {"layer_parameters": 1000, "layer_trained": 1000, "num_layers": 4, "text_width": 8, "attention_width": 6}
    values |= {"vocab_size": 11, "trains_head": True, "frame_tokens": 10, "pooling": 1, "point_stages": ()}
    return ModelFacts(**{**values, **changes})


def test_parameters_are_those_of_the_model_and_each_is_counted_once(large):
    model, _, facts = large
    assert sum(facts.parameters.values()) == model.num_parameters()
    assert sum(facts.trained.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    # Qwen2.5-1.5B by hand: 1536 wide, 12 heads and 2 key heads of 128, MLP of 8960; biases of q, k, v; two norms.
    attention = 1536 * 1536 + 2 * 256 * 1536 + 1536 + 2 * 256 + 1536 * 1536
    assert facts.layer_parameters == 28 * (attention + 3 * 1536 * 8960 + 2 * 1536)
    assert facts.layer_last == 28 * 1536 * 8960
    assert facts.parameters["language_model"] == facts.layer_parameters + 151936 * 1536 + 1536


def test_forward_operations_are_those_that_pytorch_counts_at_full_width(large):
    model, _, facts = large
    tokens = 300
    with torch.no_grad(), torch.device("meta"):
        embeds, mask = torch.empty(1, tokens, 1536), torch.empty(1, 1, tokens, tokens)
        text = counted(lambda: model.model.language_model(inputs_embeds=embeds, attention_mask=mask, use_cache=False))
        frame = torch.empty(1, 3, 448, 448)
        vision = counted(lambda: model.model.vision_tower(pixel_values=frame))
    expected = transformer_flops(facts.layer_parameters, tokens, layers=28, width=facts.attention_width)
    # Norms and biases have parameters and no matrix product.
    assert text == pytest.approx(sum(expected), rel=2e-3)
    ours = encoder_flops(facts, LARGE._replace(frames=1), Assumptions())["vision_tower"]
    assert vision == pytest.approx(ours, rel=5e-3)


@pytest.mark.parametrize(("is_trained", "has_checkpointing"), [(True, False), (False, False), (True, True)])
def test_training_operations_are_those_that_pytorch_counts(is_trained, has_checkpointing):
    config = Qwen2Config(
        vocab_size=8, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation="eager",
    )  # fmt: skip
    model = Qwen2Model(config).train().requires_grad_(is_trained)
    if has_checkpointing:
        model.activation_checkpointing_enable()
    tokens = 37
    embeds = torch.randn(1, tokens, 48, requires_grad=True)
    weights = sum(p.numel() for p in model.layers.parameters() if p.dim() == 2)  # biases and norms are no matrices
    facts = facts_of_text(
        layer_parameters=weights,
        layer_trained=weights * is_trained,
        layer_last=3 * 48 * 80,
        num_layers=3,
        text_width=0,
        attention_width=48,
    )
    work = LARGE._replace(frames=0, questions=1, has_checkpointing=has_checkpointing)
    got = counted(lambda: model(inputs_embeds=embeds, use_cache=False).last_hidden_state.sum().backward())
    assert got == pytest.approx(training_flops(facts, work, text_tokens=tokens), rel=1e-3)


def test_rows_hold_the_scene_once_and_each_question():
    facts = facts_of_text(num_rationale_tokens=16)
    assert row_tokens(facts, LARGE, 96) == 5 * 10 + 7 * 96
    work = LARGE._replace(shows_frames=False, uses_geometry=True)
    assert row_tokens(facts, work, 96) == 16 + 7 * 96


def test_head_projector_and_rationale_module_count_as_they_are_trained():
    text = facts_of_text(layer_parameters=0, layer_trained=0, num_layers=0, trains_head=False)
    work = LARGE._replace(frames=0, has_checkpointing=False, questions=1)
    assert training_flops(text, work, 3) == 2 * 3 * 11 * 8 * 2
    assert training_flops(text._replace(trains_head=True), work, 3) == 2 * 3 * 11 * 8 * 3
    parts = {"multi_modal_projector": 100, "drm": 500}
    scene = text._replace(
        vocab_size=0, patches=40, pooling=2, drm_width=4, drm_layers=2, drm_context=9, num_rationale_tokens=3,
        parameters=parts, trained=parts, drm_parameters={"cross_attention_layers": 400, "mamba_layers": 100},
    )  # fmt: skip
    work = work._replace(frames=2)
    assert training_flops(scene, work, 3) == 2 * 100 * 20 * 2
    # 80 patches, 9 of context, 20 pooled and 3 queries; keys and values have 2 x 2 x 16 parameters.
    rationale = 2 * (400 - 64) * 80 + 2 * 64 * 9 + 2 * 100 * 23 + 4 * 2 * 80 * 9 * 4
    assert rationale_flops(scene, 2) == rationale
    with_geometry = training_flops(scene, work._replace(uses_geometry=True), 3)
    assert with_geometry == 2 * 100 * 20 * 2 + 3 * rationale
    frozen = scene._replace(trained={"multi_modal_projector": 0, "drm": 0})
    assert training_flops(frozen, work._replace(uses_geometry=True), 3) == 2 * 100 * 20 + rationale


def test_point_encoder_counts_each_stage_at_its_number_of_points():
    facts = facts_of_text(point_stages=((10, 1, 4, 1000), (20, 2, 8, 50)), reconstructor_flops=77)
    assumptions = Assumptions(points=400, point_tokens=100)
    flops = encoder_flops(facts, LARGE._replace(uses_geometry=True), assumptions)
    assert flops["point_encoder"] == 2 * 10 * 400 + 4 * 400 * 400 * 4 + 2 * 20 * 100 + 4 * 2 * 100 * 50 * 8
    assert flops["reconstructor"] == 77
    assert encoder_flops(facts, LARGE, assumptions)["reconstructor"] == 0


def test_activations_with_checkpointing_are_one_layer_and_the_inputs_of_all():
    options = {"layers": 3, "width": 5, "vocab_size": 7, "assumptions": Assumptions()}
    assert activation_bytes(10, has_checkpointing=False, **options) == (3 * 10 * 5 * 34, 10 * 7 * 10)
    assert activation_bytes(10, has_checkpointing=True, **options) == (3 * 10 * 5 * 2 + 10 * 5 * 34, 10 * 7 * 10)


def test_memory_of_a_process_by_strategy():
    facts = facts_of_text(parameters={"language_model": 1100, "vision_tower": 900, "multi_modal_projector": 0})
    plain = Assumptions(overhead_gb=0)
    ddp = rank_bytes("DDP", facts, LARGE, plain, devices=8)
    assert (ddp["weights"], ddp["states"], ddp["gathered"]) == (8000, 13200, 1100 * (4 + 2))
    sharded = rank_bytes("FSDP2", facts, LARGE, plain, devices=8)
    assert (sharded["weights"], sharded["states"]) == (1000, 1650)
    # All but the layers, two of four layers, and gradients of what is no layer, in half precision.
    assert sharded["gathered"] == 2 * (1000 + 500 + 100)
    zero2 = rank_bytes("ZeRO-2", facts, LARGE, plain, devices=8)
    assert (zero2["weights"], zero2["states"], zero2["gathered"]) == (4000, 1100 * 14 / 8, 0)
    zero3 = rank_bytes("ZeRO-3", facts, LARGE, plain, devices=8)
    assert (zero3["weights"], zero3["states"], zero3["gathered"]) == (500, 1100 * 14 / 8, 4000)
    limited = rank_bytes("ZeRO-3", facts, LARGE, dataclasses.replace(plain, zero3_live=10), devices=8)
    assert limited["gathered"] == 20
    tokens = row_tokens(facts, LARGE, 96) * 2
    assert ddp["activations"] == tokens * (4 * 8 * 2 + 8 * 34 + 11 * 10)
    half = rank_bytes("DDP", facts, LARGE._replace(weight_bytes=2), plain, devices=8)
    assert (half["weights"], half["gathered"]) == (4000, 2200)
    with pytest.raises(ValueError, match=r"`strategy` must be one of .* got 'ZeRO-1'"):
        rank_bytes("ZeRO-1", facts, LARGE, plain, devices=8)


def test_traffic_of_a_step():
    facts = facts_of_text(parameters={"language_model": 1100, "vision_tower": 900, "multi_modal_projector": 0})
    assert sent_bytes("DDP", facts, LARGE, devices=4) == 2 * 0.75 * 1100 * 4
    # Three micro-batches: layers twice, the rest once, gradients once, two bytes each.
    assert sent_bytes("FSDP2", facts, LARGE, devices=4) == 0.75 * 3 * (2 * 2 * 1000 + 2 * 1000 + 2 * 1100)
    assert sent_bytes("DDP", facts, LARGE, devices=1) == 0
    with pytest.raises(ValueError, match="`strategy` must be DDP or FSDP2, got 'ZeRO-2'"):
        sent_bytes("ZeRO-2", facts, LARGE, devices=4)
