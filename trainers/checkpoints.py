# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints of a run were written to their end, and are as they were written."""

import json
import logging
import os
import zipfile
import zlib
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from geode.data.whole_files import write_whole
from geode.modeling_geode.scene_files_geode import read_sealed, sealed
from geode.trainers.drm_files import DRM_FILE


logger = logging.getLogger(__name__)

# A whole model, its parts, an adapter, the rationale module; then FSDP's and DeepSpeed's.
_WEIGHTS = ("model*.safetensors", "adapter_model.safetensors", DRM_FILE, "pytorch_model_fsdp*", "global_step*")
_OPTIMIZERS = ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*")
_SILENT = ("rng_state", "scheduler", "scaler")
CHECKSUMS_FILE = "checksums.json"
_CHUNK = 1 << 24


def find_damage(folder: str | os.PathLike, *, without_optimizer: bool = False) -> str | None:
    """
    Say what a checkpoint lacks, from the ends of its files and then from their checksums, which reads all of it.

    Args:
        folder (`str` or `os.PathLike`):
            The checkpoint.
        without_optimizer (`bool`, defaults to `False`):
            Whether it may lack the optimiser, as `save_only_model` leaves it.

    Returns:
        `str`, *optional*: What is wrong; None if nothing is.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return "it is not there"
    try:
        json.loads((folder / TRAINER_STATE_NAME).read_text("utf-8"))
    except FileNotFoundError:
        return f"it has no {TRAINER_STATE_NAME}, which is written last"
    except ValueError:
        return f"{TRAINER_STATE_NAME} ends too early"
    for patterns, part in ((_WEIGHTS, "weights"), (() if without_optimizer else _OPTIMIZERS, "optimiser")):
        if patterns and not any(next(folder.glob(pattern), None) for pattern in patterns):
            return f"it has no {part}"
    index = folder / "model.safetensors.index.json"
    shards = set(json.loads(index.read_text("utf-8"))["weight_map"].values()) if index.is_file() else set()
    absent = sorted(name for name in shards if not (folder / name).is_file())
    if absent:
        return f"it has no {absent[0]}"
    torn = [path.name for path in sorted(folder.iterdir()) if path.is_file() and not _is_whole(path)]
    return f"{torn[0]} ends too early" if torn else _find_changed(folder, without_optimizer)


def _find_changed(folder: Path, without_optimizer: bool) -> str | None:
    """Say which file is not as it was written; checkpoints of earlier versions and of other programs have no checksums."""
    if not (folder / CHECKSUMS_FILE).is_file():
        return None
    try:
        known = read_sealed(folder / CHECKSUMS_FILE, "")
    except ValueError:
        return f"{CHECKSUMS_FILE} is damaged"
    # A run goes on without these, with other random numbers or from the first learning rate, and says nothing.
    lost = sorted(name for name in known if name.startswith(_SILENT) and not (folder / name).is_file())
    if lost and not without_optimizer:
        return f"it has no {lost[0]}"
    there = {name: value for name, value in known.items() if (folder / name).is_file()}
    changed = [name for name, value in sorted(there.items()) if _checksum(folder / name) != value]
    return f"{changed[0]} is damaged: its checksum is not the one in {CHECKSUMS_FILE}" if changed else None


def write_checksums(folder: str | os.PathLike) -> None:
    """
    Write down what the files of a checkpoint hold: neither safetensors nor `torch.load` sees a flipped bit.

    Args:
        folder (`str` or `os.PathLike`):
            A checkpoint that is written.
    """
    folder = Path(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS_FILE)
    found = {path.relative_to(folder).as_posix(): _checksum(path) for path in files}
    write_whole(folder / CHECKSUMS_FILE, json.dumps(sealed(found), indent=1) + "\n")


def _checksum(path: Path) -> str:
    """CRC-32, which is for faults and several times as fast as a digest."""
    value = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            value = zlib.crc32(chunk, value)
    return f"{value:08x}"


def _is_whole(path: Path) -> bool:
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt"):
                return True
        except SafetensorError:
            return False
    # The directory of the archives that `torch.save` writes stands at their end.
    return path.suffix not in (".pt", ".pth", ".bin") or zipfile.is_zipfile(path)


def last_whole_checkpoint(folder: str | os.PathLike, *, without_optimizer: bool = False) -> str | None:
    """
    Find the last checkpoint of a run that is whole, and warn about later ones.

    The library takes the highest number, whatever the folder holds: a run that was killed while it saved could not go on.

    Args:
        folder (`str` or `os.PathLike`):
            Output folder of the run.
        without_optimizer (`bool`, defaults to `False`):
            See [`find_damage`].

    Returns:
        `str`, *optional*: The checkpoint; None if there is none.
    """
    numbered = {}
    for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        number = path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if number.isdecimal() and path.is_dir():
            numbered[int(number)] = path
    for _, path in sorted(numbered.items(), reverse=True):
        damage = find_damage(path, without_optimizer=without_optimizer)
        if damage is None:
            return str(path)
        logger.warning("The checkpoint %s is skipped: %s.", path, damage)
    return None


def checkpoint_to_resume(value: str | bool | None, args) -> str | None:
    """
    Say where a run goes on.

    Args:
        value (`str` or `bool`, *optional*):
            A checkpoint; or True, also as a word of the command line, for the last whole one of the output folder. If there
            is none, the run begins, so that one command serves a job that is stopped and started again.
        args ([`GeodeTrainingConfig`]):
            The run.

    Returns:
        `str`, *optional*: The checkpoint; None to begin.

    Raises:
        ValueError: If the checkpoint that is named was not written to its end.
    """
    if isinstance(value, str) and value.lower() in ("true", "false"):
        value = value.lower() == "true"
    if not value:
        return None
    if value is True:
        found = last_whole_checkpoint(args.output_dir, without_optimizer=args.save_only_model)
        if found is None:
            logger.warning("There is no whole checkpoint in %s to resume from: the run begins.", args.output_dir)
        return found
    damage = find_damage(value, without_optimizer=args.save_only_model)
    if damage is not None:
        raise ValueError(
            f"`resume_from_checkpoint` must lead to a whole checkpoint, got {str(value)!r}, and {damage}. Take an earlier one, or "
            "`true` for the last whole one of `output_dir`."
        )
    return str(value)


__all__ = ["checkpoint_to_resume", "find_damage", "last_whole_checkpoint", "write_checksums"]
