# SPDX-License-Identifier: Apache-2.0
"""Labels of patches, points and tokens, and that the small encoders learn them, the same way each time."""

import math

import numpy as np
import pytest
import torch
from transformers import set_seed

from geode.modeling_geode.modeling_geode import GeodeForConditionalGeneration
from geode.trainers.world_encoders import (
    LOG_DEPTH_MEAN,
    LOG_DEPTH_STD,
    LabelledScene,
    _class_loss,
    list_scenes,
    patch_labels,
    point_accuracy,
    point_owners,
    pretrain_point_encoder,
    pretrain_vision_tower,
    token_labels,
    turned,
    vision_accuracy,
)
from tests.common_tiny import make_config, make_processor


NUM_CLASSES = 3


def test_patch_labels_are_shares_of_pixels_and_log_of_mean_depth():
    # Two rows and four columns of pixels become one row of two patches.
    ids = torch.tensor([[[0, 7, 9, 9], [7, 7, 9, 0]]], dtype=torch.uint8)
    depth = torch.tensor([[[1000, 3000, 500, 500], [2000, 2000, 500, 500]]])
    class_of = torch.zeros(10, dtype=torch.long)
    class_of[7], class_of[9] = 2, 1
    shares, log_depth = patch_labels(ids, depth, class_of, (1, 2))
    assert shares.tolist() == [[[0.25, 0.0, 0.75], [0.25, 0.75, 0.0]]]
    expected = [(math.log(mean) - LOG_DEPTH_MEAN) / LOG_DEPTH_STD for mean in (2.0, 0.5)]
    torch.testing.assert_close(log_depth, torch.tensor([expected]))


def test_point_owners_takes_the_smallest_turned_box():
    # A 4 x 1 box turned by 90 degrees spans 1 x 4; the second box stands within it.
    boxes = np.array([[1.0, 0.0, 0.5, 4.0, 1.0, 1.0, math.pi / 2], [1.0, 1.5, 0.5, 0.5, 0.5, 0.5, 0.0]])
    points = np.array([[1.0, -1.9, 0.5], [2.9, 0.0, 0.5], [1.0, 1.5, 0.5], [1.0, 0.0, 1.6]])
    assert point_owners(points, boxes).tolist() == [0, -1, 1, -1]


def make_scene(generator: torch.Generator, *, num_frames: int = 2) -> LabelledScene:
    """A scene whose patches show their class as a colour, and whose points have that of their object's."""
    side, patch = 84, 14
    grid = side // patch
    classes = torch.randint(NUM_CLASSES, (num_frames, grid, grid), generator=generator)
    colors = torch.eye(3)[classes].permute(0, 3, 1, 2)
    pixels = colors.repeat_interleave(patch, dim=2).repeat_interleave(patch, dim=3)
    owner = torch.arange(27) % 3 - 1
    grid_coords = torch.cartesian_prod(*[torch.arange(3)] * 3) + 20 * (owner[:, None] + 1)
    coords = 0.2 * grid_coords.float()
    features = torch.cat([coords, torch.eye(3)[owner + 1], torch.zeros(27, 3)], dim=1)
    boxes = torch.tensor([[4.2, 4.2, 4.2, 0.8, 0.6, 0.4, 0.3], [8.2, 8.2, 8.2, 0.4, 0.4, 1.4, -0.2]])
    return LabelledScene(
        pixels=pixels.half(),
        patch_classes=torch.eye(NUM_CLASSES)[classes.flatten(1)].half(),
        patch_depth=torch.zeros(num_frames, grid * grid),
        cloud={"point_features": features, "point_coords": coords, "point_grid_coords": grid_coords},
        point_owner=owner,
        boxes=boxes,
        box_classes=torch.tensor([1, 2]),
    )


@pytest.fixture
def scenes():
    generator = torch.Generator().manual_seed(0)
    return [make_scene(generator) for _ in range(6)]


@pytest.fixture
def model():
    set_seed(0)
    return GeodeForConditionalGeneration(make_config(make_processor()))


