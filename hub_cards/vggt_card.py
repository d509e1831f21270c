# SPDX-License-Identifier: Apache-2.0
"""The card of a folder with a VGGT model: facts of the model and of where its weights are from."""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from geode import __version__
from geode.hub_cards.terms import PUBLISHED_LICENSES, check_license, forbids_commerce
from geode.modeling_geode.vggt_geode import VggtModel


TEMPLATE = Path(__file__).with_name("templates") / "vggt.md"
TAGS = ("vggt", "geode", "custom_code", "3d-reconstruction", "camera-pose-estimation", "depth-estimation")


def build_vggt_card(
    model: VggtModel, *, source: str, revision: str | None = None, license_id: str | None = None
) -> ModelCard:
    """
    Fill in the card of a VGGT model.

    Args:
        model ([`VggtModel`]):
            The model; its sizes, number of parameters and data types are stated.
        source (`str`):
            Where its weights are from: a name on the Hub, or of a file or folder.
        revision (`str`, *optional*):
            The commit, of a name on the Hub only; `None` says that `source` is not on the Hub.
        license_id (`str`, *optional*):
            Licence of the weights as the Hub names it, where it is not known from `source`; see [`resolve_license`].

    Returns:
        `ModelCard`: Ready to be saved as `README.md`.

    Raises:
        ValueError: See [`resolve_license`].
    """
    is_stated = license_id is not None
    license_id = resolve_license(source, revision, license_id)
    page = None if revision is None else f"https://huggingface.co/{source}"
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-to-3d",
        license=license_id,
        license_link=page if license_id == "other" else None,
        base_model=None if revision is None else source,
        tags=list(TAGS),
    )
    return ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        title=f"VGGT from {source}",
        source_link=f"the local checkpoint `{source}`" if page is None else f"[{source}]({page})",
        revision=revision,
        geode_version=__version__,
        num_parameters=model.num_parameters(),
        dtypes=" and ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in model.parameters()})),
        config=model.config,
        license_id=license_id,
        license_text=_license_text(license_id, page, is_stated=is_stated),
    )


def resolve_license(source: str, revision: str | None, license_id: str | None) -> str | None:
    """
    Return the licence of the weights, or `None` where nobody states it.

    Args:
        source (`str`):
            See [`build_vggt_card`].
        revision (`str`, *optional*):
            See [`build_vggt_card`]. A local copy has none, and its licence is not known from its name.
        license_id (`str`, *optional*):
            What the user states.

    Returns:
        `str`: Such as `"cc-by-nc-4.0"`; `"other"` for terms that the Hub has no name for.

    Raises:
        ValueError: If `license_id` is not in the form of a licence's name, or contradicts the publisher.
    """
    if license_id is not None:
        check_license(license_id, "`license_id`")
    published = None if revision is None else PUBLISHED_LICENSES.get(source.lower())
    if published is not None and license_id not in (None, published):
        raise ValueError(
            f"`license_id` is for weights whose licence is not known, got {license_id!r}, and {source} states "
            f"{published!r}. Leave it out."
        )
    return published or license_id


def _license_text(license_id: str | None, page: str | None, *, is_stated: bool) -> str:
    if license_id is None:
        return "Licence of the weights: not stated; that of their source applies."
    if license_id == "other":
        where = "their source" if page is None else f"their [source]({page})"
        return f"The weights have terms of their own, which {where} states. Read them before use."
    by_whom = "whoever wrote this folder" if is_stated else f"their [source]({page})"
    text = f"The weights are under `{license_id}`, as stated by {by_whom}."
    return f"{text} They are not for commercial use." if forbids_commerce(license_id) else text


__all__ = ["build_vggt_card", "resolve_license"]
