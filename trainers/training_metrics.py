# SPDX-License-Identifier: Apache-2.0
"""What is logged about a batch, as sums whose ratios are exact over any window and any number of processes."""

import math

import torch

from geode.evaluation.vsi_bench.vsi_bench import TOLERANCES
from geode.trainers.packing import IGNORED_LABEL


MRA_TOLERANCES = tuple(TOLERANCES.tolist())


def metric_names(control_tokens: dict[str, dict]) -> list[str]:
    """
    Return the names of everything that [`batch_sums`] counts, in one order for all processes.

    Args:
        control_tokens (`dict[str, dict]`): Those of the model's configuration.

    Returns:
        `list[str]`: Names.
    """
    names = ["loss/ce", "loss/drh", "token_accuracy"]
    for token, entry in control_tokens.items():
        if entry["kind"] == "box3d":
            names += [f"mae/{token}/{part}" for part in ("center", "size", "yaw")]
        else:
            names.append(f"mae/{token}")
        if entry["kind"] == "scalar":
            names.append(f"mra/{token}")
    return names


def count_regression_targets(batch: dict) -> torch.Tensor:
    """Return the number of values to regress in a batch, of shape `()`."""
    targets = batch.get("regression_targets")
    if targets is None:
        return torch.zeros((), dtype=torch.long, device=batch["input_ids"].device)
    return (~targets.isnan()).any(dim=-1).sum()


@torch.no_grad()
def batch_sums(batch: dict, outputs, control_tokens: dict[str, dict]) -> dict[str, tuple]:
    """
    Count what is logged about a batch.

    Convention:
        - Errors are in SI units: metres, square metres, counts; a yaw in radians, up to half a turn.
        - The mean relative accuracy is VSI-Bench's: the share of ten tolerances that the relative error keeps. A target of 0
          or below has none and is left out.

    Args:
        batch (`dict`): Inputs of the model, with `num_items_in_batch` and `num_regression_targets` where its losses are
            divided by them.
        outputs ([`GeodeCausalLMOutputWithPast`]): What it returned.
        control_tokens (`dict[str, dict]`): Those of its configuration.

    Returns:
        `dict[str, tuple]`: Numerator and denominator by name; see [`metric_names`].
    """
    labels = batch["labels"][:, 1:]
    is_learned = labels != IGNORED_LABEL
    num_tokens, num_targets = is_learned.sum(), count_regression_targets(batch)
    ce_divisor = batch.get("num_items_in_batch", num_tokens)
    drh_divisor = torch.as_tensor(batch.get("num_regression_targets", num_targets)).clamp(min=1)
    sums = {}
    if outputs.ce_loss is not None:
        # The mean over nothing is not a number.
        sums["loss/ce"] = (torch.where(num_tokens > 0, outputs.ce_loss * ce_divisor, 0.0), num_tokens)
    if outputs.regression_loss is not None:
        sums["loss/drh"] = (outputs.regression_loss * drh_divisor, num_targets)
    if outputs.logits is not None:
        is_right = outputs.logits[:, :-1].argmax(dim=-1) == labels
        sums["token_accuracy"] = ((is_right & is_learned).sum(), num_tokens)
    if outputs.regression_values is not None and batch.get("regression_targets") is not None:
        for token, entry in control_tokens.items():
            rows = (batch["input_ids"] == entry["token_id"]) & (~batch["regression_targets"].isnan()).any(dim=-1)
            predicted = outputs.regression_values[rows][:, : entry["dim"]].double()
            sums |= value_sums(predicted, batch["regression_targets"][rows][:, : entry["dim"]].double(), token, entry)
    return sums


def value_sums(predicted: torch.Tensor, targets: torch.Tensor, token: str, entry: dict) -> dict[str, tuple]:
    """
    Count the errors of one kind of value.

    Args:
        predicted (`torch.Tensor` of shape `(num_values, dim)`): SI units.
        targets (`torch.Tensor` of shape `(num_values, dim)`): SI units.
        token (`str`): The control token.
        entry (`dict`): Its entry in the model's configuration.

    Returns:
        `dict[str, tuple]`: Numerator and denominator by name.
    """
    errors = (predicted - targets).abs()
    if entry["kind"] == "box3d":
        yaw = errors[:, 6:] % math.pi
        parts = {"center": errors[:, :3], "size": errors[:, 3:6], "yaw": torch.minimum(yaw, math.pi - yaw)}
        return {f"mae/{token}/{name}": (part.sum(), part.numel()) for name, part in parts.items()}
    sums = {f"mae/{token}": (errors.sum(), errors.numel())}
    if entry["kind"] == "scalar":
        is_positive = targets[:, 0] > 0
        relative = errors[is_positive, 0] / targets[is_positive, 0]
        tolerances = torch.tensor(MRA_TOLERANCES, dtype=relative.dtype, device=relative.device)
        sums[f"mra/{token}"] = ((relative[:, None] <= tolerances).double().mean(dim=1).sum(), relative.numel())
    return sums


class MetricSums:
    """
    Sums of [`batch_sums`] over a window.

    Args:
        names (`list[str]`): What is counted; the same in every process.
        device (`torch.device`): Where the sums are, so that a step waits for nothing.
    """

    def __init__(self, names: list[str], device: torch.device):
        self.names = list(names)
        # Some accelerators have no float64.
        dtype = torch.float32 if device.type in ("mps", "xla") else torch.float64
        self.totals = torch.zeros(len(names), 2, dtype=dtype, device=device)

    def add(self, sums: dict[str, tuple]) -> None:
        """Add what a batch counts."""
        for name, pair in sums.items():
            for column, value in enumerate(pair):
                self.totals[self.names.index(name), column] += torch.as_tensor(value).detach().to(self.totals)

    def pop(self, gather=None) -> dict[str, float]:
        """
        Return the ratios, and begin a new window. Every process must call it.

        Args:
            gather (`Callable`, *optional*): Gathers a tensor from all processes, along its first dimension.

        Returns:
            `dict[str, float]`: Ratios of everything that occurred.
        """
        totals = self.totals if gather is None else gather(self.totals[None]).sum(dim=0)
        self.totals = torch.zeros_like(self.totals)
        pairs = zip(self.names, totals.tolist(), strict=True)
        return {name: numerator / denominator for name, (numerator, denominator) in pairs if denominator}


__all__ = ["MRA_TOLERANCES", "MetricSums", "batch_sums", "count_regression_targets", "metric_names", "value_sums"]
