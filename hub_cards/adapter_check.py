# SPDX-License-Identifier: Apache-2.0
"""What `geode check` does with an adapter: whether it is whole, which model it is for, and whether it fits and loads on that model."""

import math
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

import yaml
from huggingface_hub import metadata_load

from geode.hub_cards.manifest import Tensor, read_header
from geode.hub_cards.problems import Problem, read_json
from geode.hub_cards.terms import Part


ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CARD_AGAIN = "Write card and record again with `geode card adapter`"
SAVE_AGAIN = "Save the adapter of stage 2 again"
STATE_BASE = "State `base_model` with its commit as `revision` in the facts of `geode card adapter`"
EMBEDDING, HEAD = "embed_tokens", "drh"
_PREFIX = "base_model.model."  # peft's, before the name that a module has in the model
_ROWS = ".token_adapter.trainable_tokens_delta"
_LORA = (".lora_A.weight", ".lora_B.weight")


def check_adapter(folder: Path) -> list[Problem]:
    """
    Check what an adapter is, by its own files.

    Args:
        folder (`Path`): It has an `adapter_config.json`.

    Returns:
        `list[Problem]`: What is wrong with its settings, and with what its weights hold.
    """
    settings = read_json(folder / ADAPTER_CONFIG)
    if not isinstance(settings, dict):
        return [Problem(ADAPTER_CONFIG, "it is no object in JSON", SAVE_AGAIN)]
    return [*_check_kind(settings), *_check_base(folder, settings), *_check_parts(folder, settings)]


def base_of(folder: Path) -> str | None:
    """Return which base model an adapter's settings name; None if they name none."""
    settings = read_json(folder / ADAPTER_CONFIG)
    name = settings.get("base_model_name_or_path") if isinstance(settings, dict) else None
    return name if isinstance(name, str) and name else None


def check_fit(folder: Path, base: Path) -> list[Problem]:
    """
    Compare the tensors of an adapter with those of its base model, by the headers of their files.

    Args:
        folder (`Path`): The adapter.
        base (`Path`): The base model.

    Returns:
        `list[Problem]`: One for tensors of the adapter that belong to nothing or have a wrong shape, one for those that are missing
        in a part that is saved as a whole.

    Raises:
        FileNotFoundError: If the base model has no weights in safetensors format.
        ValueError: If a file of the base model is damaged.
    """
    of_base = {
        name: tensor for path in sorted(base.glob("*.safetensors")) for name, tensor in read_header(path).items()
    }
    if not of_base:
        raise FileNotFoundError(f"`base` must hold a model, and there is no *.safetensors in {str(base)!r}.")
    tensors = read_header(folder / ADAPTER_WEIGHTS)
    settings = read_json(folder / ADAPTER_CONFIG)
    whole = _names(settings, "modules_to_save")
    rows = _row_ids(settings)
    misfits = [text for tensor in tensors.values() if (text := _misfit(tensor, of_base, whole, rows)) is not None]
    held = {name.removeprefix(_PREFIX) for name in tensors}
    lost = [name for name in of_base if whole & set(name.split(".")) and name not in held]
    lost += [twin for name in tensors if (twin := _twin(name)) is not None and twin not in tensors]
    problems = []
    if misfits:
        problems.append(Problem(ADAPTER_WEIGHTS, _first(misfits), "Take the base model that it was trained on"))
    if lost:
        what = _first([f"it lacks `{name}`" for name in sorted(lost)])
        problems.append(Problem(ADAPTER_WEIGHTS, what, SAVE_AGAIN))
    return problems


def load_on_base(folder: Path, base: Path, *, timeout_s: float = 1800.0) -> list[Problem]:
    """
    Load an adapter on its base model with peft, in a process of its own. Nothing of the folder is run: it has no code.

    Args:
        folder (`Path`): The adapter.
        base (`Path`): The base model.
        timeout_s (`float`, defaults to 1800): Longest time for it.

    Returns:
        `list[Problem]`: What failed, or nothing.
    """
    from geode.hub_cards.stranger import bare_environment, run_steps

    command = [sys.executable, "-P", "-m", "geode.hub_cards.adapter_load", str(folder.resolve()), str(base.resolve())]
    with tempfile.TemporaryDirectory(prefix="geode-check-") as place:
        outcome = run_steps(command, cwd=place, environment=bare_environment(place), timeout_s=timeout_s)
    if outcome.failed_step is None:
        return []
    what = f"{outcome.failed_step} failed: {outcome.error}".rstrip(".")
    return [Problem(ADAPTER_WEIGHTS, what, "Take the base model that it was trained on, or save the adapter again")]


