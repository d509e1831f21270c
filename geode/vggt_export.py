# SPDX-License-Identifier: Apache-2.0
"""What `geode export` does with VGGT: public weights and our own become a folder with code, processor and card."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from transformers.utils import logging

from geode.configuration.configuration_geode import GeodeConfig, VggtConfig
from geode.hub_cards.terms import Part, recorded_parts
from geode.hub_cards.vggt_card import build_vggt_card, resolve_license
from geode.modeling_geode.vggt_conversion_geode import CONFIG_NAME, find_file, is_weights_file, read_config
from geode.modeling_geode.vggt_geode import VggtModel, convert_vggt_checkpoint
from geode.modeling_geode.vggt_processing_geode import VggtImageProcessor
from geode.publishing import complete


PROCESSOR_NAME = "preprocessor_config.json"


class Origin(NamedTuple):
    """
    Where a checkpoint is from: its path or name, its `model_type` if it has one, and its commit if it is on the Hub.

    `parts` are what it was assembled from, as its `config.json` has them.
    """

    model: str
    model_type: str | None
    commit: str | None
    parts: Sequence[Part] = ()

    @property
    def is_vggt(self) -> bool:
        """Whether it is a VGGT model, in our form or in the public one, which has no `model_type`."""
        return self.model_type in (None, VggtConfig.model_type)

    @property
    def name(self) -> str:
        """Its name for others: that on the Hub, or the last part of its path here."""
        return Path(self.model).resolve().name if self.commit is None else self.model


def find_origin(model: str | os.PathLike, revision: str | None = None) -> Origin:
    """
    Tell what a checkpoint is from its `config.json`; one file with weights is public VGGT.

    Args:
        model (`str` or `os.PathLike`):
            A file, a folder or a name on the Hub.
        revision (`str`, *optional*):
            Branch, tag or commit of a name on the Hub.

    Returns:
        [`Origin`]: Of GEODE or VGGT.

    Raises:
        FileNotFoundError: If there is no such checkpoint, or no `config.json` in it.
        ValueError: If it is of another kind.
    """
    text = os.fspath(model)
    if is_weights_file(text):
        if revision is not None:
            raise ValueError(
                f"`revision` is for names on the Hub, got {revision!r} for the file {text!r}. Leave it out."
            )
        return Origin(text, None, None)
    is_path = text.startswith((".", "/", "~")) or Path(text).exists()
    path = None if is_path and not Path(text).is_dir() else find_file(text, CONFIG_NAME, revision=revision)
    if path is None:
        place = (
            f"{text!r}" if is_path else f"{text!r}, looked up on the Hub (offline, in its cache) as it is not here,"
        )
        raise FileNotFoundError(
            f"`model` must be a checkpoint's folder or name on the Hub, and {place} holds no config.json, which says what "
            "it is. Of public VGGT weights without one, give the path of the file."
        )
    commit = None if Path(text).is_dir() else path.parent.name
    config = read_config(text, revision=commit) or {}
    model_type = config.get("model_type")
    if model_type not in (None, GeodeConfig.model_type, VggtConfig.model_type):
        raise ValueError(
            f"`model` must be of GEODE or VGGT, and the config.json of {text!r} has the `model_type` {model_type!r}."
        )
    return Origin(
        text, model_type, commit, recorded_parts(config.get("parts") or [], f"`parts` in the config.json of {text!r}")
    )


def export_vggt(folder: Path, origin: Origin, *, license_id: str | None = None) -> str | None:
    """
    Save a VGGT model, its processor, their code, a card, the licence and the hashes.

    Args:
        folder (`Path`):
            A folder that is new or empty.
        origin ([`Origin`]):
            Where the model is, from [`find_origin`].
        license_id (`str`, *optional*):
            Licence of the weights, see `geode.hub_cards.vggt_card.resolve_license`.

    Returns:
        `str`: The licence on the card, or `None` where it is not known.

    Raises:
        FileNotFoundError: If there are no weights.
        ValueError: If the weights do not fit, or `license_id` contradicts their publisher.
    """
    # First, as reading the weights takes a while.
    known_license = resolve_license(origin.name, origin.commit, license_id)
    logging.disable_progress_bar()
    processor = None
    if origin.model_type is None:
        model = convert_vggt_checkpoint(origin.model, revision=origin.commit)
    else:
        model = VggtModel.from_pretrained(origin.model, revision=origin.commit or "main")
        if find_file(origin.model, PROCESSOR_NAME, revision=origin.commit) is not None:
            processor = VggtImageProcessor.from_pretrained(origin.model, revision=origin.commit or "main")
    if processor is None:
        processor = VggtImageProcessor(image_size=model.config.image_size, patch_size=model.config.patch_size)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    card = build_vggt_card(model, source=origin.name, revision=origin.commit, license_id=license_id)
    link = None if origin.commit is None else f"https://huggingface.co/{origin.name}"
    complete(folder, card, None, [Part("weights", origin.name, known_license, origin.commit, link)])
    return known_license


__all__ = ["Origin", "export_vggt", "find_origin"]
