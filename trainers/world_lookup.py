# SPDX-License-Identifier: Apache-2.0
"""
Teach a small rationale module to say what is where, before any language: localisation first, or nothing else is learned.

A look-up head asks E_spatio for every category at once: is it here, how many, since when, and where is its box if there is one
of it? A second, linear head asks each fused feature for the box of the object that its patches show. Both read what the
language model will read later, at a small part of its cost, and both are thrown away. So this stands for what large rationale
modules get from millions of rationales; it is our addition to the paper's stages, for models that have no such corpus.

Convention:
    - Boxes are in the space of the codec of `<3DBBOX>`.
    - Class 0 is the room; its row of the look-up asks for the floor's area.
"""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

from geode.data.feature_store import FeatureStore, StoredScene, collate_stored_scenes
from geode.modeling_geode.regression_geode import encode_values
from geode.trainers.world_encoders import BACKGROUND, fit


logger = logging.getLogger(__name__)

BOX_DIM = 8
LOG_AREA_MEAN = 3.0
MIN_PATCH_SHARE = 0.03  # of a pooled patch, for the box of its object to be learned
MIN_SCENE_SHARE = 1e-3  # of one pooled patch: what all patches together show less of, they do not show
MAX_INSTANCES = 256
# Weights of the terms beside the boxes of the look-up, which have 1.
WEIGHTS = {"box": 1.0, "presence": 0.3, "count": 1.0, "first": 0.3, "area": 0.3, "patch_class": 0.3, "patch_box": 1.0}


@dataclass(kw_only=True)
class LookupScene:
    """
    A scene's stored features and what can be looked up in it.

    Args:
        stored ([`StoredScene`]): Its features, those of the vision tower included.
        counts (`torch.Tensor` of shape `(num_classes,)`): Instances of each class.
        boxes (`torch.Tensor` of shape `(num_classes, 8)`): Encoded box of the classes that have one instance.
        first_seen (`torch.Tensor` of shape `(num_classes,)`): When each is first seen, as a share of the film.
        area (`torch.Tensor` of shape `()`): Standardised logarithm of the floor's area.
        patch_classes (`torch.Tensor` of shape `(num_tokens, num_classes)`): Share of each class in what each fused feature's
            patches show, where each object counts by the part of it that is there: small ones as much as large ones.
        patch_boxes (`torch.Tensor` of shape `(num_tokens, 8)`): Encoded box of the object of which the largest part is there.
        patch_mask (`torch.BoolTensor` of shape `(num_tokens,)`): Where there is one.
    """

    stored: StoredScene
    counts: torch.Tensor
    boxes: torch.Tensor
    first_seen: torch.Tensor
    area: torch.Tensor
    patch_classes: torch.Tensor
    patch_boxes: torch.Tensor
    patch_mask: torch.Tensor


def load_lookup_scene(
    data_root: str | Path,
    name: str,
    *,
    store: FeatureStore,
    classes: Sequence[str],
    entry: dict,
    grid: tuple[int, int],
) -> LookupScene:
    """
    Read what can be looked up in a scene.

    Args:
        data_root (`str` or `Path`): The data set.
        name (`str`): The scene.
        store ([`FeatureStore`]): Has its features, with those of the vision tower.
        classes (`Sequence[str]`): See `list_classes`.
        entry (`dict`): The control token of boxes, from `config.control_tokens`.
        grid (`tuple[int, int]`): Rows and columns of fused features of a frame.

    Returns:
        [`LookupScene`]: The scene.
    """
    stored = store.scene_of(f"rooms/{name}.mp4")
    with safe_open(Path(data_root) / "depth" / f"{name}.safetensors", "pt") as file:
        record, ids = json.loads(file.metadata()["scene"]), file.get_tensor("instance_ids")
    frames = ((torch.arange(stored.num_frames) + 0.5) * len(ids) / stored.num_frames).long()
    fields = lookup_targets(record, ids[frames], classes=classes, entry=entry, grid=grid)
    return LookupScene(stored=stored, **fields)