def check_on_base(
    folder: Path, base: str | os.PathLike | None, *, is_on_hub: bool, is_sound: bool
) -> tuple[list[Problem], list[str]]:
    """
    Check an adapter against its base model, as far as that is at hand.

    Args:
        folder (`Path`): The adapter.
        base (`str` or `os.PathLike`, *optional*): Folder of the base model; by default what the adapter names, if that is a folder.
        is_on_hub (`bool`): Whether it is from the Hub; then what it names is no folder here.
        is_sound (`bool`): Whether nothing was wrong with its files; else it is not loaded.

    Returns:
        `tuple[list[Problem], list[str]]`: What is wrong, and notes on what was done or left undone.

    Raises:
        FileNotFoundError: If there is no model in `base`.
    """
    named = base_of(folder)
    problems, notes = [], []
    if is_on_hub and named is not None and Path(named).is_dir() and not Part("base_model", named, None).is_on_hub:
        problems.append(Problem(ADAPTER_CONFIG, f"its base model is the path {named!r}", STATE_BASE))
    if base is None and not is_on_hub and named is not None and Path(named).is_dir():
        base = named
        notes.append(f"its base model is the folder {named}, which others do not have. {STATE_BASE}")
    if base is None:
        notes.append(
            "not checked: whether its tensors fit the base model, and whether it loads; give a folder of "
            f"{named or 'the base model'} with `--base`"
        )
        return problems, notes
    if not Path(base).is_dir():
        raise FileNotFoundError(
            f"`base` must be the folder of the base model, and there is none at {os.fspath(base)!r}."
        )
    if problems or not is_sound:
        return problems, [*notes, "not compared with its base model: there is something wrong with its files"]
    problems = check_fit(folder, Path(base))
    if problems:
        return problems, [*notes, "not loaded: it does not fit its base model"]
    if find_spec("peft") is None:
        return [], [*notes, 'not loaded: that needs peft, pip install "geode-vlm[train]"']
    problems = load_on_base(folder, Path(base))
    return problems, notes if problems else [*notes, f"it fits the base model in {os.fspath(base)}, and loads on it"]


def _check_kind(settings: dict) -> Iterator[Problem]:
    if settings.get("peft_type") != "LORA":
        yield Problem(
            ADAPTER_CONFIG, f"its `peft_type` is {settings.get('peft_type')!r} instead of 'LORA'", SAVE_AGAIN
        )
    if settings.get("megatron_config") is not None:  # peft 0.21 imports the module that `megatron_core` names
        yield Problem(ADAPTER_CONFIG, "its `megatron_config` lets peft run code that it names", "Remove it there")


def _check_base(folder: Path, settings: dict) -> Iterator[Problem]:
    name = base_of(folder)
    if name is None:
        yield Problem(ADAPTER_CONFIG, "it names no base model in `base_model_name_or_path`", STATE_BASE)
    elif Path(name).is_dir():
        return  # while it is being made, perhaps; a check of it says so
    elif not Part("base_model", name, None).is_on_hub:
        what = f"its base model is the path {name!r}, which is not here"
        yield Problem(ADAPTER_CONFIG, what, STATE_BASE)
    else:
        if settings.get("revision") in (None, "", "main"):
            what = f"it names no revision of {name}, whose main branch may change"
            yield Problem(ADAPTER_CONFIG, what, STATE_BASE)
        stated = _stated_base(folder / "README.md")
        if stated is not None and name not in stated:
            what = f"its header has {', '.join(stated) or 'nothing'} as `base_model`, and {ADAPTER_CONFIG} has {name}"
            yield Problem("README.md", what, CARD_AGAIN)


