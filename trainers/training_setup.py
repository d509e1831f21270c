# SPDX-License-Identifier: Apache-2.0
"""From the options of a run to its model, processor, datasets and collator."""

import dataclasses
import logging
import os
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from geode.configuration.configuration_geode import GeodeConfig
from geode.data.feature_store import FeatureStore
from geode.data.mixtures import Mixture
from geode.data.readers import READERS
from geode.modeling_geode.modeling_geode import GeodeForConditionalGeneration
from geode.modeling_geode.processing_geode import GeodeProcessor
from geode.trainers.collator import GeodeDataCollator
from geode.trainers.packing import ScenePacks
from geode.trainers.training_config import GeodeTrainingConfig, overridden


logger = logging.getLogger(__name__)


# ---- model ----


def load_model(
    name_or_path: str | os.PathLike, *, overrides: dict | str | None = None, revision: str = "main", **kwargs
) -> GeodeForConditionalGeneration:
    """
    Load a checkpoint, with changes of its configuration.

    Args:
        name_or_path (`str` or `os.PathLike`):
            Folder or Hub id.
        overrides (`dict`, *optional*):
            See [`GeodeTrainingConfig`].
        revision (`str`, defaults to `"main"`):
            Branch, tag or commit on the Hub.
        **kwargs:
            Arguments of `from_pretrained`, such as `dtype` and `attn_implementation`.

    Returns:
        [`GeodeForConditionalGeneration`]: The model.

    Raises:
        ValueError: If the checkpoint lacks tensors or an override names what is not there.
    """
    config = GeodeConfig.from_pretrained(name_or_path, revision=revision)
    return GeodeForConditionalGeneration.from_pretrained(
        name_or_path, config=overridden(config, overrides), revision=revision, **kwargs
    )


def adapt_processor(processor: GeodeProcessor, args: GeodeTrainingConfig, config: GeodeConfig) -> GeodeProcessor:
    """
    Give a processor what a run changes: it is saved with the model, and then serves it as it was trained.

    Args:
        processor ([`GeodeProcessor`]): The processor, which is changed.
        args ([`GeodeTrainingConfig`]): The run.
        config ([`GeodeConfig`]): The model's, changed already.

    Returns:
        [`GeodeProcessor`]: The same one.
    """
    for name in ("num_frames", "num_geometry_frames"):
        if getattr(args, name) is not None:
            setattr(processor, name, getattr(args, name))
    overrides = args.model_overrides if isinstance(args.model_overrides, dict) else {}
    if "num_rationale_tokens" in (overrides.get("drm_config") or {}):
        processor.num_rationale_tokens = config.drm_config.num_rationale_tokens
    if "control_tokens" in overrides:
        processor.control_tokens = config.control_tokens
    return processor


def freeze_except(model: nn.Module, prefixes: list[str]) -> list[str]:
    """
    Let some parts of a model train, and nothing else.

    Args:
        model (`nn.Module`):
            The model. A parameter that two names share trains if one of them is meant.
        prefixes (`list[str]`):
            Names of modules or parameters, such as `"model.drm"`.

    Returns:
        `list[str]`: Names of the parameters that train.

    Raises:
        ValueError: If a prefix names nothing.
    """
    named = list(model.named_parameters(remove_duplicate=False))

    def is_in(name: str, prefix: str) -> bool:
        return name == prefix or name.startswith(prefix + ".")

    absent = [prefix for prefix in prefixes if not any(is_in(name, prefix) for name, _ in named)]
    if absent:
        parts = sorted({".".join(name.split(".")[:2]) for name, _ in named})
        raise ValueError(
            f"`prefixes` must name parts of the model, got {absent}, which hold no parameter. Its parts: {parts}."
        )
    for _, parameter in named:
        parameter.requires_grad_(False)
    trained = [name for name, _ in named if any(is_in(name, prefix) for prefix in prefixes)]
    for name, parameter in named:
        if name in set(trained):
            parameter.requires_grad_(True)
    return trained


