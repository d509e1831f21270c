# SPDX-License-Identifier: Apache-2.0
"""The public VGGT checkpoints: where their files are, how their tensors and sizes are named, and what in them is ours."""

import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, load_state_dict_from_file
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, StrictDataclassError
from transformers.utils import logging

from geode.configuration.configuration_geode import VggtConfig


logger = logging.get_logger(__name__)

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
# In the order in which they are looked for.
WEIGHT_NAMES = ("model.safetensors", INDEX_NAME, "model.pt")
FILE_SUFFIXES = (".safetensors", ".pt", ".pth")
# The form of names on the Hub that are not also names of files here: an owner and a repository.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def _replace_level(pattern: str) -> Callable[[re.Match], str]:
    """A replacement that puts the matched index plus one into `pattern`: the checkpoint counts levels from 1."""
    return lambda match: pattern.format(int(match[1]) + 1)


# From our parameter names to the checkpoint's, applied in order.
_CHECKPOINT_NAMES: tuple[tuple[str, str | Callable[[re.Match], str]], ...] = (
    (r"^trunk\.embeddings\.patch_embeddings\.projection", "aggregator.patch_embed.patch_embed.proj"),
    (r"^trunk\.embeddings\.position_embeddings", "aggregator.patch_embed.pos_embed"),
    (r"^trunk\.embeddings", "aggregator.patch_embed"),
    (r"^trunk\.layernorm", "aggregator.patch_embed.norm"),
    (r"^trunk\.encoder\.layer", "aggregator.patch_embed.blocks"),
    (r"\.attention\.[qkv]_proj", ".attn.qkv"),
    (r"\.attention\.(?:o_proj|projection)", ".attn.proj"),
    (r"\.attention\.", ".attn."),
    (r"\.layer_scale(\d)(?:\.lambda1)?", r".ls\1.gamma"),
    (r"^(camera_token|register_token)", r"aggregator.\1"),
    (r"^layers\.(\d+)\.(frame|global)_block", r"aggregator.\2_blocks.\1"),
    (r"^camera_head\.blocks", "camera_head.trunk"),
    (r"^camera_head\.output_norm", "camera_head.trunk_norm"),
    (r"^camera_head\.initial_pose", "camera_head.empty_pose_tokens"),
    (r"^camera_head\.pose_embedding", "camera_head.embed_pose"),
    (r"^camera_head\.modulation", "camera_head.poseLN_modulation.1"),
    (r"^camera_head\.pose_mlp", "camera_head.pose_branch"),
    (r"_head\.projections", "_head.projects"),
    (r"_head\.resizers", "_head.resize_layers"),
    (r"_head\.laterals\.(\d)", _replace_level("_head.scratch.layer{}_rn")),
    (r"_head\.fusions\.(\d)", _replace_level("_head.scratch.refinenet{}")),
    (r"\.lateral_unit", ".resConfUnit1"),
    (r"\.output_unit", ".resConfUnit2"),
    (r"(refinenet\d)\.projection", r"\1.out_conv"),
    (r"_head\.feature_conv", "_head.scratch.output_conv1"),
    (r"_head\.output_layers", "_head.scratch.output_conv2"),
)
_CONFIG_NAMES = {
    "img_size": "image_size",
    "embed_dim": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "rope_freq": "rope_theta",
    "vit_depth": "trunk_num_hidden_layers",
    "vit_num_heads": "trunk_num_attention_heads",
    "camera_trunk_depth": "camera_num_hidden_layers",
    "camera_num_heads": "camera_num_attention_heads",
    "dpt_features": "dense_hidden_size",
    "dpt_out_channels": "dense_projection_sizes",
    "intermediate_layer_idx": "tapped_layers",
}
MASK_TOKEN = "aggregator.patch_embed.mask_token"
TRACKER_PREFIX = "track_head."


def is_weights_file(checkpoint: str | os.PathLike) -> bool:
    """Whether a path or name is that of one file with weights, instead of a folder or a name on the Hub."""
    path = Path(checkpoint)
    return path.is_file() or (path.suffix in FILE_SUFFIXES and not path.is_dir())


