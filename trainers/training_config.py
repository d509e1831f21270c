# SPDX-License-Identifier: Apache-2.0
"""Options that all stages of training share, beside those of `transformers.TrainingArguments`."""

import json
from dataclasses import dataclass, field, fields

import torch
from trl.trainer.base_config import _BaseConfig  # private, but the base of every config of trl; checked on trl 1.16

from geode.configuration.configuration_geode import (
    GeodeConfig,
    GeodeDrhConfig,
    GeodeDrmConfig,
    SonataConfig,
    VggtConfig,
)
from geode.trainers.collator import OVERLONG


# The language model's and the vision tower's fields are those of any architecture, and are checked on the model.
_PARTS: dict[str, type | None] = {
    "drm_config": GeodeDrmConfig,
    "drh_config": GeodeDrhConfig,
    "point_config": SonataConfig,
    "reconstructor_config": VggtConfig,
    "text_config": None,
    "vision_config": None,
}


@dataclass(kw_only=True)
class GeodeTrainingConfig(_BaseConfig):
    """
    Options of every stage. All options of [`~transformers.TrainingArguments`] are options as well.

    > Parameters that control the data

    Args:
        mixture (`str`, *optional*):
            What is trained on: the YAML file of a mixture, or the name of a shipped one. Not needed by a trainer that is
            given its `train_dataset`.
        eval_mixture (`str`, *optional*):
            What is evaluated on, likewise.
        data_root (`str`, defaults to `"."`):
            Folder of the datasets.
        media_root (`str` or `dict[str, str]`, *optional*):
            Folder that the paths of records are relative to, or that of each source. Default: what the mixtures say, else
            `data_root`.
        cache_dir (`str`, *optional*):
            Folder of the Arrow files that mixtures are written to; the default is the `datasets` library's.
        feature_store (`str` or `dict[str, str]`, *optional*):
            Folder that `geode precompute` wrote, absolute or below `data_root`; with a dict, one for each source.
        geometry (`str`, *optional*):
            Where the geometry of records without one is, such as `"geometry/{stem}"`: see [`GeodeDataCollator`].
        use_geometry (`bool`, defaults to `True`):
            False leaves geometry and `<spatio>` tokens out.
        questions_per_pack (`int`, defaults to 8):
            Largest number of questions of one scene in a row; 1 packs nothing.
        expected_rows (`int`, *optional*):
            Rows of `mixture`, for a dry run where its files are absent.

    > Parameters that control the rows

    Args:
        with_values (`bool`, defaults to `True`):
            Numbers and boxes are control tokens with regression targets. False writes digits: the baseline.
        max_length (`int`, *optional*):
            Largest number of tokens of a question with its scene; the end of a longer answer is cut.
        overlong (`str`, defaults to `"error"`):
            What becomes of a record that cannot be cut: `"error"`, or `"drop"`, which is counted in the log.
        num_frames, num_geometry_frames (`int`, *optional*):
            Frames for the language model and for the reconstructor; the default is the processor's.

    > Parameters that control the model

    Args:
        model_overrides (`dict`, *optional*):
            Changes of the model's configuration by part, such as `{"drh_config": {"loss_weight": 0.5}}`; JSON on the
            command line.

    > Parameters that control evaluation

    Args:
        shuffled_scene_gate (`bool`, defaults to `True`):
            Evaluate once more with each scene replaced by another one, as `eval_shuffled_*`. If the loss hardly rises,
            geometry and frames do not reach the answer.
        num_eval_examples (`int`, defaults to 4):
            Generated answers that are logged and appended to `eval_examples.jsonl`.
        max_new_tokens (`int`, defaults to 64):
            Length of a generated answer.

    > Parameters that control the run

    Args:
        activation_checkpointing (`bool`, defaults to `True`):
            Compute activations again in the backward pass instead of keeping them.
        dry_run (`bool`, defaults to `False`):
            Print trainable parameters, steps, effective batch and estimated memory, and stop. Needs no weights and no data.
        dry_run_devices (`int`, *optional*):
            Processes that a dry run counts with; the default is those of the launch.
    """

    learning_rate: float = field(default=1.0e-5, metadata={"help": "Highest learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Shape of the learning rate over the run."})
    warmup_steps: float = field(default=0.03, metadata={"help": "Steps of warm-up, or below 1 their share."})
    # The library's old name of `activation_checkpointing`, which warns where it is set; trl sets it.
    gradient_checkpointing: bool | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Old name of activation_checkpointing."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must be false; the collator reads records."})

    mixture: str | None = field(default=None, metadata={"help": "Mixture to train on: a YAML file or a shipped name."})
    eval_mixture: str | None = field(default=None, metadata={"help": "Mixture to evaluate on."})
    data_root: str = field(default=".", metadata={"help": "Folder of the datasets."})
    media_root: dict | str | None = field(
        default=None, metadata={"help": "Folder of the media, or JSON of one for each source."}
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Folder of the Arrow files."})
    feature_store: dict | str | None = field(
        default=None, metadata={"help": "Folder that `geode precompute` wrote, or JSON of one for each source."}
    )
    geometry: str | None = field(default=None, metadata={"help": "Where geometry is, such as geometry/{stem}."})
    use_geometry: bool = field(default=True, metadata={"help": "False leaves geometry and <spatio> tokens out."})
    questions_per_pack: int = field(default=8, metadata={"help": "Questions of one scene in a row."})
    expected_rows: int | None = field(default=None, metadata={"help": "Rows of the mixture, for dry runs without it."})

    with_values: bool = field(default=True, metadata={"help": "False writes numbers as digits: the baseline."})
    max_length: int | None = field(default=None, metadata={"help": "Tokens of a question with its scene, at most."})
    overlong: str = field(default="error", metadata={"help": "What becomes of longer records: error or drop."})
    num_frames: int | None = field(default=None, metadata={"help": "Frames for the language model."})
    num_geometry_frames: int | None = field(default=None, metadata={"help": "Frames for the reconstructor."})

    model_overrides: dict | str | None = field(
        default=None, metadata={"help": "JSON of changes to the model's configuration, by part."}
    )

    shuffled_scene_gate: bool = field(default=True, metadata={"help": "Evaluate with other scenes as well."})
    num_eval_examples: int = field(default=4, metadata={"help": "Generated answers that are logged."})
    max_new_tokens: int = field(default=64, metadata={"help": "Length of a generated answer, at most."})

    dry_run: bool = field(default=False, metadata={"help": "Print what would be trained, and stop."})
    dry_run_devices: int | None = field(default=None, metadata={"help": "Processes that a dry run counts with."})

    def __post_init__(self):
        if self.activation_checkpointing is None and self.gradient_checkpointing is None:
            self.activation_checkpointing = True
        # The library refuses bf16 where there is no accelerator. A dry run computes nothing with it.
        self.use_cpu = self.use_cpu or (self.dry_run and not torch.accelerator.is_available())
        super().__post_init__()
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.accelerator.is_available()
        if self.hub_token is not None:
            raise ValueError(
                "`hub_token` must not be given, since it would be written into `training_args.bin`. Set HF_TOKEN, or log in with "
                "`hf auth login`."
            )
        for name in ("media_root", "feature_store", "model_overrides"):
            setattr(self, name, _parsed(name, getattr(self, name)))
        if self.overlong not in OVERLONG:
            raise ValueError(f"`overlong` must be one of {OVERLONG}, got {self.overlong!r}.")
        for name in ("questions_per_pack", "max_new_tokens"):
            check_count(name, getattr(self, name))
        for name in ("max_length", "num_frames", "num_geometry_frames", "expected_rows", "dry_run_devices"):
            check_count(name, getattr(self, name), is_optional=True)
        check_count("num_eval_examples", self.num_eval_examples, least=0)
        if self.remove_unused_columns:
            raise ValueError(
                "`remove_unused_columns` must be false, got true: it would take the records away before the collator reads "
                "them. Leave it out."
            )
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise ValueError(
                "`train_sampling_strategy` must be 'random' or 'sequential', got "
                f"{self.train_sampling_strategy!r}: lengths are only known once a scene is read. Use `questions_per_pack`, which "
                "saves more."
            )
        if self.label_smoothing_factor:
            raise ValueError(
                f"`label_smoothing_factor` must be 0, got {self.label_smoothing_factor}: it would replace the model's loss, and "
                "the regression head would never train."
            )
        check_overrides(self.model_overrides)


def _parsed(name: str, value):
    if not (isinstance(value, str) and value.startswith("{")):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"`{name}` must be JSON, got {value!r}: {error}.") from error


