# SPDX-License-Identifier: Apache-2.0
"""
How much of a room's layout can be read off its rationale tokens by a linear map?

    python -m benchmarks.probe_rationale --data DATA --world geode-tiny/run --stages parts lookup stage1

For each category a ridge regression goes from E_spatio, all tokens side by side, to the centre of the one object of that category. It
is fitted on training rooms with a quarter of them held back to choose the penalty, and measured on the rooms of the test split. R^2 is
over all categories and coordinates, against the mean centre of the category in training; 0 is a constant. As a control the tokens of
each test room are those of another one. `parts` is the random rationale module: what a linear map finds there was not learned.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.common import add_json_option, write_json
from geode.data.feature_store import FeatureStore, collate_stored_scenes
from geode.trainers.drm_files import load_drm
from geode.trainers.world import STORE, World
from geode.trainers.world_encoders import list_scenes, read_scene_record


PENALTIES = tuple(10.0**power for power in range(-2, 6))
PROBED = ("parts", "lookup", "stage1", "stage2")  # stages with a rationale module of their own, and the last
MIN_ROOMS = 40  # of a category, to be fitted


@torch.no_grad()
def read_tokens(model, store: FeatureStore, names: Sequence[str], *, batch_size: int = 16) -> torch.Tensor:
    """
    Make the rationale tokens of some rooms.

    Args:
        model ([`GeodeForConditionalGeneration`]): The model.
        store ([`FeatureStore`]): What its encoders made of the rooms.
        names (`Sequence[str]`): The rooms.
        batch_size (`int`, defaults to 16): Rooms at a time.

    Returns:
        `torch.Tensor` of shape `(num_rooms, num_rationale_tokens * hidden_size)`: Float64.
    """
    found = []
    for start in tqdm(range(0, len(names), batch_size), desc="Rationale tokens"):
        inputs = collate_stored_scenes(
            [[store.scene_of(f"rooms/{name}.mp4")] for name in names[start : start + batch_size]]
        )
        pixels = inputs.pop("video_features")
        found.append(model.model.get_rationale_features(pixels, **inputs).rationale_features[:, 0].flatten(1))
    return torch.cat(found).double()


def centers_of(rooms: Path, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """
    Return where the one object of each category is.

    Args:
        rooms (`Path`): The data set.
        names (`Sequence[str]`): Rooms.

    Returns:
        `dict[str, torch.Tensor]`: By category, of shape `(num_rooms, 3)`; nan where a room has none or several.
    """
    found: dict[str, torch.Tensor] = {}
    for row, name in enumerate(names):
        objects = read_scene_record(rooms, name)["objects"]
        categories = [entry["category"] for entry in objects]
        for entry in objects:
            if categories.count(entry["category"]) == 1:
                table = found.setdefault(
                    entry["category"], torch.full((len(names), 3), torch.nan, dtype=torch.float64)
                )
                table[row] = torch.tensor(entry["box"][:3])
    return found


def ridge(features: torch.Tensor, targets: torch.Tensor, penalty: float) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Fit a ridge regression, with a constant that is not penalised.

    Args:
        features (`torch.Tensor` of shape `(num_rows, num_features)`): Standardised inputs.
        targets (`torch.Tensor` of shape `(num_rows, dim)`): What to predict.
        penalty (`float`): Weight of the squared coefficients.

    Returns:
        Coefficients `(num_features, dim)` and constant `(dim,)`.

    Example:
    ```python
    >>> features = torch.tensor([[-1.0], [0.0], [1.0]])
    >>> [value.tolist() for value in ridge(features, 2.0 * features + 5.0, 0.0)]
    [[[2.0]], [5.0]]

    ```
    """
    mean, center = features.mean(dim=0), targets.mean(dim=0)
    inputs = features - mean
    # As many equations as rows, which are fewer than features; the same solution.
    gram = inputs @ inputs.T + penalty * torch.eye(len(inputs), dtype=inputs.dtype)
    weights = inputs.T @ torch.linalg.lstsq(gram, targets - center).solution
    return weights, center - mean @ weights


def probe(
    train: torch.Tensor,
    train_centers: dict[str, torch.Tensor],
    test: torch.Tensor,
    test_centers: dict[str, torch.Tensor],
) -> dict[str, float]:
    """
    Fit on training rooms, measure on test rooms.

    Args:
        train (`torch.Tensor` of shape `(num_rooms, num_features)`): Rationale tokens of the training rooms.
        train_centers (`dict[str, torch.Tensor]`): See [`centers_of`].
        test (`torch.Tensor` of shape `(num_rooms, num_features)`): Those of the test rooms.
        test_centers (`dict[str, torch.Tensor]`): Likewise.

    Returns:
        `dict[str, float]`: `r2`, `shuffled_r2` (the tokens of another room), `median_error_m`, and `num_objects`.
    """
    mean, std = train.mean(dim=0), train.std(dim=0).clamp(min=1e-6)
    train, test = (train - mean) / std, (test - mean) / std
    residuals, shuffled, deviations = [], [], []
    for category, table in sorted(train_centers.items()):
        known = table.isfinite().all(dim=1)
        if known.sum() < MIN_ROOMS or category not in test_centers:
            continue
        features, targets = train[known], table[known]
        held_back = torch.arange(len(features)) % 4 == 0

        def error_of(penalty: float, features=features, targets=targets, held_back=held_back) -> float:
            weights, constant = ridge(features[~held_back], targets[~held_back], penalty)
            return (features[held_back] @ weights + constant - targets[held_back]).square().sum().item()

        weights, constant = ridge(features, targets, min(PENALTIES, key=error_of))
        asked = test_centers[category].isfinite().all(dim=1)
        truth = test_centers[category][asked]
        residuals.append(test[asked] @ weights + constant - truth)
        shuffled.append(test.roll(1, dims=0)[asked] @ weights + constant - truth)
        deviations.append(truth - targets.mean(dim=0))
    residual, other, deviation = (torch.cat(part) for part in (residuals, shuffled, deviations))
    total = deviation.square().sum()
    return {
        "r2": (1.0 - residual.square().sum() / total).item(),
        "shuffled_r2": (1.0 - other.square().sum() / total).item(),
        "median_error_m": residual.norm(dim=1).median().item(),
        "num_objects": len(residual),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with `rooms` in it")
    parser.add_argument("--world", type=Path, required=True, help="results of `geode.trainers.world`")
    parser.add_argument("--stages", nargs="+", default=["parts", "lookup", "stage1"], metavar="STAGE", choices=PROBED)
    add_json_option(parser)
    args = parser.parse_args(arguments)
    world = World(data=args.data, out=args.world)
    names = {split: list_scenes(world.rooms, split) for split in ("train", "test")}
    centers = {split: centers_of(world.rooms, group) for split, group in names.items()}
    store = FeatureStore(world.out / STORE)
    report = []
    for stage in args.stages:
        model, _ = world.load("lookup" if stage == "stage1" else stage)
        if stage == "stage1":  # leaves its rationale module alone
            load_drm(model, world.out / stage)
        tokens = {split: read_tokens(model.eval(), store, group) for split, group in names.items()}
        found = probe(tokens["train"], centers["train"], tokens["test"], centers["test"])
        report.append({"stage": stage, **found})
        print(json.dumps({"stage": stage} | {name: round(value, 3) for name, value in found.items()}))  # noqa: T201
    write_json(report, args.json)


if __name__ == "__main__":
    main()
