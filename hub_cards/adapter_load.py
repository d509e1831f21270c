# SPDX-License-Identifier: Apache-2.0
"""Load an adapter on its base model, in a process of its own: `python -m geode.hub_cards.adapter_load ADAPTER BASE`."""

import json
import sys
from pathlib import Path

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file

from geode.configuration.configuration_geode import GeodeConfig
from geode.modeling_geode.modeling_geode import GeodeForConditionalGeneration
from geode.trainers.stage2_trainer import load_adapter


def load_whole(folder: Path, base: Path) -> None:
    """
    Load an adapter and see that all of it arrives: peft passes over tensors that it does not know.

    Args:
        folder (`Path`): The adapter, with the `config.json` of the model that it was trained in.
        base (`Path`): The base model.

    Raises:
        ValueError: If the base model lacks what the adapter does not bring, or a tensor of the adapter is not in the model
            afterwards as it is in its file.
    """
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    whole = set(settings.get("modules_to_save") or ())
    say("loading the base model")
    model, found = GeodeForConditionalGeneration.from_pretrained(
        base, config=GeodeConfig.from_pretrained(folder), use_safetensors=True, output_loading_info=True
    )
    lost = sorted(name for name in found["missing_keys"] if not whole & set(name.split(".")))
    if lost or found["unexpected_keys"]:
        raise ValueError(
            f"the base model is not the one of config.json: it lacks {len(lost)} tensors and has {len(found['unexpected_keys'])} others, "
            f"such as `{[*lost, *sorted(found['unexpected_keys'])][0]}`"
        )
    say("PeftModel.from_pretrained")
    loaded = get_peft_model_state_dict(load_adapter(model, folder), save_embedding_layers=False)
    stored = load_file(folder / "adapter_model.safetensors")
    wrong = sorted(loaded.keys() ^ stored.keys()) or [
        name for name, tensor in stored.items() if not torch.equal(tensor.to(loaded[name].dtype), loaded[name])
    ]
    if wrong:
        raise ValueError(
            f"{len(wrong)} of its tensors do not arrive in the model, or are missing, such as `{wrong[0]}`"
        )


def say(step: str) -> None:
    """Tell the caller what comes next."""
    sys.stdout.write(f"step: {step}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    load_whole(Path(sys.argv[1]), Path(sys.argv[2]))


__all__ = ["load_whole"]
