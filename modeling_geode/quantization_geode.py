# SPDX-License-Identifier: Apache-2.0
"""What of GEODE is quantised by `from_pretrained(..., quantization_config=...)`: the language model, and nothing else."""

import copy
from typing import Any

import torch
from torch import nn
from transformers.quantizers import AutoQuantizationConfig


# Encoders, rationale module, projector and heads: their numbers matter more than their size, or they train in QLoRA. Patterns,
# as transformers 5.23 matches them from the start of a module's name, with the base model within a larger one or alone.
UNQUANTIZED = (
    "lm_head",
    "drh",
    r"(?:model\.)?vision_tower",
    r"(?:model\.)?multi_modal_projector",
    r"(?:model\.)?point_encoder",
    r"(?:model\.)?reconstructor",
    r"(?:model\.)?drm",
    r"(?:model\.)?feature_injection",
)
# Where quantisers of transformers keep the modules that they skip.
SKIP_FIELDS = ("llm_int8_skip_modules", "modules_to_not_convert")


def quantize_language_model_only(quantization_config: Any) -> Any:
    """
    Add what is never quantised to what a quantiser's configuration skips.

    A list of the caller's is added to, not replaced, so that one from a recipe for another model does no harm.

    Args:
        quantization_config (`QuantizationConfigMixin` or `dict`): As `from_pretrained` takes it.

    Returns:
        `QuantizationConfigMixin`: A copy; the argument is not changed.

    Raises:
        ValueError: If the quantiser has no list of modules to skip, so that it would convert the regression head too.
    """
    if isinstance(quantization_config, dict):
        quantization_config = AutoQuantizationConfig.from_dict(quantization_config)
    changed = copy.deepcopy(quantization_config)
    fields = [name for name in SKIP_FIELDS if hasattr(changed, name)]
    if not fields:
        raise ValueError(
            f"`quantization_config` needs one of {list(SKIP_FIELDS)}, which keep the regression head in float32, got "
            f"{type(quantization_config).__name__} without. Use BitsAndBytesConfig or TorchAoConfig."
        )
    for name in fields:
        setattr(changed, name, list(dict.fromkeys([*(getattr(changed, name) or ()), *UNQUANTIZED])))
    return changed


def check_weights_are_readable(model: nn.Module, purpose: str) -> None:
    """
    Raise if a model holds weights whose state its quantiser gives wrongly.

    On a CPU with AVX512-BF16, bitsandbytes (0.50.2) packs a 4-bit weight anew at its first forward pass in eval mode. Its
    `state_dict` then turns the codes back, but not their scales, which stay rounded and transposed: a file of it loads and computes
    something else, and so does the model itself from then on.

    Args:
        model (`nn.Module`): The model, or a part.
        purpose (`str`): What its weights are read for.

    Raises:
        ValueError: If there is such a weight.
    """
    for name, parameter in model.named_parameters():
        if getattr(getattr(parameter, "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                f"{purpose} needs the weights as they were quantised, but a forward pass has packed `{name}` for this CPU, and "
                "bitsandbytes cannot undo that. Do it with a model that has just been loaded, or with 8 bits, or with torchao."
            )


def plain_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Put what quantised tensors are made of, codes and scales, in their places.

    Args:
        tensors (`dict[str, torch.Tensor]`): By name.

    Returns:
        `dict[str, torch.Tensor]`: Those that are plain, and the inner tensors of the others, as `name.scale`.
    """
    found = {}
    for name, tensor in tensors.items():
        if hasattr(tensor, "__tensor_flatten__"):  # PyTorch's protocol of tensor subclasses, as torchao's are
            inner, _ = tensor.__tensor_flatten__()
            found |= plain_tensors({f"{name}.{part}": getattr(tensor, part) for part in inner})
        else:
            found[name] = tensor
    return found


__all__ = ["UNQUANTIZED", "check_weights_are_readable", "plain_tensors", "quantize_language_model_only"]
