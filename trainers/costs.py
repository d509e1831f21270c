# SPDX-License-Identifier: Apache-2.0
"""Arithmetic of a run: operations, memory and traffic, from counts of a model. Operations count a multiply-add as two."""

from typing import NamedTuple

from geode.trainers.plan_arguments import Assumptions


STRATEGIES = ("DDP", "FSDP2", "ZeRO-2", "ZeRO-3")


class ModelFacts(NamedTuple):
    """
    What is counted of a model.

    Args:
        parameters (`dict[str, int]`): Parameters of each part.
        trained (`dict[str, int]`): Trained ones of each part.
        layer_parameters, layer_trained (`int`): Those of the language model's layers.
        layer_last (`int`): Those of the last matrix of each layer, which checkpointing need not compute again.
        num_layers, text_width, attention_width, vocab_size (`int`): Of the language model; `attention_width` is heads
            times their width.
        trains_head (`bool`): The output layer, which may be the embedding, is trained.
        patches (`int`): Patches of a frame, without the class token.
        frame_tokens (`int`): Visual tokens of a frame.
        vision_layer_parameters, vision_layers, vision_width (`int`): Of the vision tower's blocks.
        drm_parameters (`dict[str, int]`): Of each part of the rationale module.
        drm_width, drm_layers, drm_context, pooling, num_rationale_tokens (`int`): Of the rationale module.
        point_stages (`tuple`): Parameters, blocks, width and window of each stage of the point encoder.
        reconstructor_flops (`int`): Operations for the frames of one scene; 0 where there is no reconstructor.
    """

    parameters: dict[str, int]
    trained: dict[str, int]
    layer_parameters: int
    layer_trained: int
    layer_last: int
    num_layers: int
    text_width: int
    attention_width: int
    vocab_size: int
    trains_head: bool
    patches: int
    frame_tokens: int
    vision_layer_parameters: int
    vision_layers: int
    vision_width: int
    drm_parameters: dict[str, int]
    drm_width: int
    drm_layers: int
    drm_context: int
    pooling: int
    num_rationale_tokens: int
    point_stages: tuple[tuple[int, int, int, int], ...]
    reconstructor_flops: int


class Workload(NamedTuple):
    """
    What a recipe asks of a model.

    Args:
        frames, geometry_frames (`int`): Frames for the language model and for the reconstructor.
        questions (`int`): Questions of a row.
        rows_per_device (`int`): Rows of a micro-batch.
        accumulation (`int`): Micro-batches of a step.
        shows_frames (`bool`): The language model gets visual tokens.
        uses_geometry (`bool`): There are rationale tokens.
        reads_store (`bool`): Encoders' features are read, not made.
        has_checkpointing (`bool`): Activations are computed again in the backward pass.
        weight_bytes (`int`): Of a parameter.
    """

    frames: int
    geometry_frames: int
    questions: int
    rows_per_device: int
    accumulation: int
    shows_frames: bool
    uses_geometry: bool
    reads_store: bool
    has_checkpointing: bool
    weight_bytes: int


def row_tokens(facts: ModelFacts, work: Workload, text_tokens: int) -> int:
    """Tokens of a row: the scene once, and each of its questions."""
    scene = work.frames * facts.frame_tokens * work.shows_frames + facts.num_rationale_tokens * work.uses_geometry
    return scene + text_tokens * work.questions


# ---- operations ----


def transformer_flops(parameters: int, tokens: int, *, layers: int, width: int) -> tuple[int, int]:
    """
    Operations of a forward pass through transformer blocks.

    Args:
        parameters (`int`): Parameters of the blocks.
        tokens (`int`): Tokens of one sequence.
        layers (`int`): Blocks.
        width (`int`): Heads times their width.

    Returns:
        Those of the matrices, and those of attention over all pairs: a packed row's mask is dense, so nothing is skipped.

    Example:
        >>> transformer_flops(1000, 10, layers=2, width=8)
        (20000, 6400)
    """
    return 2 * parameters * tokens, 4 * layers * tokens**2 * width


