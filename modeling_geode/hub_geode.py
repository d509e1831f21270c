# SPDX-License-Identifier: Apache-2.0
"""What every class of ours does on its way to the Hub and back: it takes its code along, and misses no tensor."""

import os
from typing import Any

import torch
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import CONFIG_NAME, cached_file, extract_commit_hash


_DOWNLOAD_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def save_code(owner: object, save_directory: str | os.PathLike) -> None:
    """
    Put the code of a model or processor, which has just been saved, next to its files.

    One that was loaded from a Hub folder carries its code already, and transformers copies it; then this does nothing.

    Args:
        owner (`object`):
            The model or processor.
        save_directory (`str` or `os.PathLike`):
            The folder that its `save_pretrained` has written.
    """
    if type(owner).__module__.startswith("geode."):
        try:
            from .export_geode import export_code
        except ImportError:
            return
        export_code(save_directory)


class CodeOnHubMixin:
    """
    A model or processor whose saved folder, and whose upload, hold its code. It goes before the library's class.

    With `push_to_hub=True` transformers uploads at the end of its own `save_pretrained`, before a subclass can add a file. So
    the code is written once more where the upload starts: a private hook of transformers, checked on 5.23.
    """

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Save as transformers does, with the code that loads the folder where `geode` is absent."""
        saved = super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        save_code(self, save_directory)
        return saved

    def _upload_modified_files(self, working_dir, *args, **kwargs):
        save_code(self, working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)  # type: ignore[misc]


class GeodeHubModel(CodeOnHubMixin, PreTrainedModel):
    """
    A model whose folder holds its code, and which loads complete checkpoints only.

    `optional_prefixes` names tensors that a checkpoint may lack; `incomplete_remedy` ends the error about others.
    `published_remedy` is for models with published weights in another form, whose configuration names no type.
    """

    optional_prefixes: tuple[str, ...] = ()
    incomplete_remedy = "Load a complete checkpoint."
    published_remedy: str | None = None

    @property
    def device(self) -> torch.device:
        """`torch.device`: Where it computes, also while accelerate keeps its weights elsewhere until they are needed."""
        device = super().device
        if device.type != "meta":
            return device
        hooks = (getattr(module, "_hf_hook", None) for module in self.modules())
        found = (getattr(hook, "execution_device", None) for hook in hooks)
        return torch.device(next((device for device in found if device is not None), device))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """
        Load as [`PreTrainedModel.from_pretrained`] does, but refuse a checkpoint that lacks tensors.

        The library initialises what is missing and warns. Here only `optional_prefixes` may be missing, unless
        `output_loading_info=True` hands the list of missing tensors to the caller. `config._commit_hash` is the commit that was
        loaded from the Hub, which results and adapters name and transformers 5.23 leaves out.

        Raises:
            ValueError: If another tensor is missing, or the checkpoint is in its publisher's form.
        """
        options = {name: kwargs[name] for name in _DOWNLOAD_OPTIONS if name in kwargs}
        if cls.published_remedy is not None and pretrained_model_name_or_path is not None and "config" not in kwargs:
            found, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **options)
            if found and "model_type" not in found:
                raise ValueError(
                    f"`{cls.__name__}.from_pretrained` needs a `model_type` in config.json, and "
                    f"{str(pretrained_model_name_or_path)!r} has none, as weights in their publisher's form. "
                    f"{cls.published_remedy}"
                )
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        model, info = loaded
        lost = sorted(name for name in info["missing_keys"] if not name.startswith(cls.optional_prefixes))
        # Without a checkpoint the caller composes a `state_dict`, and knows what is in it.
        if lost and pretrained_model_name_or_path is not None and not output_loading_info:
            raise ValueError(
                f"The checkpoint lacks {len(lost)} tensors of {cls.__name__}: {', '.join(lost[:5])}"
                f"{', ...' if len(lost) > 5 else ''}. They would be random. {cls.incomplete_remedy}"
            )
        if pretrained_model_name_or_path is not None:
            config_file = cached_file(
                pretrained_model_name_or_path, CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **options
            )
            model.config._commit_hash = extract_commit_hash(config_file, None)
        return loaded if output_loading_info else model


__all__ = ["CodeOnHubMixin", "GeodeHubModel", "save_code"]