def _check_parts(folder: Path, settings: dict) -> Iterator[Problem]:
    try:
        tensors = read_header(folder / ADAPTER_WEIGHTS)
    except FileNotFoundError:
        yield Problem(ADAPTER_WEIGHTS, "there are no weights", SAVE_AGAIN)
        return
    except ValueError:  # found by its content already
        return
    if not any(name.removeprefix(_PREFIX).startswith(f"{HEAD}.") for name in tensors):
        yield Problem(ADAPTER_WEIGHTS, f"it lacks the regression head (`{HEAD}`)", SAVE_AGAIN)
    model = read_json(folder / "config.json")
    control = model.get("control_tokens") if isinstance(model, dict) else None
    if not isinstance(control, dict) or EMBEDDING in _names(settings, "modules_to_save"):
        return  # `config.json` is missed elsewhere; or all rows are saved
    ids, rows = (
        _row_ids(settings),
        [tensor for name, tensor in tensors.items() if name.endswith(f"{EMBEDDING}{_ROWS}")],
    )
    lost = [
        token for token, entry in control.items() if not isinstance(entry, dict) or entry.get("token_id") not in ids
    ]
    if not rows or lost:
        tokens = ", ".join(lost if rows else control)
        yield Problem(ADAPTER_WEIGHTS, f"it lacks the rows of the new tokens {tokens}", SAVE_AGAIN)
    elif rows[0].shape[:1] != (len(ids),):
        what = f"it has {math.prod(rows[0].shape[:1])} rows of new tokens, and {ADAPTER_CONFIG} names {len(ids)}"
        yield Problem(ADAPTER_WEIGHTS, what, SAVE_AGAIN)


def _misfit(tensor: Tensor, of_base: dict[str, Tensor], whole: set[str], rows: list[int]) -> str | None:
    """Say why a tensor of an adapter does not fit; None if it does, or if only loading it can tell."""
    name = tensor.name.removeprefix(_PREFIX)
    for ending, (axis, base_axis) in {_LORA[0]: (1, 1), _LORA[1]: (0, 0), _ROWS: (1, 1)}.items():
        if not name.endswith(ending):
            continue
        weight = of_base.get(f"{name.removesuffix(ending)}.weight")
        if weight is None:
            return f"`{name}` belongs to nothing in the base model"
        fits = len(weight.shape) == len(tensor.shape) == 2 and tensor.shape[axis] == weight.shape[base_axis]
        if fits and (ending != _ROWS or max(rows, default=0) < weight.shape[0]):
            return None
        return f"`{name}` of shape {list(tensor.shape)} does not fit `{weight.name}` of shape {list(weight.shape)}"
    if name in of_base:
        shape = of_base[name].shape
        return None if shape == tensor.shape else f"`{name}` has shape {list(tensor.shape)} instead of {list(shape)}"
    # A part that stage 2 adds, such as the feature injection, is not in the base model.
    parts = whole & set(name.split("."))
    if parts and not any(parts & set(other.split(".")) for other in of_base):
        return None
    return None if ".lora_" in name else f"`{name}` belongs to nothing in the base model"


def _twin(name: str) -> str | None:
    """Return the other of the two matrices, of which one is useless alone."""
    for one, other in (_LORA, _LORA[::-1]):
        if name.endswith(one):
            return name.removesuffix(one) + other
    return None


def _first(texts: list[str]) -> str:
    return texts[0] if len(texts) == 1 else f"{texts[0]}, and {len(texts) - 1} more such"


def _names(settings: dict, key: str) -> set[str]:
    value = settings.get(key)
    return {str(name) for name in value} if isinstance(value, list) else set()


def _row_ids(settings: dict) -> list[int]:
    """Return the rows of the embedding that train: a list, or one for each module."""
    value = settings.get("trainable_token_indices")
    value = value.get(EMBEDDING) if isinstance(value, dict) else value
    return [row for row in value if isinstance(row, int)] if isinstance(value, list) else []


def _stated_base(card: Path) -> Iterable[str] | None:
    """Return the base models that a card states; None where its header cannot be read, which is said elsewhere."""
    try:
        header = metadata_load(card) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return None
    stated = header.get("base_model") or []
    return [stated] if isinstance(stated, str) else [str(name) for name in stated]


__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_WEIGHTS",
    "CARD_AGAIN",
    "base_of",
    "check_adapter",
    "check_fit",
    "check_on_base",
    "load_on_base",
]
