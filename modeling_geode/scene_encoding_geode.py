# SPDX-License-Identifier: Apache-2.0
"""What the model makes of a scene once, for many questions."""

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers.integrations.accelerate import load_offloaded_parameter
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .batching_geode import check_count
from .checked_files_geode import checked_path, parse_json, read_tensors
from .quantization_geode import check_weights_are_readable, plain_tensors
from .scene_files_geode import (
    FORMAT_VERSION,
    check_tensors,
    check_version,
    sealed,
    tensor_checksum,
    unsealed,
    write_tensors,
)
from .scene_inputs_geode import kind_of
from .shown_geode import shown


_ENCODING_KEY = "geode_scene_encoding"
_PREFIX_TENSORS = ("prefix.input_ids", "prefix.keys", "prefix.values")


@dataclass(frozen=True, eq=False)
class ScenePrefix:
    """
    Keys and values of what all questions about a scene begin with: the chat's markup and the scene's tokens.

    Args:
        input_ids (`torch.LongTensor` of shape `(prefix_length,)`):
            The tokens.
        keys (`tuple` of `torch.Tensor` of shape `(1, num_key_value_heads, prefix_length, head_dim)`):
            Of each layer of the language model.
        values (`tuple` of `torch.Tensor`):
            Likewise.
        language_digest (`str`, *optional*):
            Digest of the weights and settings of the language model that made them. None within a call.
    """

    input_ids: torch.Tensor
    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    language_digest: str | None = None

    def to(self, device: str | torch.device) -> "ScenePrefix":
        """The same prefix with its tensors on a device."""
        return dataclasses.replace(
            self,
            input_ids=self.input_ids.to(device),
            keys=tuple(key.to(device) for key in self.keys),
            values=tuple(value.to(device) for value in self.values),
        )