def find_file(checkpoint: str | os.PathLike, name: str, *, revision: str | None = None) -> Path | None:
    """
    Return one file of a checkpoint, downloaded if need be.

    Args:
        checkpoint (`str` or `os.PathLike`):
            A folder, or a name on the Hub such as `"facebook/VGGT-1B"`. A folder goes first.
        name (`str`):
            The file's name.
        revision (`str`, *optional*):
            Branch, tag or commit of a name on the Hub.

    Returns:
        `Path`: The file, or `None` where there is none of this name.

    Raises:
        FileNotFoundError: If `checkpoint` is neither a folder nor found on the Hub.
        ValueError: If `revision` is given for a folder.
    """
    text = os.fspath(checkpoint)
    if Path(text).is_dir():
        _check_revision(text, revision)
        return Path(text) / name if (Path(text) / name).is_file() else None
    if isinstance(checkpoint, os.PathLike) or not _HUB_ID.fullmatch(text):
        raise FileNotFoundError(
            f"`checkpoint` must be a folder, a file ending in {_or(FILE_SUFFIXES)}, or a name on the Hub such as "
            f"'facebook/VGGT-1B', and there is nothing at {text!r}. A path is relative to {Path.cwd()}."
        )
    try:
        return Path(hf_hub_download(text, name, revision=revision))
    except EntryNotFoundError:
        return None
    except (OSError, HFValidationError) as error:
        raise FileNotFoundError(
            f"`checkpoint` {text!r} is no folder here, and the Hub does not give it{_at(revision)}: {error}"
        ) from error


def read_config(checkpoint: str | os.PathLike, *, revision: str | None = None) -> dict[str, Any] | None:
    """
    Return the content of a checkpoint's `config.json`, or `None` where there is none.

    Args:
        checkpoint (`str` or `os.PathLike`):
            See [`find_file`].
        revision (`str`, *optional*):
            See [`find_file`].

    Raises:
        FileNotFoundError: See [`find_file`].
        ValueError: If the file holds something else than an object in JSON.
    """
    path = find_file(checkpoint, CONFIG_NAME, revision=revision)
    return None if path is None else read_object(path)


def resolve_checkpoint(
    checkpoint: Mapping[str, Any] | str | os.PathLike,
    config: VggtConfig | Mapping[str, Any] | None,
    *,
    revision: str | None = None,
) -> tuple[dict[str, torch.Tensor], VggtConfig]:
    """
    Return the tensors and the sizes of a public checkpoint in any of its forms.

    Args:
        checkpoint (`Mapping`, `str` or `os.PathLike`):
            A state dict, a file, a folder or a name on the Hub; see `convert_vggt_checkpoint`.
        config (`VggtConfig` or `Mapping`, *optional*):
            Sizes; `None` takes them from the `config.json` of a folder, or VGGT-1B's.
        revision (`str`, *optional*):
            Branch, tag or commit of a name on the Hub.

    Raises:
        FileNotFoundError: If there is no such file, folder or repository, or no weights in it.
        ValueError: If the checkpoint is in our form, or something in it is not a tensor.
    """
    if not isinstance(checkpoint, (str, os.PathLike)):
        _check_revision("a state dict", revision)
        return _checked_state(checkpoint), _resolve_config(config)
    if is_weights_file(checkpoint):
        _check_revision(os.fspath(checkpoint), revision)
        return _checked_state(read_weights(Path(checkpoint))), _resolve_config(config)
    found = read_config(checkpoint, revision=revision) or {}
    if "model_type" in found:
        remedy = "`VggtModel.from_pretrained`" if found["model_type"] == VggtConfig.model_type else "its own class"
        raise ValueError(
            f"`checkpoint` must be a public VGGT checkpoint, whose config.json has no `model_type`, and "
            f"{os.fspath(checkpoint)!r} holds a model of type {found['model_type']!r}. Load it with {remedy}."
        )
    state = _checked_state(_read_folder(checkpoint, revision))
    return state, config_from_published(found) if config is None else _resolve_config(config)


def config_from_published(found: Mapping[str, Any]) -> VggtConfig:
    """
    Translate the `config.json` of a public checkpoint, whose names are those of the public constructor.

    Args:
        found (`Mapping`):
            Its content; what it does not say is as in VGGT-1B.

    Returns:
        [`VggtConfig`]: The sizes.

    Raises:
        ValueError: If the values do not describe a VGGT model.
    """
    known = {name: value for name, value in found.items() if _is_size(name)}
    if len(known) < len(found):
        # A publisher may state switches of his own program there. The tensors show whether a size was among them.
        logger.warning(f"Of config.json, {sorted(found.keys() - known.keys())} say nothing to this model.")
    return _resolve_config(known)