def frozen_modules(model: nn.Module) -> list[nn.Module]:
    """Return the largest modules that have parameters of which none trains."""
    parameters = list(model.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        return [model]
    return [frozen for child in model.children() for frozen in frozen_modules(child)]


def keep_in_eval(frozen: list[nn.Module], language_model: nn.Module) -> None:
    """
    Switch frozen modules to evaluation: no dropout, no drop path.

    Layers of a frozen language model, through which gradients flow, still checkpoint their activations. They do only while
    their own flag says training; that of their attention, which has the dropout, does not.
    """
    for module in frozen:
        module.eval()
    layers = {module for module in language_model.modules() if isinstance(module, GradientCheckpointingLayer)}
    for module in frozen:
        for layer in layers.intersection(module.modules()):
            layer.training = layer.gradient_checkpointing


def keep_inputs_exact(accelerator) -> None:
    """
    Let FSDP2 leave what goes into a model and comes out of it as it is.

    With bf16 it would round points, cameras and regression targets to three digits before the model sees them, and the losses
    and values after it.

    Args:
        accelerator (`accelerate.Accelerator`): That of a run, before it has prepared the model.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version == 2 and plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = dataclasses.replace(
            plugin.mixed_precision_policy, cast_forward_inputs=False, output_dtype=None
        )


# ---- data ----


def media_folders(mixtures: list[Mixture], data_root: str | Path) -> dict[str, Path]:
    """
    Return the folder of the media of each source.

    Args:
        mixtures (`list[Mixture]`): The mixtures of a run.
        data_root (`str` or `Path`): Folder of the datasets.

    Returns:
        `dict[str, Path]`: Folder by `Record.source`.

    Raises:
        ValueError: If two entries of one source have different folders.
    """
    folders: dict[str, Path] = {}
    for source in (source for mixture in mixtures for source in mixture.sources):
        name, folder = READERS[source.reader].NAME, source.media_folder(data_root)
        if folders.setdefault(name, folder) != folder:
            raise ValueError(
                f"The media of {name} must lie in one folder, got {folders[name]} and {folder}. Give both entries of the "
                "mixture one `media_root` and links below it."
            )
    return folders


def load_mixtures(args: GeodeTrainingConfig) -> tuple:
    """
    Read the mixtures of a run. The first process reads, the others find what it has written.

    Args:
        args ([`GeodeTrainingConfig`]): The run.

    Returns:
        Records to train on and to evaluate on, each a `datasets.Dataset` or None.

    Raises:
        FileNotFoundError: If a mixture or its files are missing.
    """
    loaded: list = []
    for name in (args.mixture, args.eval_mixture):
        if name is None:
            loaded.append(None)
            continue
        with args.main_process_first(desc=f"reading {name}"):
            loaded.append(Mixture.from_yaml(name).load(args.data_root, cache_dir=args.cache_dir))
    return tuple(loaded)


def as_packs(dataset, args: GeodeTrainingConfig, *, shuffle: bool):
    """
    Pack the questions of a dataset by scene, unless it has packs already.

    Args:
        dataset (*optional*): Records, dicts or a `datasets.Dataset`; packs and None are returned as they are.
        args ([`GeodeTrainingConfig`]): The run.
        shuffle (`bool`): True deals the packs anew each epoch.

    Returns:
        A dataset of packs.
    """
    if dataset is None or isinstance(dataset, ScenePacks | dict):
        return dataset
    if not len(dataset):
        raise ValueError(
            "A dataset must have at least one record, got none. Look at the mixture with `geode data check`."
        )
    if isinstance(dataset[0], list | tuple):
        return dataset
    return ScenePacks(dataset, questions_per_pack=args.questions_per_pack, seed=args.seed, shuffle=shuffle)


def open_stores(args: GeodeTrainingConfig, model: PreTrainedModel, processor: GeodeProcessor):
    """
    Open the feature stores of a run, and compare them with the model that reads them.

    Args:
        args ([`GeodeTrainingConfig`]): The run.
        model ([`GeodeForConditionalGeneration`]): The model.
        processor ([`GeodeProcessor`]): Its processor.

    Returns:
        [`FeatureStore`], a dict of them, or None.

    Raises:
        ValueError: If a store was made by other encoders.
    """
    if args.feature_store is None:
        return None
    named = args.feature_store if isinstance(args.feature_store, dict) else {"": args.feature_store}
    stores = {name: FeatureStore(Path(args.data_root) / folder) for name, folder in named.items()}
    for store in stores.values():
        store.check(model, processor)
    return stores if isinstance(args.feature_store, dict) else stores[""]


def build_collator(
    args: GeodeTrainingConfig, model: PreTrainedModel, processor: GeodeProcessor, **options
) -> GeodeDataCollator:
    """
    Make the collator of a run.

    Args:
        args ([`GeodeTrainingConfig`]): The run.
        model ([`GeodeForConditionalGeneration`]): The model.
        processor ([`GeodeProcessor`]): Its processor.
        **options: What the stage adds.

    Returns:
        [`GeodeDataCollator`]: The collator.
    """
    media_root = args.media_root
    names = [name for name in (args.mixture, args.eval_mixture) if name is not None]
    if media_root is None and names:
        media_root = media_folders([Mixture.from_yaml(name) for name in names], args.data_root)
    settings = {
        "media_root": args.data_root if media_root is None else media_root,
        "geometry": args.geometry,
        "use_geometry": args.use_geometry,
        "feature_store": open_stores(args, model, processor),
        "with_values": args.with_values,
        "max_length": args.max_length,
        "overlong": args.overlong,
        "seed": args.seed,
    }
    return GeodeDataCollator(processor=processor, **{**settings, **options})


__all__ = [
    "adapt_processor",
    "as_packs",
    "build_collator",
    "freeze_except",
    "frozen_modules",
    "keep_in_eval",
    "keep_inputs_exact",
    "load_mixtures",
    "load_model",
    "media_folders",
    "open_stores",
]