def training_flops(facts: ModelFacts, work: Workload, text_tokens: int) -> float:
    """
    Operations of one row, forward and backward, in language model, projector and rationale module.

    The gradient passes through the whole language model in every stage, because what feeds it is trained; that of a frozen
    matrix is not computed. Attention has no weights, and its backward pass takes twice its forward pass.
    """
    tokens = row_tokens(facts, work, text_tokens)
    linear, attention = transformer_flops(
        facts.layer_parameters, tokens, layers=facts.num_layers, width=facts.attention_width
    )
    again = int(work.has_checkpointing)
    # PyTorch stops computing a layer again at the last tensor that the backward pass needs.
    repeated = again * 2 * (facts.layer_parameters - facts.layer_last) * tokens
    total = 2 * linear + repeated + 2 * facts.layer_trained * tokens + attention * (3 + again)
    total += 2 * tokens * facts.vocab_size * facts.text_width * (2 + facts.trains_head)
    if work.shows_frames:
        projector = 2 * facts.parameters["multi_modal_projector"] * work.frames * facts.frame_tokens
        total += projector * (2 if facts.trained["multi_modal_projector"] else 1)
    if work.uses_geometry:
        total += rationale_flops(facts, work.frames) * (3 + again if facts.trained["drm"] else 1)
    return total


def rationale_flops(facts: ModelFacts, frames: int) -> float:
    """
    Operations of the rationale module for one scene, its scan without weights left out.

    Patches are queries, the context gives keys and values, and what follows runs on pooled patches.
    """
    patches = frames * facts.patches
    pooled = patches // facts.pooling**2 + facts.num_rationale_tokens
    keys = 2 * facts.drm_layers * facts.drm_width**2
    tokens = {"query_projection": patches, "cross_attention_layers": patches, "context_encoder": facts.drm_context}
    linear = sum(2 * count * tokens.get(name, pooled) for name, count in facts.drm_parameters.items())
    linear -= 2 * keys * (patches - facts.drm_context)
    return linear + 4 * facts.drm_layers * patches * facts.drm_context * facts.drm_width


def encoder_flops(facts: ModelFacts, work: Workload, assumptions: Assumptions) -> dict[str, float]:
    """Operations of the frozen encoders for one scene, forward only, whether a store has them or not."""
    tokens = facts.patches + 1
    vision = work.frames * sum(
        transformer_flops(facts.vision_layer_parameters, tokens, layers=facts.vision_layers, width=facts.vision_width)
    )
    if not work.uses_geometry:
        return {"vision_tower": vision, "point_encoder": 0.0, "reconstructor": 0.0}
    last = max(len(facts.point_stages) - 1, 1)
    ratio = assumptions.point_tokens / assumptions.points
    points = 0.0
    for index, (parameters, blocks, width, window) in enumerate(facts.point_stages):
        count = assumptions.points * ratio ** (index / last)
        points += 2 * parameters * count + 4 * blocks * count * min(count, window) * width
    return {"vision_tower": vision, "point_encoder": points, "reconstructor": float(facts.reconstructor_flops)}


# ---- memory ----


def state_bytes(weights: int, trained: int, *, weight_bytes: float, optimizer_states: float) -> tuple[float, float]:
    """Bytes of the weights, and of gradients and optimiser, where nothing is sharded."""
    return weights * weight_bytes, trained * weight_bytes * (1 + optimizer_states)


def activation_bytes(
    tokens: int, *, layers: int, width: int, vocab_size: int, has_checkpointing: bool, assumptions: Assumptions
) -> tuple[float, float]:
    """
    Bytes of the language model's activations and of its logits.

    Source: Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (2022), section 4.1, for the
    34 bytes of a layer in half precision, attention without its matrix.

    Args:
        tokens (`int`): Tokens of a micro-batch.
        layers (`int`): Layers.
        width (`int`): Width.
        vocab_size (`int`): Words.
        has_checkpointing (`bool`): Only the layers' inputs are kept, and one layer at a time is whole.
        assumptions ([`Assumptions`]): Bytes for each token.

    Returns:
        Both.
    """
    layer = tokens * width * assumptions.layer_bytes
    kept = tokens * width * assumptions.kept_bytes
    return (
        layers * kept + layer if has_checkpointing else layers * layer,
        tokens * vocab_size * assumptions.logit_bytes,
    )