@dataclass(frozen=True, eq=False)
class SceneEncoding:
    """
    What the model knows of a scene before a question is asked.

    Args:
        visual_tokens (`torch.Tensor` of shape `(num_frames, num_tokens_per_frame, hidden_size)`):
            Projected visual tokens of the frames.
        rationale_tokens (`torch.Tensor` of shape `(num_rationale_tokens, hidden_size)`):
            All rationale tokens; a question may use only the first of them. None where geometry was off.
        summary (`dict`):
            Facts about the geometry, see [`SceneGeometry.summary`]. Must fit into JSON.
        encoder_digest (`str`):
            Digest of the weights and settings that made the tokens: tokens of another model mean nothing to this one.
        prefix ([`ScenePrefix`], *optional*):
            What the language model makes of the scene before a question, see `model.prefill_scene`.
    """

    visual_tokens: torch.Tensor
    rationale_tokens: torch.Tensor
    summary: dict
    encoder_digest: str
    prefix: ScenePrefix | None = None

    def __post_init__(self):
        for name, dims in (("visual_tokens", 3), ("rationale_tokens", 2)):
            value = getattr(self, name)
            if not isinstance(value, torch.Tensor) or not value.is_floating_point():
                raise TypeError(f"`{name}` must be a floating-point tensor, got {kind_of(value)}.")
            if value.dim() != dims:
                raise ValueError(f"`{name}` must have {dims} dimensions, got shape {tuple(value.shape)}.")
            if name == "visual_tokens" and 0 in value.shape:
                raise ValueError(f"`{name}` must hold at least one frame and token, got shape {tuple(value.shape)}.")
            if not bool(torch.isfinite(value).all()):
                raise ValueError(
                    f"`{name}` must be finite, got {int((~torch.isfinite(value)).sum())} values that are not."
                )
        if self.visual_tokens.shape[-1] != self.rationale_tokens.shape[-1]:
            raise ValueError(
                "`visual_tokens` and `rationale_tokens` must have the same width, got "
                f"{self.visual_tokens.shape[-1]} and {self.rationale_tokens.shape[-1]}."
            )

        if not isinstance(self.summary, dict):
            raise TypeError(f"`summary` must be a dict that JSON can hold, got {shown(self.summary)}.")
        if not isinstance(self.encoder_digest, str):
            raise TypeError(
                f"`encoder_digest` must be text, `model.encoder_digest()`, got {shown(self.encoder_digest)}."
            )

    @property
    def num_frames(self) -> int:
        """Number of frames."""
        return len(self.visual_tokens)

    def to(self, device: str | torch.device) -> "SceneEncoding":
        """
        The same encoding with its tensors on a device.

        Args:
            device (`str` or `torch.device`):
                The device.

        Returns:
            [`SceneEncoding`]: The moved encoding.
        """
        return dataclasses.replace(
            self,
            visual_tokens=self.visual_tokens.to(device),
            rationale_tokens=self.rationale_tokens.to(device),
            prefix=None if self.prefix is None else self.prefix.to(device),
        )

    def to_model_inputs(self, num_questions: int = 1) -> dict:
        """
        What `forward` and `generate` take instead of this scene's frames and geometry.

        Args:
            num_questions (`int`, defaults to 1):
                Rows of the batch, each a question about this scene; at least 1.

        Returns:
            `dict`: `mm_encoder_outputs`, with the digest by which another model refuses them, and `rationale_features` of
            shape `(num_questions, 1, num_rationale_tokens, hidden_size)` if geometry was on. Nothing is copied.
        """
        check_count("num_questions", num_questions)
        video = BaseModelOutputWithPooling(pooler_output=[self.visual_tokens.flatten(0, 1)] * num_questions)
        features = {"rationale_features": self.rationale_tokens.expand(num_questions, 1, -1, -1)}
        encoded = {"video": video, "encoder_digest": self.encoder_digest}
        return {"mm_encoder_outputs": encoded, **(features if len(self.rationale_tokens) else {})}

    def save(self, path: str | os.PathLike) -> None:
        """
        Write one safetensors file, whose header holds the facts, in one step.

        Args:
            path (`str` or `os.PathLike`):
                A path ending in `.safetensors`. Its folder is created if absent.
        """
        path = _safetensors_path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {"visual_tokens": self.visual_tokens}
        if len(self.rationale_tokens):
            tensors["rationale_tokens"] = self.rationale_tokens
        header = {
            "format_version": FORMAT_VERSION,
            "encoder_digest": self.encoder_digest,
            "summary": self.summary,
        }
        if self.prefix is not None:
            header["language_digest"] = self.prefix.language_digest
            keys, values = torch.cat(self.prefix.keys), torch.cat(self.prefix.values)
            tensors |= {"prefix.input_ids": self.prefix.input_ids, "prefix.keys": keys, "prefix.values": values}
        # The format itself has no checksum, and a flipped bit would be another token.
        header["checksums"] = {name: tensor_checksum(tensor) for name, tensor in tensors.items()}
        metadata = {_ENCODING_KEY: json.dumps(sealed(header))}
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            write_tensors(tensors, Path(scratch) / "encoding.safetensors", metadata)
            os.replace(Path(scratch) / "encoding.safetensors", path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "SceneEncoding":
        """
        Read an encoding that [`SceneEncoding.save`] wrote. Nothing is unpickled.

        Args:
            path (`str` or `os.PathLike`):
                The path given to `save`.

        Returns:
            [`SceneEncoding`]: The encoding, on the CPU.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is not an encoding, or damaged, or its format version is another.
        """
        path = _safetensors_path(path)
        if not path.is_file():
            raise FileNotFoundError(f"There is no scene encoding at {path}.")
        tensors, metadata = read_tensors(path)
        if _ENCODING_KEY not in metadata:
            raise ValueError(
                f"{path} holds tensors but no scene encoding: its header has no {_ENCODING_KEY!r}. It must be a file of `SceneEncoding.save`."
            )
        header, damage = (
            parse_json(metadata[_ENCODING_KEY], f"{_ENCODING_KEY} of {path}"),
            f"{path} is damaged. Encode the scene again.",
        )
        check_version(header, str(path))  # before the checksum, as another version may have another one
        header = unsealed(header, damage)
        has_prefix = "language_digest" in header
        needed = {"visual_tokens", *(_PREFIX_TENSORS if has_prefix else ())}
        missing = sorted(needed - tensors.keys()) + sorted({"summary", "encoder_digest"} - header.keys())
        if missing:
            raise ValueError(f"The scene encoding {path} lacks {missing}. Encode the scene again.")
        if "checksums" in header:  # absent in files of earlier versions
            check_tensors(tensors, header["checksums"], damage)
        visual_tokens = tensors["visual_tokens"]
        if visual_tokens.dim() != 3:
            raise ValueError(
                f"`visual_tokens` of {path} must have 3 dimensions, got shape {tuple(visual_tokens.shape)}."
            )
        return cls(
            visual_tokens=visual_tokens,
            rationale_tokens=tensors.get("rationale_tokens", visual_tokens.new_zeros(0, visual_tokens.shape[-1])),
            summary=header["summary"],
            encoder_digest=header["encoder_digest"],
            prefix=_loaded_prefix(tensors, header["language_digest"], path) if has_prefix else None,
        )


def _loaded_prefix(tensors: dict[str, torch.Tensor], language_digest, path: Path) -> ScenePrefix:
    """The prefix of a file, whose tensors must fit together."""
    input_ids, keys, values = (tensors[name] for name in _PREFIX_TENSORS)
    fits = input_ids.dim() == 1 and keys.dim() == 4 and keys.shape == values.shape and keys.shape[2] == len(input_ids)
    is_typed = input_ids.dtype == torch.long and keys.is_floating_point() and keys.dtype == values.dtype
    if not (fits and is_typed and isinstance(language_digest, str | None)):
        shapes = [f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in (input_ids, keys, values)]
        raise ValueError(
            f"The prefix of {path} must have tokens (prefix_length,) and keys and values (num_layers, num_heads, prefix_length, "
            f"head_dim), got {shapes} and the digest {shown(language_digest)}. Compute it again with `model.prefill_scene(...)`."
        )
    return ScenePrefix(input_ids, keys.split(1), values.split(1), language_digest=language_digest)


def scenes_to_model_inputs(scenes: Sequence[SceneEncoding]) -> dict:
    """
    What `forward` and `generate` take instead of the frames and geometry of a batch with one scene for each row.

    Args:
        scenes (`Sequence[SceneEncoding]`): The scenes, possibly the same many times; none gives nothing.

    Returns:
        `dict`: See [`SceneEncoding.to_model_inputs`].

    Raises:
        ValueError: If the scenes are of different encoders, or have different numbers of rationale tokens.
    """
    if not scenes or all(scene is scenes[0] for scene in scenes):
        return scenes[0].to_model_inputs(len(scenes)) if scenes else {}
    numbers = sorted({len(scene.rationale_tokens) for scene in scenes})
    if len({scene.encoder_digest for scene in scenes}) > 1 or len(numbers) > 1:
        raise ValueError(
            "The scenes of a batch must come from the same encoders and have the same number of rationale tokens, got "
            f"numbers {numbers} and digests {sorted({scene.encoder_digest[:12] for scene in scenes})}. Split the batch, or "
            "encode them with one model."
        )
    video = BaseModelOutputWithPooling(pooler_output=[scene.visual_tokens.flatten(0, 1) for scene in scenes])
    encoded = {"video": video, "encoder_digest": scenes[0].encoder_digest}
    features = {"rationale_features": torch.stack([scene.rationale_tokens for scene in scenes])[:, None]}
    return {"mm_encoder_outputs": encoded, **(features if numbers[0] else {})}


def digest_of(tensors: dict[str, torch.Tensor], settings: dict) -> str:
    """Digest of settings and of tensors' names, shapes, dtypes and values, whatever device they are on."""
    # How and in which dtype the parts were loaded is no property of theirs.
    settings = {
        name: {key: item for key, item in value.items() if key not in ("dtype", "transformers_version")}
        if isinstance(value, dict)
        else value
        for name, value in settings.items()
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def digest_of_parts(owner: nn.Module, names: tuple[str, ...], settings: tuple[str, ...]) -> str:
    """
    Digest of some parts of a model, those that it has, and of settings of its configuration, as [`digest_of`] makes it.

    Hashing takes longer than encoding on a GPU, so it is done again only after a tensor has changed. `owner` remembers.

    Raises:
        ValueError: If a part holds quantised weights that cannot be read.
    """
    parts = {name: getattr(owner, name) for name in names if getattr(owner, name) is not None}
    for part in parts.values():
        check_weights_are_readable(part, "A digest")
    tensors = {(name, key): value for name, part in parts.items() for key, value in part.state_dict().items()}
    plain = plain_tensors({".".join(path): tensor for path, tensor in tensors.items()})
    state = tuple((tensor.data_ptr(), tensor.dtype, tensor._version) for tensor in plain.values())
    known = vars(owner).setdefault("_digests", {})
    if known.get(names, (None, None))[0] != state:
        config = owner.config.to_dict()
        # What accelerate has offloaded is read from where it is. Its place does not change, so that its values must not either.
        read = {
            ".".join(path): load_offloaded_parameter(parts[path[0]], path[1])
            for path, t in tensors.items()
            if t.is_meta
        }
        known[names] = state, digest_of({**plain, **read}, {name: config[name] for name in settings})
    return known[names][1]


def check_encoder_digest(given: str, own: str) -> None:
    """
    Raise unless the tokens of a scene are of the encoders that are to use them.

    Args:
        given (`str`): Of the scene.
        own (`str`): `model.encoder_digest()`.

    Raises:
        ValueError: If they differ.
    """
    if given != own:
        raise ValueError(
            f"The scene was encoded with other weights or settings than this model's encoders: its `encoder_digest` is "
            f"{given[:12]}..., that of the model {own[:12]}.... Encode it again with `model.encode_scene(...)`, or load the "
            "model, with the dtype, that encoded it."
        )


def _safetensors_path(path: str | os.PathLike) -> Path:
    path = checked_path("path", path)
    if path.suffix != ".safetensors":
        raise ValueError(f"`path` must end in .safetensors, got {path}.")
    return path


__all__ = [
    "SceneEncoding",
    "ScenePrefix",
    "check_encoder_digest",
    "digest_of",
    "digest_of_parts",
    "scenes_to_model_inputs",
]
