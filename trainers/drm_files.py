# SPDX-License-Identifier: Apache-2.0
"""The result of stage 1: the rationale module alone, and what it was trained with."""

import json
import os
from dataclasses import fields
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from geode import __version__
from geode.configuration.configuration_geode import GeodeDrmConfig
from geode.data.feature_store import frozen_encoder_digest, option_differences


DRM_FILE, ORIGIN_FILE = "drm.safetensors", "stage1.json"
FORMAT_VERSION = 1
_MODULE_NAME = "model.drm."


def drm_origin(model) -> dict:
    """
    Say what a rationale module belongs to, in a form that JSON can hold.

    Args:
        model ([`GeodeForConditionalGeneration`]): The model, its weights neither sharded nor on the meta device.

    Returns:
        `dict`: The base model's name and commit, the module's configuration, the widths between which it stands, and digests of
        the frozen encoders whose features it reads.
    """
    config = model.config
    return {
        "format_version": FORMAT_VERSION,
        "geode_version": __version__,
        "base_model": config._name_or_path or None,
        "base_revision": getattr(config, "_commit_hash", None),
        "drm_config": _comparable(config),
        "encoders": {name: frozen_encoder_digest(model, name) for name in ("point_encoder", "vision_tower")},
    }


def _comparable(config) -> dict:
    """What decides the module's shape and meaning. Whether features are injected is decided in stage 2, outside of it."""
    names = [entry.name for entry in fields(GeodeDrmConfig) if entry.name in GeodeDrmConfig.__annotations__]
    ours = {name: getattr(config.drm_config, name) for name in names if name != "inject_features"}
    return {
        **ours,
        "text_hidden_size": config.text_config.hidden_size,
        "vision_hidden_size": config.vision_config.hidden_size,
        "point_hidden_size": config.point_config.hidden_size,
        "patch_grid": list(config.patch_grid),
    }


def save_drm(model, folder: str | os.PathLike, *, origin: dict, state_dict: dict | None = None) -> None:
    """
    Write the rationale module of a model as `drm.safetensors` and `stage1.json`.

    Args:
        model ([`GeodeForConditionalGeneration`]): The model.
        folder (`str` or `os.PathLike`): Where the files go.
        origin (`dict`): See [`drm_origin`].
        state_dict (`dict`, *optional*): The model's, gathered, where its weights are sharded.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if state_dict is None:
        tensors = model.model.drm.state_dict()
    else:
        tensors = {
            name.removeprefix(_MODULE_NAME): tensor
            for name, tensor in state_dict.items()
            if name.startswith(_MODULE_NAME)
        }
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    save_file(tensors, folder / DRM_FILE, metadata={"format": "pt"})
    (folder / ORIGIN_FILE).write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")


def load_drm(model, path: str | os.PathLike) -> dict:
    """
    Put a rationale module that stage 1 has trained into a model.

    Args:
        model ([`GeodeForConditionalGeneration`]):
            The model; the module is replaced in place.
        path (`str` or `os.PathLike`):
            The folder with `drm.safetensors` and `stage1.json`, or the first of them.

    Returns:
        `dict`: What `stage1.json` says.

    Raises:
        FileNotFoundError: If one of the files is missing.
        ValueError: If the module has another configuration, or was trained on other encoders.
    """
    path = Path(path)
    folder = path.parent if path.suffix == ".safetensors" else path
    file = path if path.suffix == ".safetensors" else folder / DRM_FILE
    for needed in (file, folder / ORIGIN_FILE):
        if not needed.is_file():
            raise FileNotFoundError(f"`drm_path` must lead to a result of stage 1, and there is no {needed}.")
    origin = json.loads((folder / ORIGIN_FILE).read_text("utf-8"))
    own = drm_origin(model)
    differences = option_differences(
        json.loads(json.dumps({name: own[name] for name in ("drm_config", "encoders")})),
        {name: origin[name] for name in ("drm_config", "encoders")},
    )
    if differences:
        raise ValueError(
            f"The rationale module in {folder} does not fit this model: {'; '.join(differences)}. Take the base model of stage "
            f"1, {origin['base_model']!r}, and the same `model_overrides`."
        )
    model.model.drm.load_state_dict(load_file(file))
    return origin


def load_projection(module: torch.nn.Module, file: str | os.PathLike) -> None:
    """Read a module that only training needs back from a checkpoint."""
    if not Path(file).is_file():
        raise FileNotFoundError(f"The checkpoint lacks {file}, which `alignment_loss_weight` needs to go on.")
    module.load_state_dict(load_file(file))


__all__ = ["DRM_FILE", "ORIGIN_FILE", "drm_origin", "load_drm", "load_projection", "save_drm"]