def test_token_labels_are_means_over_points_and_the_box_of_most(scenes):
    scene = scenes[0]
    scene.point_owner = torch.tensor([-1, 1, 1, 1, -1, -1, -1, 0])
    owners = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    positions = torch.tensor([[8.0, 8.0, 8.0], [4.0, 4.0, 4.0]])
    shares, targets, mask = token_labels(scene, owners, positions, num_classes=NUM_CLASSES)
    assert shares.tolist() == [[0.25, 0.0, 0.75], [0.75, 0.25, 0.0]]
    assert mask.tolist() == [True, True]
    first = [0.2, 0.2, 0.2, math.log(0.4), math.log(0.4), math.log(1.4), math.sin(-0.4), math.cos(-0.4)]
    torch.testing.assert_close(targets[0], torch.tensor(first))
    torch.testing.assert_close(targets[1, :3], torch.full((3,), 0.2))


@pytest.mark.parametrize("is_mirrored", [False, True])
def test_turned_moves_points_and_boxes_alike(scenes, is_mirrored):
    scene = scenes[0]
    scene.cloud["point_features"][:, 6:] = torch.tensor([0.6, 0.8, 0.0])
    whole = scene
    for _ in range(4):
        whole = turned(whole, 1)
    torch.testing.assert_close(whole.cloud["point_coords"], scene.cloud["point_coords"])
    moved = turned(scene, 1, is_mirrored=is_mirrored)
    # A quarter turn takes (x, y) to (-y, x); a mirror before it makes that (y, x).
    x, y, z = scene.cloud["point_coords"].T
    expected = torch.stack([y if is_mirrored else -y, x, z], dim=1)
    torch.testing.assert_close(moved.cloud["point_coords"], expected)
    normal = [0.8, 0.6, 0.0] if is_mirrored else [-0.8, 0.6, 0.0]
    torch.testing.assert_close(moved.cloud["point_features"][0, 6:], torch.tensor(normal))
    differences = moved.cloud["point_grid_coords"] * 0.2 - expected
    torch.testing.assert_close(differences, differences[:1].expand_as(differences))
    assert moved.cloud["point_grid_coords"].min() == 0
    # Points are in the same boxes as before.
    points = scene.boxes[:1, :3].double().numpy() + np.array([[0.35, 0.1, 0.0], [0.0, 0.5, 0.0], [-0.2, -0.25, 0.1]])
    matrix = np.array([[0.0, 1.0 if is_mirrored else -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    before = point_owners(points, scene.boxes.double().numpy())
    assert before.tolist() == [0, -1, 0]
    assert point_owners(points @ matrix.T, moved.boxes.double().numpy()).tolist() == before.tolist()


def test_encoders_learn_what_they_are_taught_and_are_frozen_after(model, scenes):
    vision = pretrain_vision_tower(model, scenes[:4], num_steps=60, batch_size=8)
    points = pretrain_point_encoder(model, scenes[:4], num_steps=40, batch_size=4)
    seen = vision_accuracy(model, vision, scenes[4:])
    assert seen["majority"] < 0.5 < 0.9 < seen["patch_accuracy"]
    felt = point_accuracy(model, points, scenes[4:])
    assert felt["object_accuracy"] == 1.0
    assert felt["median_center_error_m"] < 0.3
    for encoder in (model.model.vision_tower, model.model.point_encoder):
        assert not encoder.training
        assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_pretraining_depends_on_its_seed_alone(model, scenes):
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ends = []
    for seed in (1, 1, 2):
        model.load_state_dict(start)
        torch.manual_seed(len(ends))  # what happened before must not matter
        pretrain_vision_tower(model, scenes, num_steps=2, batch_size=2, seed=seed)
        pretrain_point_encoder(model, scenes, num_steps=2, batch_size=2, seed=seed)
        ends.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    changed = {name for name in start if not torch.equal(start[name], ends[0][name])}
    assert {name.split(".")[1] for name in changed} == {"vision_tower", "point_encoder"}
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in start)
    assert not all(torch.equal(ends[0][name], ends[2][name]) for name in start)


def test_list_scenes_names_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="of the train split"):
        list_scenes(tmp_path, "train")
    (tmp_path / "depth").mkdir()
    for number in (0, 1, 2, 13):
        (tmp_path / "depth" / f"room_{number:06d}.safetensors").touch()
    assert list_scenes(tmp_path, "train") == ["room_000000", "room_000013"]
    assert list_scenes(tmp_path, "test") == ["room_000002"]


def test_furniture_weighs_four_times_as_much_as_the_room():
    logits, shares = torch.tensor([[2.0, 0.0], [2.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    of_room, of_furniture = (-logits.log_softmax(dim=1)[0, number] for number in (0, 1))
    torch.testing.assert_close(_class_loss(logits, shares), (of_room + 4.0 * of_furniture) / 5.0)
