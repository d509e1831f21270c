# SPDX-License-Identifier: Apache-2.0
"""What can be looked up in a scene, and that the rationale module learns to say it from its scene alone."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import set_seed

from geode.modeling_geode.modeling_geode import GeodeForConditionalGeneration
from geode.trainers import world_lookup as module
from geode.trainers.world_lookup import (
    WEIGHTS,
    LookupScene,
    lookup_accuracy,
    lookup_losses,
    lookup_targets,
    pretrain_rationale_module,
)
from tests.common_tiny import make_config, make_processor


CLASSES = ["room", "bed", "chair", "lamp"]
ENTRY = {
    "kind": "box3d",
    "dim": 7,
    "codec": {"mean": [1.0, 0.0, 0.0, 0.0, 0.0, 0.0], "std": [2.0, 1.0, 1.0, 1.0, 1.0, 1.0]},
}
RECORD = {
    "room": {"area_m2": 20.0},
    "camera": {"num_frames": 16},
    "objects": [
        {"id": 1, "category": "bed", "box": [3.0, 1.0, 0.5, 2.0, 1.0, 1.0, 0.25], "visible_frames": [4, 5]},
        {"id": 2, "category": "chair", "box": [0.0, 0.0, 0.5, 0.5, 0.5, 1.0, 0.0], "visible_frames": [9]},
        {"id": 4, "category": "chair", "box": [0.0, 2.0, 0.5, 0.5, 0.5, 1.0, 0.0], "visible_frames": [8]},
        {"id": 5, "category": "piano", "box": [9.0, 9.0, 0.5, 1.0, 1.0, 1.0, 0.0], "visible_frames": [0]},
    ],
}
BED = [1.0, 1.0, 0.5, math.log(2.0), 0.0, 0.0, math.sin(0.5), math.cos(0.5)]


def test_lookup_targets_are_counts_boxes_first_frames_and_shares():
    # Two frames of two by four pixels, one row of two features each.
    ids = torch.tensor([[[1, 1, 0, 0], [1, 5, 0, 0]], [[4, 0, 2, 2], [0, 0, 2, 5]]], dtype=torch.uint8)
    targets = lookup_targets(RECORD, ids, classes=CLASSES, entry=ENTRY, grid=(1, 2))
    assert targets["counts"].tolist() == [0, 1, 2, 0]
    torch.testing.assert_close(targets["boxes"][1], torch.tensor(BED))
    assert targets["first_seen"].tolist() == [1.0, 0.25, 0.5, 1.0]
    assert targets["area"].item() == pytest.approx(math.log(20.0) - 3.0)
    # The piano is no class, so it belongs to the room. Hand-derived: all of the bed, and half of the piano's pixels, are in the first
    # feature; 3 of the room's 7 pixels in the third.
    shares = [[1 / 3, 2 / 3, 0, 0], [1.0, 0, 0, 0], [0.3, 0, 0.7, 0], [1 / 3, 0, 2 / 3, 0]]
    torch.testing.assert_close(targets["patch_classes"], torch.tensor(shares))
    assert targets["patch_mask"].tolist() == [True, False, True, True]
    torch.testing.assert_close(targets["patch_boxes"][0], torch.tensor(BED))
    assert targets["patch_boxes"][2:, 1].tolist() == [2.0, 0.0]  # of the two chairs, the one that is shown


def test_the_object_of_a_patch_is_the_one_of_which_most_is_there():
    # Three of four pixels of the third feature are the bed's, which fills two others; the fourth is all that is seen of a chair.
    ids = torch.tensor([[[1, 1, 1, 1], [1, 1, 1, 1]], [[1, 1, 0, 0], [1, 4, 0, 0]]], dtype=torch.uint8)
    targets = lookup_targets(RECORD, ids, classes=CLASSES, entry=ENTRY, grid=(1, 2))
    assert targets["patch_boxes"][:, 1].tolist() == [1.0, 1.0, 2.0, 0.0]
    # 1 / 1 of the chair beside 3 / 11 of the bed.
    torch.testing.assert_close(targets["patch_classes"][2], torch.tensor([0, 3 / 14, 11 / 14, 0]))
    # Less than 3 % of a patch is not learned.
    ids = torch.zeros(1, 8, 8, dtype=torch.uint8)
    ids[0, 0, 0] = 4
    assert not lookup_targets(RECORD, ids, classes=CLASSES, entry=ENTRY, grid=(1, 1))["patch_mask"].any()


def test_lookup_losses_are_those_of_a_loop():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(6, (3, 4, 6), generator=generator)
    targets = lookup_targets(RECORD, ids, classes=CLASSES, entry=ENTRY, grid=(2, 3))
    scene = LookupScene(stored=None, **targets)

    def draw(*shape):
        return torch.randn(1, *shape, generator=generator)

    found = {"box": draw(4, 8), "presence": draw(4), "count": draw(4), "first": draw(4), "area": draw()}
    found |= {"patch_class": draw(18, 4), "patch_box": draw(18, 8)}
    losses = lookup_losses(found, [scene])
    torch.testing.assert_close(losses["box"], ((found["box"][0, 1] - torch.tensor(BED)) ** 2).mean())
    expected = ((found["count"][0, 1] - math.log(2)) ** 2 + (found["count"][0, 2] - math.log(3)) ** 2) / 2
    torch.testing.assert_close(losses["count"], expected)
    presence = F.logsigmoid(torch.tensor([-1.0, 1, 1, -1]) * found["presence"][0]).mean()
    torch.testing.assert_close(losses["presence"], -presence)
    rows = [row for row in range(18) if targets["patch_mask"][row]]
    each = [((found["patch_box"][0, row] - targets["patch_boxes"][row]) ** 2).mean() for row in rows]
    torch.testing.assert_close(losses["patch_box"], torch.stack(each).mean())


class Stored:
    """Features in which each class has a direction of its own, and tokens lie at their object."""

    def __init__(self, model, places: torch.Tensor, generator: torch.Generator):
        config = model.config
        directions = torch.Generator().manual_seed(9)
        self.visual = torch.randn(3, config.vision_config.hidden_size, generator=directions)
        self.felt = torch.randn(3, config.point_config.hidden_size, generator=directions)
        num_patches = config.patch_grid[0] * config.patch_grid[1]
        self.shown = torch.randint(3, (2, num_patches // 4), generator=generator)
        rows, columns = (side // 2 for side in config.patch_grid)
        patches = self.shown.view(2, rows, 1, columns, 1).expand(2, rows, 2, columns, 2).reshape(2, num_patches)
        self.content = {
            "video_features": self.visual[patches],
            "point_tokens": self.felt,
            "point_token_positions": places,
            "camera_poses": torch.zeros(2, 11),
            "log_scale": torch.zeros(()),
            "scale_known": torch.tensor(True),
        }

    def tensors(self):
        return self.content


@pytest.fixture
def model():
    set_seed(0)
    return GeodeForConditionalGeneration(make_config(make_processor()))


def make_scenes(model, num_scenes: int) -> list[LookupScene]:
    generator = torch.Generator().manual_seed(3)
    scenes = []
    for _ in range(num_scenes):
        places = 2.0 * torch.randn(3, 3, generator=generator)
        stored = Stored(model, places, generator)
        boxes = torch.cat([places, torch.zeros(3, 3), torch.zeros(3, 1), torch.ones(3, 1)], dim=1)
        shown = stored.shown.flatten()
        scenes.append(
            LookupScene(
                stored=stored,
                counts=torch.ones(3),
                boxes=boxes,
                first_seen=torch.zeros(3),
                area=torch.zeros(()),
                patch_classes=F.one_hot(shown, 3).float(),
                patch_boxes=boxes[shown],
                patch_mask=torch.ones(len(shown), dtype=torch.bool),
            )
        )
    return scenes


def test_rationale_module_learns_what_is_where_and_needs_its_scene(model):
    scenes = make_scenes(model, 4)
    frozen = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".drm." not in name}
    before = lookup_accuracy(model, pretrain_rationale_module(model, scenes, num_steps=1), scenes, std_m=[1.0] * 3)
    head = pretrain_rationale_module(model, scenes, num_steps=60, batch_size=4)
    after = lookup_accuracy(model, head, scenes, std_m=[1.0] * 3)
    assert after["patch_median_center_error_m"] < 0.5 * before["patch_median_center_error_m"]
    assert after["median_center_error_m"] < 0.5 * after["shuffled_median_center_error_m"]
    assert after["gate"] > 0.5 > abs(before["gate"])
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in frozen.items())


def test_pretraining_depends_on_its_seed_and_weights_alone(model, monkeypatch):
    scenes = make_scenes(model, 4)
    start = {name: tensor.clone() for name, tensor in model.model.drm.state_dict().items()}
    ends = []
    for seed, weights in ((1, {}), (1, {}), (2, {}), (1, {"box": 0.0})):
        monkeypatch.setattr(module, "WEIGHTS", WEIGHTS | weights)
        model.model.drm.load_state_dict(start)
        torch.manual_seed(len(ends))  # what happened before must not matter
        pretrain_rationale_module(model, scenes, num_steps=2, batch_size=2, seed=seed)
        ends.append(torch.cat([tensor.flatten() for tensor in model.model.drm.parameters()]).detach().clone())
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])
    assert not torch.equal(ends[0], ends[3])