def lookup_targets(
    record: dict, instance_ids: torch.Tensor, *, classes: Sequence[str], entry: dict, grid: tuple[int, int]
) -> dict[str, torch.Tensor]:
    """
    Make the targets of a scene.

    Args:
        record (`dict`): The scene's record.
        instance_ids (`torch.Tensor` of shape `(num_frames, height, width)`): Object of each pixel, 0 for the room.
        classes (`Sequence[str]`): See `list_classes`. Objects of other categories are part of the room.
        entry (`dict`): The control token of boxes.
        grid (`tuple[int, int]`): Rows and columns of fused features of a frame.

    Returns:
        `dict[str, torch.Tensor]`: Fields of [`LookupScene`].
    """
    num_film_frames = record["camera"]["num_frames"]
    class_of = torch.zeros(MAX_INSTANCES, dtype=torch.long)
    box_of = torch.zeros(MAX_INSTANCES, BOX_DIM)
    counts, first = torch.zeros(len(classes)), torch.ones(len(classes))
    boxes = torch.zeros(len(classes), BOX_DIM)
    for found in record["objects"]:
        if found["category"] not in classes:
            continue
        row = classes.index(found["category"])
        box = encode_values(torch.tensor(found["box"]), entry)
        class_of[found["id"]], box_of[found["id"]] = row, box
        counts[row] += 1
        boxes[row] = box
        seen = min(found["visible_frames"], default=num_film_frames) / num_film_frames
        first[row] = min(float(first[row]), seen)
    pixels = F.one_hot(instance_ids.long(), MAX_INSTANCES).float().permute(0, 3, 1, 2)
    shares = F.adaptive_avg_pool2d(pixels, grid).flatten(2).transpose(1, 2).flatten(0, 1)
    # By pixels alone a ball would never be more than a part of some sofa's patches.
    parts = shares / shares.sum(dim=0).clamp(min=MIN_SCENE_SHARE)
    # Objects alone: the room is never a patch's object.
    most, instance = (parts * (class_of != BACKGROUND) * (shares >= MIN_PATCH_SHARE)).max(dim=1)
    classes_of_patches = parts @ F.one_hot(class_of, len(classes)).float()
    return {
        "counts": counts,
        "boxes": boxes,
        "first_seen": first,
        "area": torch.tensor(math.log(record["room"]["area_m2"]) - LOG_AREA_MEAN),
        "patch_classes": classes_of_patches / classes_of_patches.sum(dim=1, keepdim=True),
        "patch_boxes": box_of[instance],
        "patch_mask": most > 0,
    }