def rank_bytes(
    strategy: str, facts: ModelFacts, work: Workload, assumptions: Assumptions, *, devices: int
) -> dict[str, float]:
    """
    Memory of one process.

    FSDP2 has units as `configuration/accelerate/fsdp2.yaml` makes them: the language model's layers, and everything else,
    which is whole in half precision from the first forward pass on, its gradients too. ZeRO is DeepSpeed's in bf16.

    Args:
        strategy (`str`): One of `STRATEGIES`.
        facts ([`ModelFacts`]): The model.
        work ([`Workload`]): The recipe.
        assumptions ([`Assumptions`]): The assumptions.
        devices (`int`): Processes, over which is sharded.

    Returns:
        `dict[str, float]`: Bytes of `weights`, `states` (gradients and optimiser), `gathered` (copies), `activations` and
        `overhead`.
    """
    total, trained = sum(facts.parameters.values()), sum(facts.trained.values())
    weights, states = state_bytes(
        total, trained, weight_bytes=work.weight_bytes, optimizer_states=assumptions.optimizer_states
    )
    copies = assumptions.autocast_bytes if work.weight_bytes == 4 else 0.0
    if strategy == "DDP":
        gathered = trained * (assumptions.ddp_buckets * work.weight_bytes + copies)
    elif strategy == "FSDP2":
        weights, states = weights / devices, states / devices
        units = assumptions.fsdp_units * facts.layer_parameters / facts.num_layers
        gathered = 2 * (total - facts.layer_parameters + units + trained - facts.layer_trained)
    elif strategy in ("ZeRO-2", "ZeRO-3"):
        shared = devices if strategy == "ZeRO-3" else 1
        weights = 2 * total / shared
        states = trained * (2 + assumptions.zero_master_bytes) / devices
        gathered = 2 * min(total, assumptions.zero3_live) if strategy == "ZeRO-3" else 0.0
    else:
        raise ValueError(f"`strategy` must be one of {STRATEGIES}, got {strategy!r}.")
    activations = activation_bytes(
        row_tokens(facts, work, assumptions.text_tokens) * work.rows_per_device,
        layers=facts.num_layers,
        width=facts.text_width,
        vocab_size=facts.vocab_size,
        has_checkpointing=work.has_checkpointing,
        assumptions=assumptions,
    )
    return {
        "weights": weights,
        "states": states,
        "gathered": gathered,
        "activations": sum(activations),
        "overhead": assumptions.overhead_gb * 1e9,
    }


# ---- data and traffic ----


def stored_scene_bytes(
    *,
    point_tokens: int,
    point_width: int,
    cameras: int,
    frames: int,
    patches: int,
    vision_width: int,
    feature_bytes: int,
) -> dict[str, int]:
    """
    Bytes of one scene in a feature store, without names and headers.

    Returns:
        `dict[str, int]`: Of the point encoder's `points` (tokens, positions, cameras, scale and map), and of the `vision`
        tower's features.
    """
    points = point_tokens * (point_width * feature_bytes + 12) + 44 * cameras
    return {"points": points, "vision": frames * patches * vision_width * feature_bytes}


def sent_bytes(strategy: str, facts: ModelFacts, work: Workload, *, devices: int) -> float:
    """
    Bytes that one process sends in one optimiser step, by ring algorithms.

    DDP sums gradients once a step. FSDP2 gathers the weights of the layers in half precision twice for each micro-batch and
    everything else once, and scatters gradients in half precision for each.
    """
    share = (devices - 1) / devices
    trained = sum(facts.trained.values())
    if strategy == "DDP":
        return 2 * share * trained * work.weight_bytes
    if strategy == "FSDP2":
        layers = 2 * 2 * facts.layer_parameters
        rest = 2 * (sum(facts.parameters.values()) - facts.layer_parameters)
        return share * work.accumulation * (layers + rest + 2 * trained)
    raise ValueError(f"`strategy` must be DDP or FSDP2, got {strategy!r}.")


__all__ = [
    "STRATEGIES",
    "ModelFacts",
    "Workload",
    "activation_bytes",
    "encoder_flops",
    "rank_bytes",
    "rationale_flops",
    "row_tokens",
    "sent_bytes",
    "state_bytes",
    "stored_scene_bytes",
    "training_flops",
    "transformer_flops",
]
