# SPDX-License-Identifier: Apache-2.0
"""
Shard a small model with FSDP2 over processes on the CPU, and write down what a few steps did.

`accelerate` falls back to DDP on the CPU; this makes the units that it makes on GPUs.
"""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import yaml
from accelerate import FullyShardedDataParallelPlugin
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from geode.modeling_geode.regression_geode import GeodeRegressionHead
from geode.trainers.collator import GeodeDataCollator
from geode.trainers.training_metrics import count_regression_targets
from geode.trainers.training_setup import freeze_except, keep_inputs_exact
from tests.trainers.common_collator import make_model, make_processor
from tests.trainers.common_launch import ROOT
from tests.trainers.run_invariant import ROWS, with_geometry


FSDP2 = yaml.safe_load((ROOT / "configuration" / "accelerate" / "fsdp2.yaml").read_text("utf-8"))
TRAINED = ["model.multi_modal_projector", "model.language_model", "lm_head", "drh", "model.feature_injection"]
NUM_STEPS, LEARNING_RATE = 3, 0.02


def build(root: Path, dtype: torch.dtype):
    """The model of stage 2, and its collator."""
    processor = make_processor()
    model = make_model(processor).train()
    freeze_except(model, TRAINED)
    for name, parameter in model.named_parameters():
        # Weights that train stay in float32, as accelerate keeps them; those that do not are as they were loaded.
        if dtype != torch.float32 and not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
            assert not name.startswith("drh."), name
    return model, GeodeDataCollator(processor=processor, media_root=root)


def shard(model, dtype: torch.dtype, units: str) -> None:
    """
    Make units of blocks and one of the rest.

    Args:
        model: The model, which is changed.
        dtype (`torch.dtype`): What units compute with.
        units (`str`): `"all"` blocks that the model names, with the regression head in float32; or `"layers"` of the language
            model alone, with one policy, as `accelerate` does it by configuration/accelerate/fsdp2.yaml.
    """
    names, policy = model._no_split_modules, MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    if units == "layers":
        names, policy = [FSDP2["fsdp_config"]["fsdp_transformer_layer_cls_to_wrap"]], plugin_policy(dtype)
    for module in list(model.modules())[::-1]:
        if type(module).__name__ in names:
            fully_shard(module, mp_policy=exact if isinstance(module, GeodeRegressionHead) else policy)
    fully_shard(model, mp_policy=policy)
    assert isinstance(model.drh, FSDPModule) is (units == "all")
    assert isinstance(model.model.language_model.layers[0], FSDPModule)


def plugin_policy(dtype: torch.dtype) -> MixedPrecisionPolicy:
    """What a trainer makes of the policy of accelerate's plugin."""
    if dtype == torch.float32:
        return MixedPrecisionPolicy()
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    plugin.set_mixed_precision("bf16")
    keep_inputs_exact(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)))
    return plugin.mixed_precision_policy


def step(model, batches: list[dict], world_size: int, part: dict, *, is_autocast: bool) -> float:
    """One step of plain gradient descent over the global batch, of which `part` is this process's."""
    num_items = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
    num_targets = sum(count_regression_targets(batch) for batch in batches)
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        outputs = model(**part, num_items_in_batch=num_items, num_regression_targets=num_targets)
    assert outputs.regression_values.dtype == torch.float32
    loss = outputs.loss.float()
    # FSDP averages over processes what is a share of the global mean in each.
    (loss * world_size).backward()
    if world_size > 1:
        total = loss.detach().clone()
        dist.all_reduce(total)
        loss = total
    return loss.item()


def gradients(model) -> dict[str, torch.Tensor]:
    """Whole gradients by name."""
    named = ((name, parameter.grad) for name, parameter in model.named_parameters() if parameter.grad is not None)
    return {name: (grad.full_tensor() if isinstance(grad, DTensor) else grad).clone() for name, grad in named}


def run(root: Path, rows: str, dtype: torch.dtype, units: str = "all") -> tuple[list[dict], dict, dict]:
    """Train; return what each step did, the first one's gradients, and the dtypes of the head's weights and targets."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    model, collator = build(root, dtype)
    if world_size > 1:
        shard(model, dtype, units)
    seen: dict[str, list[str]] = {}

    def look(head, inputs):
        seen["weights"] = sorted({str(parameter.dtype) for parameter in head.parameters()})
        seen["targets"] = [str(inputs[2].dtype)]

    model.drh.register_forward_pre_hook(look)
    packs, found, first = with_geometry(ROWS[rows]()), [], {}
    for number in range(NUM_STEPS):
        own = packs[8 * number : 8 * number + 8]
        batches = [collator(own)] if world_size == 1 else [collator(own[:4]), collator(own[4:])]
        is_autocast = units == "layers" and dtype != torch.float32
        loss = step(model, batches, world_size, batches[rank], is_autocast=is_autocast)
        whole = gradients(model)
        first = first or whole
        norm = torch.stack([grad.float().norm() for grad in whole.values()]).norm().item()
        found.append({"loss": loss, "grad_norm": norm})
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= LEARNING_RATE * parameter.grad
                    parameter.grad = None
    return found, first, seen


def run_cases(root: Path, out: Path, cases: list[str]) -> None:
    """Run cases such as `"all:bfloat16:second rank texts"` one after another, in processes that know each other."""
    for case in cases:
        units, dtype, rows = case.split(":")
        found, first, seen = run(root, rows, getattr(torch, dtype), units)
        name = f"{case.replace(' ', '_').replace(':', '_')}_{dist.get_rank()}"
        save_file(first, out / f"{name}.safetensors")
        (out / f"{name}.json").write_text(json.dumps({"steps": found, "dtypes": seen}), encoding="utf-8")