def check_count(name: str, value, *, least: int = 1, is_optional: bool = False) -> None:
    """Refuse what is no whole number of at least `least`."""
    if value is None and is_optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"`{name}` must be a whole number of at least {least}, got {value!r}.")


def check_positive(name: str, value) -> None:
    """Refuse what is no positive number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ValueError(f"`{name}` must be a positive number (1.0e-4, with the dot, in YAML), got {value!r}.")


def check_overrides(overrides: dict | str | None) -> None:
    """
    Refuse changes of a model's configuration that name what is not there.

    Args:
        overrides (`dict`, *optional*):
            Fields of [`GeodeConfig`]; a part's value is a dict of its fields.

    Raises:
        ValueError: If a field does not exist.
    """
    if overrides is None:
        return
    if not isinstance(overrides, dict):
        raise ValueError(
            f'`model_overrides` must be a mapping such as {{"drh_config": {{"loss_weight": 0.5}}}}, got {overrides!r}.'
        )
    known = [entry.name for entry in fields(GeodeConfig)]
    for name, value in overrides.items():
        if name not in known:
            raise ValueError(
                f"`model_overrides` must name fields of `GeodeConfig`, got {name!r}. Parts: {sorted(_PARTS)}."
            )
        if name not in _PARTS or (name == "reconstructor_config" and value is None):
            continue
        if not isinstance(value, dict):
            raise ValueError(f"`model_overrides[{name!r}]` must be a mapping of fields, got {value!r}.")
        part = _PARTS[name]
        if part is None:
            continue
        unknown = sorted(value.keys() - {entry.name for entry in fields(part)})
        if unknown:
            raise ValueError(
                f"`model_overrides[{name!r}]` must name fields of `{part.__name__}`, got {unknown}. It has "
                f"{sorted(entry.name for entry in fields(part) if not entry.name.startswith('_'))}."
            )


def overridden(config: GeodeConfig, overrides: dict | str | None) -> GeodeConfig:
    """
    Change a model's configuration, and check it anew.

    Args:
        config ([`GeodeConfig`]):
            The configuration, which stays as it is.
        overrides (`dict`, *optional*):
            See [`GeodeTrainingConfig`].

    Returns:
        [`GeodeConfig`]: The changed one.

    Raises:
        ValueError: If a field does not exist, or the configuration does not fit together.
    """
    check_overrides(overrides)
    if not isinstance(overrides, dict) or not overrides:
        return config
    content = config.to_dict()
    for name, value in overrides.items():
        if name in _PARTS and value is not None:
            part = content[name] or {}
            # The fields of these two are those of whatever architecture the model has.
            unknown = sorted(value.keys() - part.keys()) if _PARTS[name] is None else []
            if unknown:
                raise ValueError(f"`model_overrides[{name!r}]` must name fields of the model's, got {unknown}.")
            value = {**part, **value}
        content[name] = value
    return GeodeConfig.from_dict(content)


__all__ = ["GeodeTrainingConfig", "check_count", "check_overrides", "check_positive", "overridden"]