def convert_state_dict(
    checkpoint: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """
    Copy the tensors of a public checkpoint under our names.

    Args:
        checkpoint (`Mapping[str, torch.Tensor]`):
            The public state dict.
        expected (`Mapping[str, torch.Tensor]`):
            Our state dict; only names and shapes are read.

    Returns:
        `dict[str, torch.Tensor]`: One tensor per entry of `expected`.

    Raises:
        ValueError: If a tensor is missing, unexpected or of a wrong shape, or the names are ours already.
    """
    sources = {name: checkpoint_name(name) for name in expected}
    ours = [name for name, (source, _) in sources.items() if name != source and name in checkpoint]
    if ours:
        raise ValueError(
            f"`checkpoint` must have the public names of tensors, and has {len(ours)} of ours, such as `{ours[0]}`. It "
            "is converted already: load its folder with `VggtModel.from_pretrained`."
        )
    shapes = {}
    for name, (source, third) in sources.items():
        rows, *rest = expected[name].shape
        shapes[source] = (rows if third is None else 3 * rows, *rest)
    _check_tensors(checkpoint, shapes)

    state = {}
    for name, (source, third) in sources.items():
        if source not in checkpoint:
            state[name] = torch.zeros(shapes[source])
            continue
        tensor = checkpoint[source].detach()
        # Copied, because thirds of one storage cannot be saved and the caller may go on using the dictionary.
        state[name] = (tensor if third is None else tensor.chunk(3)[third]).clone()
    return state


def checkpoint_name(name: str) -> tuple[str, int | None]:
    """Our parameter name to the checkpoint's, and which third of its rows it is, if the trunk's fused projection."""
    third = re.search(r"\.([qkv])_proj\.", name)
    for pattern, replacement in _CHECKPOINT_NAMES:
        name = re.sub(pattern, replacement, name)
    return name, None if third is None else "qkv".index(third[1])


def _is_size(name: str) -> bool:
    return _CONFIG_NAMES.get(name, name) in VggtConfig.__dataclass_fields__


def _resolve_config(config: VggtConfig | Mapping[str, Any] | None) -> VggtConfig:
    # By name, not by class: a configuration loaded with remote code is another class object.
    if config is not None and not isinstance(config, Mapping):
        return config
    fields = {_CONFIG_NAMES.get(name, name): value for name, value in (config or {}).items()}
    unknown = [name for name in fields if not _is_size(name)]
    if unknown:
        known = sorted({*_CONFIG_NAMES, "patch_size", "mlp_ratio", "num_register_tokens"})
        raise ValueError(f"`config` has unknown keys {sorted(unknown)}. Use a `VggtConfig` or the keys {known}.")
    try:
        return VggtConfig(**fields)
    except StrictDataclassError as error:
        raise ValueError(f"`config` does not describe a VGGT model: {error}") from error


# ---- files ----


def _read_folder(checkpoint: str | os.PathLike, revision: str | None) -> Mapping[str, Any]:
    for name in WEIGHT_NAMES:
        path = find_file(checkpoint, name, revision=revision)
        if path is not None and name == INDEX_NAME:
            return _read_shards(checkpoint, path, revision)
        if path is not None:
            return read_weights(path)
    text = os.fspath(checkpoint)
    place = (
        f"the folder {text!r}"
        if Path(text).is_dir()
        else f"the Hub (offline, its cache){_at(revision)}, where {text!r} was looked up as it is no folder here,"
    )
    raise FileNotFoundError(
        f"`checkpoint` must hold one of {_or(WEIGHT_NAMES)}, and {place} has none. Give the path of the file itself if it "
        "has another name."
    )


def _read_shards(checkpoint: str | os.PathLike, index: Path, revision: str | None) -> dict[str, Any]:
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, Mapping):
        raise ValueError(f"{index} must hold a `weight_map` from tensors to files. Download the checkpoint again.")
    state: dict[str, Any] = {}
    for name in sorted(set(weight_map.values())):
        # An index could otherwise name files outside of its folder.
        path = find_file(checkpoint, name, revision=revision) if Path(name).name == name else None
        if path is None:
            raise FileNotFoundError(f"{index} names {name!r}, which is not beside it. Download the checkpoint again.")
        state |= read_weights(path)
    return state


