# SPDX-License-Identifier: Apache-2.0
"""
Pre-train the small vision tower and point encoder of a model on the embedded world's own labels.

They stand for InternViT and Sonata, which no small model can have from elsewhere. Both are trained once, on the scenes of
the training split, and are frozen from then on. Their heads are thrown away.

Convention:
    - Class 0 is the room itself (walls, floor, ceiling); the others are categories of furniture in alphabetical order.
    - A patch's label is the share of each class among its pixels, and its mean depth; both from `depth/`.
    - A point belongs to the smallest box that holds it. A token of the coarsest stage has the shares of its points, and, of
      the object that most of its points belong to, where the box's centre lies from the token, its sizes and its yaw.
    - In training frames are mirrored at random, and clouds mirrored and turned by quarters.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn
from transformers import get_cosine_schedule_with_warmup

from geode.data.synthetic_rooms.boxes import points_in_box
from geode.data.synthetic_rooms.dataset import split_of


logger = logging.getLogger(__name__)

BACKGROUND = 0
BOX_MARGIN_M = 0.04  # surfaces lie on their box, and voxels move them
OBJECT_WEIGHT = 4.0
BOX_TARGETS = 8  # offset of the centre 3, logarithms of the sizes 3, sine and cosine of twice the yaw
MIN_OBJECT_SHARE = 0.25  # of a token's points, for its box to be learned
LOG_DEPTH_MEAN, LOG_DEPTH_STD = 1.0, 0.5


@dataclass(kw_only=True)
class LabelledScene:
    """
    One scene with what its encoders should see in it.

    Args:
        pixels (`torch.Tensor` of shape `(num_frames, 3, height, width)`): Normalised frames, half precision.
        patch_classes (`torch.Tensor` of shape `(num_frames, num_patches, num_classes)`): Share of each class.
        patch_depth (`torch.Tensor` of shape `(num_frames, num_patches)`): Standardised logarithm of the mean depth.
        cloud (`dict[str, torch.Tensor]`): `point_features`, `point_coords`, `point_grid_coords`.
        point_owner (`torch.LongTensor` of shape `(num_points,)`): Row in `boxes` of each point, -1 for the room.
        boxes (`torch.Tensor` of shape `(num_objects, 7)`): Boxes in the scene frame.
        box_classes (`torch.LongTensor` of shape `(num_objects,)`): Their classes.
    """

    pixels: torch.Tensor
    patch_classes: torch.Tensor
    patch_depth: torch.Tensor
    cloud: dict[str, torch.Tensor]
    point_owner: torch.Tensor
    boxes: torch.Tensor
    box_classes: torch.Tensor


def list_scenes(data_root: str | Path, split: str) -> list[str]:
    """
    Name the scenes of a split.

    Args:
        data_root (`str` or `Path`): The data set, as `geode data rooms` makes it.
        split (`str`): `"train"`, `"validation"` or `"test"`.

    Returns:
        `list[str]`: Names in order, as in `room_000017`.

    Raises:
        FileNotFoundError: If there are none.
    """
    names = sorted(path.stem for path in (Path(data_root) / "depth").glob("room_*.safetensors"))
    names = [name for name in names if split_of(int(name.removeprefix("room_"))) == split]
    if not names:
        raise FileNotFoundError(
            f"`data_root` must hold scenes of the {split} split, and {data_root} has none in `depth`. Make them with "
            "`geode data rooms --out DIR`."
        )
    return names


def read_scene_record(data_root: str | Path, name: str) -> dict:
    """Return the record of a scene: its objects with `category` and `box`, its room and its camera."""
    with safe_open(Path(data_root) / "depth" / f"{name}.safetensors", "pt") as stored:
        return json.loads(stored.metadata()["scene"])


def list_classes(data_root: str | Path, names: Sequence[str]) -> list[str]:
    """
    Name the classes of some scenes.

    Args:
        data_root (`str` or `Path`): The data set.
        names (`Sequence[str]`): Scenes.

    Returns:
        `list[str]`: `"room"`, then the categories in alphabetical order.
    """
    found = {entry["category"] for name in names for entry in read_scene_record(data_root, name)["objects"]}
    return ["room", *sorted(found)]


def patch_labels(
    instance_ids: torch.Tensor, depth_mm: torch.Tensor, class_of: torch.Tensor, grid: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Pool labels of pixels to patches.

    Args:
        instance_ids (`torch.Tensor` of shape `(num_frames, height, width)`): Object of each pixel, 0 for the room.
        depth_mm (`torch.Tensor` of shape `(num_frames, height, width)`): Z-depth in millimetres.
        class_of (`torch.LongTensor` of shape `(num_instances,)`): Class of each id.
        grid (`tuple[int, int]`): Rows and columns of patches.

    Returns:
        Shares of classes, of shape `(num_frames, rows * columns, num_classes)`, and the standardised logarithm of the mean
        depth, of shape `(num_frames, rows * columns)`.
    """
    classes = F.one_hot(class_of[instance_ids.long()], int(class_of.max()) + 1).float().permute(0, 3, 1, 2)
    shares = F.adaptive_avg_pool2d(classes, grid).flatten(2).transpose(1, 2)
    depth = F.adaptive_avg_pool2d(depth_mm[:, None].float() / 1000.0, grid).flatten(1)
    return shares, (depth.clamp(min=0.05).log() - LOG_DEPTH_MEAN) / LOG_DEPTH_STD


