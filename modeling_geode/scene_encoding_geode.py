# SPDX-License-Identifier: Apache-2.0
"""What the model makes of a scene once, for many questions."""

import dataclasses
import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import load_state_dict_from_file, parse_local_safetensors_file_metadata
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .scene_files_geode import FORMAT_VERSION, check_version, write_tensors
from .scene_inputs_geode import kind_of


_ENCODING_KEY = "geode_scene_encoding"


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
    """

    visual_tokens: torch.Tensor
    rationale_tokens: torch.Tensor
    summary: dict
    encoder_digest: str

    def __post_init__(self):
        for name, dims in (("visual_tokens", 3), ("rationale_tokens", 2)):
            value = getattr(self, name)
            if not isinstance(value, torch.Tensor) or not value.is_floating_point():
                raise TypeError(f"`{name}` must be a floating-point tensor, got {kind_of(value)}.")
            if value.dim() != dims:
                raise ValueError(f"`{name}` must have {dims} dimensions, got shape {tuple(value.shape)}.")
            if not bool(torch.isfinite(value).all()):
                raise ValueError(
                    f"`{name}` must be finite, got {int((~torch.isfinite(value)).sum())} values that are not."
                )
        if self.visual_tokens.shape[-1] != self.rationale_tokens.shape[-1]:
            raise ValueError(
                "`visual_tokens` and `rationale_tokens` must have the same width, got "
                f"{self.visual_tokens.shape[-1]} and {self.rationale_tokens.shape[-1]}."
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
            self, visual_tokens=self.visual_tokens.to(device), rationale_tokens=self.rationale_tokens.to(device)
        )

    def to_model_inputs(self, num_questions: int = 1) -> dict:
        """
        What `forward` and `generate` take instead of this scene's frames and geometry.

        Args:
            num_questions (`int`, defaults to 1):
                Rows of the batch, each a question about this scene.

        Returns:
            `dict`: `mm_encoder_outputs`, and `rationale_features` of shape `(num_questions, 1, num_rationale_tokens,
            hidden_size)` if geometry was on. Nothing is copied.
        """
        video = BaseModelOutputWithPooling(pooler_output=[self.visual_tokens.flatten(0, 1)] * num_questions)
        features = {"rationale_features": self.rationale_tokens.expand(num_questions, 1, -1, -1)}
        return {"mm_encoder_outputs": {"video": video}, **(features if len(self.rationale_tokens) else {})}

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
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            write_tensors(tensors, Path(scratch) / "encoding.safetensors", {_ENCODING_KEY: json.dumps(header)})
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
            ValueError: If the file is not an encoding, or its format version is another.
        """
        path = _safetensors_path(path)
        if not path.is_file():
            raise FileNotFoundError(f"There is no scene encoding at {path}.")
        tensors = load_state_dict_from_file(path)
        metadata = parse_local_safetensors_file_metadata(path).metadata
        if _ENCODING_KEY not in metadata:
            raise ValueError(f"{path} holds tensors but no scene encoding: its header has no {_ENCODING_KEY!r}.")
        header = json.loads(metadata[_ENCODING_KEY])
        check_version(header, str(path))
        visual_tokens = tensors["visual_tokens"]
        return cls(
            visual_tokens=visual_tokens,
            rationale_tokens=tensors.get("rationale_tokens", visual_tokens.new_zeros(0, visual_tokens.shape[-1])),
            summary=header["summary"],
            encoder_digest=header["encoder_digest"],
        )


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


def _safetensors_path(path: str | os.PathLike) -> Path:
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"`path` must end in .safetensors, got {path}.")
    return path


__all__ = ["SceneEncoding", "digest_of"]