class LookupHead(nn.Module):
    """
    Asks E_spatio for every class, and fused features for their objects.

    Args:
        num_classes (`int`): Classes, the room included.
        width (`int`): Width of E_spatio.
        fused_width (`int`): Width of the fused features.
        num_layers (`int`, defaults to 1): Layers of the look-up.
        num_heads (`int`, defaults to 4): Attention heads.
    """

    def __init__(self, num_classes: int, width: int, *, fused_width: int, num_layers: int = 1, num_heads: int = 4):
        super().__init__()
        self.num_classes = num_classes
        self.queries = nn.Parameter(0.5 * torch.randn(num_classes, width))
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(_LookupLayer(width, num_heads) for _ in range(num_layers))
        self.output = nn.Linear(width, BOX_DIM + 3)
        self.area = nn.Linear(width, 1)
        self.patches = nn.Linear(fused_width, num_classes + BOX_DIM)

    def forward(self, rationale_features: torch.Tensor, fused_features: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Look everything up.

        Args:
            rationale_features (`torch.Tensor` of shape `(batch_size, num_rationale_tokens, width)`): E_spatio.
            fused_features (`torch.Tensor` of shape `(batch_size, num_tokens, fused_width)`): F_ST of all frames.

        Returns:
            `dict[str, torch.Tensor]`: `box`, `presence` (a logit), `count`, `first`, `area`, `patch_class` and `patch_box`.
        """
        keys = self.norm(rationale_features)
        states = self.queries.expand(len(keys), -1, -1)
        for layer in self.layers:
            states = layer(states, keys)
        found = self.output(states)
        patches = self.patches(fused_features)
        return {
            "box": found[..., :BOX_DIM],
            "presence": found[..., BOX_DIM],
            "count": found[..., BOX_DIM + 1],
            "first": found[..., BOX_DIM + 2],
            "area": self.area(states[:, BACKGROUND]).squeeze(-1),
            "patch_class": patches[..., : self.num_classes],
            "patch_box": patches[..., self.num_classes :],
        }


class _LookupLayer(nn.Module):
    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, states: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        states = states + self.attention(self.attention_norm(states), keys, keys, need_weights=False)[0]
        return states + self.mlp(self.mlp_norm(states))


def _targets(scenes: Sequence[LookupScene]) -> dict[str, torch.Tensor]:
    names = ("counts", "boxes", "first_seen", "area", "patch_classes", "patch_boxes", "patch_mask")
    return {name: torch.stack([getattr(scene, name) for scene in scenes]) for name in names}


def lookup_losses(found: dict[str, torch.Tensor], scenes: Sequence[LookupScene]) -> dict[str, torch.Tensor]:
    """
    Compare what was looked up with the truth.

    Args:
        found (`dict[str, torch.Tensor]`): What [`LookupHead`] gave.
        scenes (`Sequence[LookupScene]`): The scenes of the batch.

    Returns:
        `dict[str, torch.Tensor]`: A mean for each key of `WEIGHTS`; boxes over the classes with one instance.
    """
    truth = _targets(scenes)
    is_single, is_present, mask = truth["counts"] == 1, truth["counts"] > 0, truth["patch_mask"]
    return {
        "box": _masked_mean((found["box"] - truth["boxes"]).square().mean(dim=-1), is_single),
        "presence": F.binary_cross_entropy_with_logits(found["presence"], is_present.float()),
        "count": _masked_mean((found["count"] - truth["counts"].log1p()).square(), is_present),
        "first": _masked_mean((found["first"] - truth["first_seen"]).square(), is_present),
        "area": (found["area"] - truth["area"]).square().mean(),
        "patch_class": F.cross_entropy(found["patch_class"].flatten(0, 1), truth["patch_classes"].flatten(0, 1)),
        "patch_box": _masked_mean((found["patch_box"] - truth["patch_boxes"]).square().mean(dim=-1), mask),
    }


def _masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (values * mask).sum() / mask.sum().clamp(min=1)


def look_up(model, head: LookupHead, scenes: Sequence[LookupScene]) -> dict[str, torch.Tensor]:
    """Run the rationale module on stored features, and the head on what comes out."""
    base = getattr(model, "model", model)
    inputs = collate_stored_scenes([[scene.stored] for scene in scenes])
    pixels = inputs.pop("video_features").float()
    inputs["point_tokens"] = inputs["point_tokens"].float()
    output = base.get_rationale_features(pixels, **inputs)
    return head(output.rationale_features[:, 0], output.fused_features[:, 0].flatten(1, 2))


def pretrain_rationale_module(
    model,
    scenes: Sequence[LookupScene],
    *,
    num_steps: int,
    batch_size: int = 8,
    learning_rate: float = 2e-3,
    seed: int = 0,
) -> LookupHead:
    """
    Teach the rationale module to say what is where.

    Args:
        model ([`GeodeForConditionalGeneration`] or [`GeodeModel`]): Its rationale module is changed in place.
        scenes (`Sequence[LookupScene]`): Scenes of the training split.
        num_steps (`int`): Steps.
        batch_size (`int`, defaults to 8): Scenes of a step.
        learning_rate (`float`, defaults to 2e-3): Highest one; it falls along a cosine.
        seed (`int`, defaults to 0): Decides head and batches.

    Returns:
        [`LookupHead`]: The head, for [`lookup_accuracy`].
    """
    base = getattr(model, "model", model)
    generator = torch.Generator().manual_seed(seed)
    widths = base.config.text_config.hidden_size, base.config.drm_config.hidden_size
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = LookupHead(len(scenes[0].counts), widths[0], fused_width=widths[1])
    base.drm.requires_grad_(True).train()

    def losses():
        order: list[int] = []
        for step in range(num_steps):
            if len(order) < batch_size:
                order = torch.randperm(len(scenes), generator=generator).tolist()
            chosen = [scenes[order.pop()] for _ in range(min(batch_size, len(order)))]
            terms = lookup_losses(look_up(model, head, chosen), chosen)
            if step % 100 == 99:
                logger.info(" ".join(f"{name} {float(term.detach()):.3f}" for name, term in terms.items()))
            yield sum(WEIGHTS[name] * term for name, term in terms.items())

    fit([base.drm, head], losses(), num_steps=num_steps, learning_rate=learning_rate)
    base.drm.eval()
    return head


@torch.no_grad()
def lookup_accuracy(
    model, head: LookupHead, scenes: Sequence[LookupScene], *, std_m: Sequence[float], batch_size: int = 8
) -> dict[str, float]:
    """
    Measure the rationale module on scenes that it was not trained on, with the shuffled-scene gate.

    Args:
        model ([`GeodeForConditionalGeneration`] or [`GeodeModel`]): The model.
        head ([`LookupHead`]): What [`pretrain_rationale_module`] returned.
        scenes (`Sequence[LookupScene]`): Held-out scenes, at least two.
        std_m (`Sequence[float]`): The codec's standard deviations of a box's centre, in metres.
        batch_size (`int`, defaults to 8): Scenes at a time.

    Returns:
        `dict[str, float]`: `median_center_error_m` and `share_within_1m` of boxes looked up in E_spatio,
        `shuffled_median_center_error_m` with the next scene's, `gate` (how much the loss of the boxes rises by that), and
        `patch_median_center_error_m` of the fused features.
    """
    scale = torch.tensor(list(std_m)[:3])
    errors, patch_errors, shuffled, rises = [], [], [], []
    for start in range(0, len(scenes), batch_size):
        chosen = scenes[start : start + batch_size]
        found, truth = look_up(model, head, chosen), _targets(chosen)
        is_single, mask = truth["counts"] == 1, truth["patch_mask"]
        errors.append(((found["box"] - truth["boxes"])[is_single][:, :3] * scale).norm(dim=-1))
        patch_errors.append(((found["patch_box"] - truth["patch_boxes"])[mask][:, :3] * scale).norm(dim=-1))
        if len(chosen) > 1:
            other = {name: value.roll(1, dims=0) for name, value in found.items()}
            shuffled.append(((other["box"] - truth["boxes"])[is_single][:, :3] * scale).norm(dim=-1))
            rises.append(float(lookup_losses(other, chosen)["box"] - lookup_losses(found, chosen)["box"]))
    error = torch.cat(errors)
    return {
        "median_center_error_m": error.median().item(),
        "share_within_1m": (error < 1.0).float().mean().item(),
        "shuffled_median_center_error_m": torch.cat(shuffled).median().item(),
        "gate": sum(rises) / len(rises),
        "patch_median_center_error_m": torch.cat(patch_errors).median().item(),
    }


__all__ = [
    "WEIGHTS",
    "LookupHead",
    "LookupScene",
    "load_lookup_scene",
    "look_up",
    "lookup_accuracy",
    "lookup_losses",
    "lookup_targets",
    "pretrain_rationale_module",
]