def point_owners(points: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """
    Say in which box each point lies.

    Args:
        points (`np.ndarray` of shape `(num_points, 3)`): Points.
        boxes (`np.ndarray` of shape `(num_boxes, 7)`): Boxes in the same frame.

    Returns:
        `np.ndarray` of shape `(num_points,)`: Row of the smallest box that holds the point, -1 for none.

    Example:
    ```python
    >>> boxes = np.array([[0.0, 0, 0, 2, 2, 2, 0], [0.0, 0, 0, 1, 1, 1, 0]])
    >>> point_owners(np.array([[0.1, 0, 0], [0.9, 0, 0], [3.0, 0, 0]]), boxes).tolist()
    [1, 0, -1]

    ```
    """
    owners = np.full(len(points), -1)
    for row in sorted(range(len(boxes)), key=lambda row: -float(np.prod(boxes[row][3:6]))):
        inside = np.abs(points_in_box(points, boxes[row])) <= 0.5 * boxes[row][3:6] + BOX_MARGIN_M
        owners[inside.all(axis=1)] = row
    return owners


def load_labelled_scene(
    data_root: str | Path, name: str, *, processor, classes: Sequence[str], grid: tuple[int, int], num_frames: int = 16
) -> LabelledScene:
    """
    Read a scene as the model will see it, with its labels.

    Args:
        data_root (`str` or `Path`): The data set.
        name (`str`): The scene.
        processor ([`GeodeProcessor`]): Makes pixels and points.
        classes (`Sequence[str]`): See [`list_classes`].
        grid (`tuple[int, int]`): Rows and columns of the vision tower's patches.
        num_frames (`int`, defaults to 16): Frames, uniformly sampled; all of a shorter film.

    Returns:
        [`LabelledScene`]: The scene.
    """
    root = Path(data_root)
    inputs = processor.prepare_scene(
        video=root / "rooms" / f"{name}.mp4", geometry=str(root / "geometry" / name), num_frames=num_frames
    )
    with safe_open(root / "depth" / f"{name}.safetensors", "pt") as stored:
        record = json.loads(stored.metadata()["scene"])
        ids, depth = stored.get_tensor("instance_ids"), stored.get_tensor("depth_mm")
    num_frames = min(num_frames, len(ids))
    # Frame i of n is in the middle of the i-th of n equal parts of the film.
    frames = ((torch.arange(num_frames) + 0.5) * len(ids) / num_frames).long()
    objects = record["objects"]
    class_of = torch.zeros(256, dtype=torch.long)
    for entry in objects:
        class_of[entry["id"]] = classes.index(entry["category"]) if entry["category"] in classes else BACKGROUND
    class_of[-1] = len(classes) - 1  # no id; so that every scene has all classes
    shares, log_depth = patch_labels(ids[frames], depth[frames].int(), class_of, grid)
    boxes = np.array([entry["box"] for entry in objects]).reshape(-1, 7)
    coords = inputs["point_coords"][0, 0]
    return LabelledScene(
        pixels=inputs["pixel_values_videos"][0, 0].half(),
        patch_classes=shares.half(),
        patch_depth=log_depth,
        cloud={name: inputs[name][0, 0] for name in ("point_features", "point_coords", "point_grid_coords")},
        point_owner=torch.from_numpy(point_owners(coords.double().numpy(), boxes)),
        boxes=torch.from_numpy(boxes).float(),
        box_classes=class_of[[entry["id"] for entry in objects]],
    )


def token_labels(
    scene: LabelledScene, owners: torch.Tensor, positions: torch.Tensor, *, num_classes: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Pool labels of points to the tokens that they ended in.

    Args:
        scene ([`LabelledScene`]): The scene.
        owners (`torch.LongTensor` of shape `(num_points,)`): The token of each point.
        positions (`torch.Tensor` of shape `(num_tokens, 3)`): Where the tokens are.
        num_classes (`int`): Number of classes.

    Returns:
        Shares of classes `(num_tokens, num_classes)`, targets of the box `(num_tokens, 8)`, and where these are to be learned
        `(num_tokens,)`.
    """
    num_objects = len(scene.boxes)
    counts = torch.zeros(len(positions), num_objects + 1)
    counts.index_put_((owners, scene.point_owner + 1), torch.ones(len(owners)), accumulate=True)
    counts = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    to_class = F.one_hot(torch.cat([torch.zeros(1, dtype=torch.long), scene.box_classes]), num_classes).float()
    shares = counts @ to_class
    if num_objects == 0:
        return shares, torch.zeros(len(positions), BOX_TARGETS), torch.zeros(len(positions), dtype=torch.bool)
    share, row = counts[:, 1:].max(dim=1)
    box = scene.boxes[row]
    twice = 2.0 * box[:, 6:]
    targets = torch.cat([box[:, :3] - positions, box[:, 3:6].clamp(min=0.02).log(), twice.sin(), twice.cos()], dim=1)
    return shares, targets, share >= MIN_OBJECT_SHARE


# ---- augmentation ----


def turned(scene: LabelledScene, quarters: int, *, is_mirrored: bool = False) -> LabelledScene:
    """
    Turn the cloud of a scene about +z, which keeps its voxels, and mirror it before that.

    Args:
        scene ([`LabelledScene`]): The scene, which stays as it is.
        quarters (`int`): Quarter turns, counterclockwise seen from above.
        is_mirrored (`bool`, defaults to `False`): Negate y first.

    Returns:
        [`LabelledScene`]: The turned scene, with the pixels of the old one.
    """
    flip = -1.0 if is_mirrored else 1.0
    cosine, sine = ((1, 0), (0, 1), (-1, 0), (0, -1))[quarters % 4]
    # Rows of the matrix are the new axes.
    matrix = torch.tensor([[cosine, -sine * flip, 0.0], [sine, cosine * flip, 0.0], [0.0, 0.0, 1.0]])
    features, coords, grid = (scene.cloud[name] for name in ("point_features", "point_coords", "point_grid_coords"))
    features = torch.cat([features[:, :3] @ matrix.T, features[:, 3:6], features[:, 6:] @ matrix.T], dim=1)
    grid = (grid.float() @ matrix.T).round().to(grid.dtype)
    cloud = {
        "point_features": features,
        "point_coords": coords @ matrix.T,
        "point_grid_coords": grid - grid.min(dim=0).values,
    }
    yaw = flip * scene.boxes[:, 6:] + quarters * (np.pi / 2)
    boxes = torch.cat([scene.boxes[:, :3] @ matrix.T, scene.boxes[:, 3:6], yaw], dim=1)
    return replace(scene, cloud=cloud, boxes=boxes)


def _mirrored_frames(*maps: torch.Tensor, grid: tuple[int, int]) -> list[torch.Tensor]:
    """Mirror labels of one frame's patches, `(num_patches, ...)`."""
    return [part.unflatten(0, grid).flip(1).flatten(0, 1) for part in maps]


# ---- training ----


def fit(
    modules: Sequence[nn.Module], losses: Iterator[torch.Tensor], *, num_steps: int, learning_rate: float
) -> float:
    """
    Train some modules with AdamW: a step for each loss.

    Args:
        modules (`Sequence[nn.Module]`): The modules.
        losses (`Iterator[torch.Tensor]`): Computes the loss of each step.
        num_steps (`int`): Number of losses, for the learning rate's course.
        learning_rate (`float`): Highest one; it falls along a cosine after a twentieth of the steps.

    Returns:
        `float`: Mean loss of the last tenth of the steps.
    """
    parameters = [parameter for module in modules for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, num_steps // 20), num_steps)
    recent = []
    for step, loss in enumerate(losses):
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        recent = [*recent, float(loss.detach())][-max(1, num_steps // 10) :]
        if step % 100 == 99:
            logger.info("step %d of %d: loss %.4f", step + 1, num_steps, sum(recent) / len(recent))
    return sum(recent) / max(1, len(recent))


def _class_loss(logits: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Cross-entropy against shares, in which furniture weighs `OBJECT_WEIGHT` times as much as the room around it."""
    weights = 1.0 + (OBJECT_WEIGHT - 1.0) * (1.0 - shares[:, BACKGROUND])
    return (weights * F.cross_entropy(logits, shares, reduction="none")).sum() / weights.sum()


def _set_trainable(encoder: nn.Module, is_trainable: bool) -> None:
    encoder.requires_grad_(is_trainable)
    encoder.train(is_trainable)


def pretrain_vision_tower(
    model,
    scenes: Sequence[LabelledScene],
    *,
    num_steps: int,
    batch_size: int = 64,
    learning_rate: float = 1.5e-3,
    depth_weight: float = 0.3,
    seed: int = 0,
) -> nn.Module:
    """
    Teach the vision tower to say of each patch what it shows and how far away that is.

    Args:
        model ([`GeodeForConditionalGeneration`] or [`GeodeModel`]): Its vision tower is changed in place, and frozen after.
        scenes (`Sequence[LabelledScene]`): Scenes of the training split.
        num_steps (`int`): Steps.
        batch_size (`int`, defaults to 64): Frames of a step.
        learning_rate (`float`, defaults to 1.5e-3): Highest one; it falls along a cosine.
        depth_weight (`float`, defaults to 0.3): Weight of the depth beside the classes.
        seed (`int`, defaults to 0): Decides head and batches.

    Returns:
        `nn.Module`: The head, for [`vision_accuracy`].
    """
    base = getattr(model, "model", model)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = nn.Linear(base.config.vision_config.hidden_size, scenes[0].patch_classes.shape[-1] + 1)
    _set_trainable(base.vision_tower, True)
    num_frames = scenes[0].pixels.shape[0]

    def losses():
        for _ in range(num_steps):
            draws = torch.randint(len(scenes) * num_frames, (batch_size,), generator=generator).tolist()
            places = [divmod(draw, num_frames) for draw in draws]
            flips = torch.randint(2, (batch_size,), generator=generator).bool().tolist()
            pixels, classes, depth = _frame_batch(scenes, places, flips, grid=base.config.patch_grid)
            output = head(base.vision_tower(pixels).last_hidden_state[:, 1:])
            loss = _class_loss(output[..., :-1].flatten(0, 1), classes.flatten(0, 1))
            yield loss + depth_weight * F.smooth_l1_loss(output[..., -1], depth)

    fit([base.vision_tower, head], losses(), num_steps=num_steps, learning_rate=learning_rate)
    _set_trainable(base.vision_tower, False)
    return head


def _frame_batch(scenes, places, flips, *, grid: tuple[int, int]):
    """Pixels, shares of classes and depth of some frames, some of them mirrored."""
    rows = []
    for (number, frame), is_flipped in zip(places, flips, strict=True):
        scene = scenes[number]
        pixels, classes, depth = scene.pixels[frame], scene.patch_classes[frame], scene.patch_depth[frame]
        if is_flipped:
            classes, depth = _mirrored_frames(classes, depth, grid=grid)
            pixels = pixels.flip(-1)
        rows.append((pixels.float(), classes.float(), depth))
    return tuple(torch.stack(part) for part in zip(*rows, strict=True))


def _encode_clouds(base, scenes: Sequence[LabelledScene]):
    """Tokens, positions, and for each scene the slice of its tokens and the token of each point."""
    sizes = [len(scene.point_owner) for scene in scenes]
    names = ("point_features", "point_coords", "point_grid_coords")
    feat, coord, grid = (torch.cat([scene.cloud[name] for scene in scenes]) for name in names)
    output = base.point_encoder(feat=feat, coord=coord, grid_coord=grid, offset=torch.tensor(sizes).cumsum(0))
    owner = torch.arange(len(feat))
    for inverse in output.pooling_inverses[1:]:
        owner = inverse[owner]
    bounds = [0, *output.offsets[-1].tolist()]
    return output.last_hidden_state, output.coords[-1], bounds, owner.split(sizes)


def _cloud_batch(base, scenes: Sequence[LabelledScene], num_classes: int):
    tokens, positions, bounds, owners = _encode_clouds(base, scenes)
    labels = []
    for scene, start, stop, owner in zip(scenes, bounds[:-1], bounds[1:], owners, strict=True):
        labels.append(token_labels(scene, owner - start, positions[start:stop], num_classes=num_classes))
    return tokens, *(torch.cat(part) for part in zip(*labels, strict=True))


def pretrain_point_encoder(
    model,
    scenes: Sequence[LabelledScene],
    *,
    num_steps: int,
    batch_size: int = 8,
    learning_rate: float = 2e-3,
    box_weight: float = 1.0,
    seed: int = 0,
) -> nn.Module:
    """
    Teach the point encoder to say of each of its coarsest tokens to what it belongs, and where that has its box.

    Args:
        model ([`GeodeForConditionalGeneration`] or [`GeodeModel`]): Its point encoder is changed in place, and frozen after.
        scenes (`Sequence[LabelledScene]`): Scenes of the training split.
        num_steps (`int`): Steps.
        batch_size (`int`, defaults to 8): Clouds of a step.
        learning_rate (`float`, defaults to 2e-3): Highest one; it falls along a cosine.
        box_weight (`float`, defaults to 1): Weight of the boxes beside the classes; 0 leaves them out.
        seed (`int`, defaults to 0): Decides head and batches.

    Returns:
        `nn.Module`: The head, for [`point_accuracy`].
    """
    base = getattr(model, "model", model)
    num_classes = scenes[0].patch_classes.shape[-1]
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = nn.Linear(base.config.point_config.hidden_size, num_classes + BOX_TARGETS)
    _set_trainable(base.point_encoder, True)

    def losses():
        for _ in range(num_steps):
            rows, turns = (
                torch.randint(most, (batch_size,), generator=generator).tolist() for most in (len(scenes), 8)
            )
            chosen = [
                turned(scenes[row], turn % 4, is_mirrored=turn >= 4) for row, turn in zip(rows, turns, strict=True)
            ]
            tokens, shares, targets, mask = _cloud_batch(base, chosen, num_classes)
            output = head(tokens)
            loss = _class_loss(output[:, :num_classes], shares)
            if box_weight > 0:
                box = F.smooth_l1_loss(output[:, num_classes:], targets, reduction="none", beta=0.2).mean(dim=1)
                loss = loss + box_weight * (box * mask).sum() / mask.sum().clamp(min=1)
            yield loss

    fit([base.point_encoder, head], losses(), num_steps=num_steps, learning_rate=learning_rate)
    _set_trainable(base.point_encoder, False)
    return head


@torch.no_grad()
def vision_accuracy(model, head: nn.Module, scenes: Sequence[LabelledScene]) -> dict[str, float]:
    """
    Measure the vision tower on scenes that it was not trained on.

    Args:
        model ([`GeodeForConditionalGeneration`] or [`GeodeModel`]): The model.
        head (`nn.Module`): What [`pretrain_vision_tower`] returned.
        scenes (`Sequence[LabelledScene]`): Held-out scenes.

    Returns:
        `dict[str, float]`: `patch_accuracy` over all patches, `object_accuracy` over those with more object than room,
        `majority` (the first figure of who always says "room").
    """
    base = getattr(model, "model", model)
    right, is_object = [], []
    for scene in scenes:
        output = head(base.vision_tower(scene.pixels.float()).last_hidden_state[:, 1:])
        truth = scene.patch_classes.float().argmax(dim=-1)
        right.append(output[..., :-1].argmax(dim=-1) == truth)
        is_object.append(truth != BACKGROUND)
    hits, objects = torch.stack(right), torch.stack(is_object)
    return {
        "patch_accuracy": hits.float().mean().item(),
        "object_accuracy": hits[objects].float().mean().item(),
        "majority": 1.0 - objects.float().mean().item(),
    }


@torch.no_grad()
def point_accuracy(model, head: nn.Module, scenes: Sequence[LabelledScene]) -> dict[str, float]:
    """
    Measure the point encoder on scenes that it was not trained on.

    Args:
        model ([`GeodeForConditionalGeneration`] or [`GeodeModel`]): The model.
        head (`nn.Module`): What [`pretrain_point_encoder`] returned.
        scenes (`Sequence[LabelledScene]`): Held-out scenes.

    Returns:
        `dict[str, float]`: `token_accuracy` over all tokens, `object_accuracy` over those with more object than room,
        `majority` as in [`vision_accuracy`], and `median_center_error_m` of the boxes.
    """
    base = getattr(model, "model", model)
    num_classes = scenes[0].patch_classes.shape[-1]
    right, is_object, errors = [], [], []
    for scene in scenes:
        tokens, shares, targets, mask = _cloud_batch(base, [scene], num_classes)
        output = head(tokens)
        truth = shares.argmax(dim=1)
        right.append(output[:, :num_classes].argmax(dim=1) == truth)
        is_object.append(truth != BACKGROUND)
        errors.append((output[:, num_classes:] - targets)[mask][:, :3].norm(dim=1))
    hits, objects = torch.cat(right), torch.cat(is_object)
    return {
        "token_accuracy": hits.float().mean().item(),
        "object_accuracy": hits[objects].float().mean().item(),
        "majority": 1.0 - objects.float().mean().item(),
        "median_center_error_m": torch.cat(errors).median().item(),
    }


__all__ = [
    "BACKGROUND",
    "LabelledScene",
    "fit",
    "list_classes",
    "list_scenes",
    "load_labelled_scene",
    "patch_labels",
    "point_accuracy",
    "point_owners",
    "pretrain_point_encoder",
    "pretrain_vision_tower",
    "read_scene_record",
    "token_labels",
    "turned",
    "vision_accuracy",
]
