# SPDX-License-Identifier: Apache-2.0
"""How the publishers of GEODE's parts name tensors and sizes, and where both go in a GEODE model."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING

from geode.configuration.configuration_geode import SonataConfig, VggtConfig
from geode.modeling_geode import sonata_geode, vggt_conversion_geode
from geode.part_files import PartFiles


VISION, PROJECTOR, LANGUAGE = "model.vision_tower.", "model.multi_modal_projector.", "model.language_model."
POINTS, RECONSTRUCTOR, HEAD = "model.point_encoder.", "model.reconstructor.", "lm_head.weight"
EMBEDDING = LANGUAGE + "embed_tokens.weight"

# From our names of OpenGVLab's vision tower, which are transformers', to the publisher's, applied in order.
_OPENGVLAB_VISION_NAMES = (
    (r"^embeddings\.cls_token$", "embeddings.class_embedding"),
    (r"^embeddings\.position_embeddings$", "embeddings.position_embedding"),
    (r"^embeddings\.patch_embeddings\.projection\.", "embeddings.patch_embedding."),
    (r"^encoder\.layer\.", "encoder.layers."),
    (r"\.attention\.[qkv]_proj\.", ".attn.qkv."),
    (r"\.attention\.projection_layer\.", ".attn.proj."),
    (r"\.attention\.([qk]_norm)\.", r".attn.\1."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.lambda_([12])$", r".ls\1"),
)
# All must be stated: what the publisher's constructor assumes otherwise is the 6B model.
_OPENGVLAB_VISION_SIZES = {
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "hidden_act": "hidden_act",
    "norm_type": "norm_type",
    "layer_norm_eps": "layer_norm_eps",
    "qkv_bias": "attention_bias",
    "qk_normalization": "use_qk_norm",
}
_OPENGVLAB_PROJECTOR_NAMES = {"layer_norm": "0", "linear_1": "1", "linear_2": "3"}
# What a configuration says of the program or file that wrote it, not of the model.
_ABOUT_THE_FILE = ("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "_name_or_path")


class Published(NamedTuple):
    """A tensor's name in its publisher's file, and which third of its rows is meant where q, k and v are one."""

    key: str
    third: int | None = None


class Layout(NamedTuple):
    """
    How one public checkpoint becomes parts of a GEODE model.

    `modules` are the beginnings of the names that it fills, `settings` fields of [`GeodeConfig`], `skipped` patterns of tensors
    that are left out, with the reason, and `may_lack` patterns of ours that are zero where the file has none.
    """

    modules: tuple[str, ...]
    settings: dict[str, Any]
    published: Callable[[str], Published]
    skipped: tuple[tuple[str, str], ...] = ()
    may_lack: tuple[tuple[str, str], ...] = ()


def vision_layout(part: PartFiles) -> Layout:
    """
    Read a vision tower: OpenGVLab's form, with q, k and v in one matrix, or transformers'.

    Args:
        part ([`PartFiles`]):
            The checkpoint.

    Raises:
        ValueError: If its `config.json` describes neither.
    """
    model_type = part.config.get("model_type")
    if model_type == "intern_vit_6b":
        vision, published = _opengvlab_vision_config(part.config, part.name), _opengvlab_vision_name
    elif model_type == "internvl_vision":
        vision, published = _own_form(part.config, part.name), Published
    else:
        raise ValueError(
            f"The vision tower {part.name!r} must be an InternViT, with `model_type` 'intern_vit_6b' or 'internvl_vision' in "
            f"config.json, got {model_type!r}."
        )
    return Layout((VISION,), {"vision_config": vision}, lambda name: published(name.removeprefix(VISION)))


def language_layout(part: PartFiles) -> Layout:
    """
    Read a causal language model in transformers' form.

    Args:
        part ([`PartFiles`]):
            The checkpoint.

    Raises:
        ValueError: If transformers does not know its architecture, or it is quantised.
    """
    settings = {"text_config": _own_form(part.config, part.name)}
    return Layout((LANGUAGE, HEAD), settings, lambda name: Published(name.replace(LANGUAGE, "model.", 1)))


def vision_language_layout(part: PartFiles) -> Layout:
    """
    Read vision tower, projector and language model of an InternVL model at once, in transformers' form or OpenGVLab's.

    Args:
        part ([`PartFiles`]):
            The checkpoint.

    Raises:
        ValueError: If its `config.json` describes neither, or a visual path that GEODE has not.
    """
    modules = (VISION, PROJECTOR, LANGUAGE, HEAD)
    found = part.config
    if found.get("model_type") == "internvl":
        settings = {
            "vision_config": _own_form(
                {"model_type": "internvl_vision", **_section(found, "vision_config", part.name)}, part.name
            ),
            "text_config": _own_form(_section(found, "text_config", part.name), part.name),
        }
        names = ("downsample_ratio", "projector_hidden_act", "vision_feature_layer", "vision_feature_select_strategy")
        settings |= {name: found[name] for name in names if name in found}
        # On disk the language model's own wrapper is named as well, except by some versions of transformers.
        is_flat = any(key.startswith("model.") for key in part.tensors)
        return Layout(modules, settings, Published if is_flat else _internvl_name)
    if found.get("model_type") == "internvl_chat":
        wanted = {"ps_version": "v2", "select_layer": -1, "downsample_ratio": 0.5}
        other = {name: found.get(name) for name, value in wanted.items() if found.get(name) != value}
        if other:
            raise ValueError(f"{part.name!r} must have {wanted} in config.json, as InternVL3 has, got {other}.")
        settings = {
            "vision_config": _opengvlab_vision_config(_section(found, "vision_config", part.name), part.name),
            "text_config": _own_form(_section(found, "llm_config", part.name), part.name),
            "downsample_ratio": wanted["downsample_ratio"],
        }
        return Layout(modules, settings, _opengvlab_name)
    raise ValueError(
        f"{part.name!r} must be an InternVL model, with `model_type` 'internvl' or 'internvl_chat' in config.json, got "
        f"{found.get('model_type')!r}."
    )


def point_layout(part: PartFiles) -> Layout:
    """
    Read Sonata, or a network of the same form.

    Args:
        part ([`PartFiles`]):
            The checkpoint; its configuration has the arguments of the public constructor.

    Raises:
        ValueError: If the configuration is absent or asks for what our network has not.
    """
    _check_is_published(part, SonataConfig)
    config = sonata_geode.config_from_published(part.config)
    # Published files exist with and without it; it is only used in pre-training.
    config.mask_token = "embedding.mask_token" in part.tensors
    return Layout(
        (POINTS,),
        {"point_config": config.to_dict()},
        lambda name: Published(sonata_geode.published_name(name.removeprefix(POINTS))),
    )


def reconstructor_layout(part: PartFiles) -> Layout:
    """
    Read VGGT.

    Args:
        part ([`PartFiles`]):
            The checkpoint; sizes that its configuration does not state are VGGT-1B's.

    Raises:
        ValueError: If the configuration is that of another model.
    """
    _check_is_published(part, VggtConfig)
    config = vggt_conversion_geode.config_from_published(part.config)
    return Layout(
        (RECONSTRUCTOR,),
        {"reconstructor_config": config.to_dict()},
        lambda name: Published(*vggt_conversion_geode.checkpoint_name(name.removeprefix(RECONSTRUCTOR))),
        skipped=((f"^{re.escape(vggt_conversion_geode.TRACKER_PREFIX)}", "points are not tracked"),),
        may_lack=((f"^{re.escape(vggt_conversion_geode.MASK_TOKEN)}$", "for pre-training only"),),
    )


def _opengvlab_vision_config(found: Mapping[str, Any], name: str) -> dict[str, Any]:
    absent = sorted(_OPENGVLAB_VISION_SIZES.keys() - found.keys())
    if absent:
        raise ValueError(
            f"The configuration of the vision tower of {name!r} must state {absent}. Download it again, or add what its weights "
            "were trained with."
        )
    sizes = {ours: found[theirs] for theirs, ours in _OPENGVLAB_VISION_SIZES.items()}
    return {"model_type": "internvl_vision", **sizes, "num_channels": found.get("num_channels", 3)}


def _opengvlab_vision_name(name: str) -> Published:
    third = re.search(r"\.attention\.([qkv])_proj\.", name)
    for pattern, replacement in _OPENGVLAB_VISION_NAMES:
        name = re.sub(pattern, replacement, name)
    return Published(name, None if third is None else "qkv".index(third[1]))


def _opengvlab_name(name: str) -> Published:
    if name.startswith(VISION):
        key, third = _opengvlab_vision_name(name.removeprefix(VISION))
        return Published(f"vision_model.{key}", third)
    if name.startswith(PROJECTOR):
        layer, kind = name.removeprefix(PROJECTOR).split(".")
        return Published(f"mlp1.{_OPENGVLAB_PROJECTOR_NAMES[layer]}.{kind}")
    return _internvl_name(name)


def _internvl_name(name: str) -> Published:
    if name == HEAD:
        return Published(f"language_model.{HEAD}")
    return Published(name.replace(LANGUAGE, "language_model.model.", 1).removeprefix("model."))


def _own_form(found: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a configuration of transformers, with its defaults, and without what it says of its file."""
    model_type = found.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"{name!r} must be of an architecture that transformers has, and its `model_type` is {model_type!r}. Remote code is not "
            "run."
        )
    if found.get("quantization_config") is not None:
        raise ValueError(
            f"{name!r} is quantised, and its weights cannot be taken over. Name the model that it was made from."
        )
    try:
        config = CONFIG_MAPPING[model_type].from_dict(dict(found)).to_dict()
    except StrictDataclassError as error:
        raise ValueError(
            f"The configuration of {name!r} does not describe a model of type {model_type!r}: {error}"
        ) from error
    # Whether weights are tied is told by those who state it, not by a default.
    dropped = (*_ABOUT_THE_FILE, *({"tie_word_embeddings"} - found.keys()))
    return {key: value for key, value in config.items() if key not in dropped}


def _section(found: Mapping[str, Any], key: str, name: str) -> Mapping[str, Any]:
    if not isinstance(found.get(key), Mapping):
        raise ValueError(
            f"The configuration of {name!r} must have a `{key}`, got {found.get(key)!r}. Download it again."
        )
    return found[key]


def _check_is_published(part: PartFiles, config_class: type) -> None:
    if "model_type" in part.config:
        raise ValueError(
            f"{part.name!r} must be in its publisher's form, whose configuration has no `model_type`, and it has "
            f"{part.config['model_type']!r}, as in what `{config_class.__name__.removesuffix('Config')}Model.save_pretrained` writes."
        )


__all__ = [
    "Layout",
    "Published",
    "language_layout",
    "point_layout",
    "reconstructor_layout",
    "vision_language_layout",
    "vision_layout",
]