def read_weights(path: Path) -> Mapping[str, Any]:
    """
    Return the content of one file with weights, from disk as it is read; pickled code is refused.

    Args:
        path (`Path`):
            A `.safetensors`, `.pt` or `.pth` file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it has another ending, or is damaged.
    """
    if path.suffix not in FILE_SUFFIXES:
        raise ValueError(f"`checkpoint` must end in {_or(FILE_SUFFIXES)}, got {os.fspath(path)!r}.")
    if not path.is_file():
        raise FileNotFoundError(
            f"`checkpoint` must be a file, a folder or a name on the Hub, and there is no file {os.fspath(path)!r}. It "
            f"is relative to {Path.cwd()}."
        )
    try:
        is_safe = path.suffix == ".safetensors"
        return load_state_dict_from_file(path, map_location="cpu", mmap=zipfile.is_zipfile(path), safe=is_safe)
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"`checkpoint` {os.fspath(path)!r} ({path.stat().st_size} bytes) cannot be read as weights. Download it "
            f"again; pickled code is never run. ({error})"
        ) from error


def read_object(path: Path) -> dict[str, Any]:
    """Return the object that a file in JSON holds; anything else is a ValueError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be a file in JSON, and it is not ({error}). Download it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold an object in JSON, got a {type(content).__name__}. Download it again.")
    return content


def _check_revision(source: str, revision: str | None) -> None:
    if revision is not None:
        raise ValueError(
            f"`revision` is for names on the Hub, got {revision!r} for {source!r}, which is here. Leave it out."
        )


def _at(revision: str | None) -> str:
    return "" if revision is None else f" at revision {revision!r}"


def _or(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


# ---- tensors ----


def _checked_state(checkpoint: Any) -> dict[str, torch.Tensor]:
    """Refuse what is not a flat mapping from names to floating-point tensors."""
    if not isinstance(checkpoint, Mapping):
        raise ValueError(
            f"`checkpoint` must be or hold a state dict, got {type(checkpoint).__name__}. Pass `model.state_dict()`."
        )
    wrapped = [name for name, value in checkpoint.items() if isinstance(value, Mapping)]
    if wrapped:
        raise ValueError(
            f"`checkpoint` must be a state dict, and it holds others under {wrapped}. Load the file with `torch.load` and "
            f"pass the one with the weights, such as `checkpoint[{wrapped[0]!r}]`."
        )
    problems = [
        f"`{name}` is {f'of {value.dtype}' if isinstance(value, torch.Tensor) else f'a {type(value).__name__}'}"
        for name, value in checkpoint.items()
        if not (isinstance(value, torch.Tensor) and value.is_floating_point())
    ]
    if problems:
        raise ValueError(
            f"`checkpoint` must hold floating-point tensors only, and in {len(problems)} entries it does not: "
            f"{_shown(problems)}. Remove what is not a weight; quantised weights cannot be read."
        )
    return dict(checkpoint)


def _check_tensors(checkpoint: Mapping[str, torch.Tensor], shapes: dict[str, tuple[int, ...]]) -> None:
    tracker = {name for name in checkpoint if name.startswith(TRACKER_PREFIX)}
    problems = [f"missing `{name}`" for name in shapes if name not in checkpoint and name != MASK_TOKEN]
    problems += [f"unexpected `{name}`" for name in checkpoint if name not in shapes and name not in tracker]
    problems += [
        f"`{name}` has shape {tuple(checkpoint[name].shape)}, expected {shape}"
        for name, shape in shapes.items()
        if name in checkpoint and tuple(checkpoint[name].shape) != shape
    ]
    if problems:
        raise ValueError(
            f"`checkpoint` does not fit `config` in {len(problems)} of {len(shapes)} tensors: {_shown(problems)}. "
            "Check that the sizes in `config` are those of the checkpoint."
        )
    if tracker:
        logger.warning(
            f"Dropped the {len(tracker)} tensors `{TRACKER_PREFIX}*` of the checkpoint: this model does not track points."
        )


def _shown(problems: list[str]) -> str:
    return "; ".join(problems[:10]) + (f"; and {len(problems) - 10} more" if len(problems) > 10 else "")


__all__ = [
    "checkpoint_name",
    "config_from_published",
    "convert_state_dict",
    "find_file",
    "is_weights_file",
    "read_config",
    "read_object",
    "read_weights",
    "resolve_checkpoint",
]
