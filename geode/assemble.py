# SPDX-License-Identifier: Apache-2.0
"""What `geode assemble` does: public parts become a GEODE checkpoint, tensor by tensor."""

import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm
from transformers import AddedToken, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.configuration_utils import PreTrainedConfig

from geode import __version__
from geode.assembly_plan import NEW, Plan, Vocabulary, make_plan, make_tensor, num_bytes
from geode.configuration.configuration_geode import GeodeConfig, default_control_tokens
from geode.data.tokenizer import END_OF_TEXT_TOKEN, TOKEN_ATTRIBUTES, add_geode_tokens
from geode.hub_cards.licences import find_terms, find_texts
from geode.hub_cards.manifest import hash_file
from geode.hub_cards.terms import OWN_LICENSE, combined_terms
from geode.modeling_geode.chat_geode import IMAGE_TOKEN, RATIONALE_TOKEN, TURN_END_TOKEN
from geode.modeling_geode.modeling_geode import GeodeForConditionalGeneration
from geode.modeling_geode.processing_geode import GeodeProcessor
from geode.modeling_geode.video_processing_geode import GeodeImageProcessor
from geode.part_files import PartFiles, TensorReader, find_part
from geode.part_layouts import (
    EMBEDDING,
    HEAD,
    Layout,
    language_layout,
    point_layout,
    reconstructor_layout,
    vision_language_layout,
    vision_layout,
)
from geode.trainers.licence_texts import copy_texts
from geode.trainers.training_config import check_overrides, overridden


VISION_SOURCE = "OpenGVLab/InternViT-300M-448px-V2_5"
LANGUAGE_SOURCE = "Qwen/Qwen2.5-1.5B-Instruct"
POINT_SOURCE = "facebook/sonata/sonata.pth"
RECONSTRUCTOR_SOURCE = "facebook/VGGT-1B"
FACTS_NAME = "parts.json"
FORMAT_VERSION = 1
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_NEW_TOKENS = 64
_LAYOUTS = {
    "vision_language_model": vision_language_layout,
    "vision_tower": vision_layout,
    "language_model": language_layout,
    "point_encoder": point_layout,
    "reconstructor": reconstructor_layout,
}


class Assembly:
    """
    A GEODE model that is planned, and not yet written.

    Args:
        vision (`str`, *optional*):
            Vision tower; see [`find_part`] for what a source may be. The default is `VISION_SOURCE`.
        language_model (`str`, *optional*):
            Language model, with its tokenizer. The default is `LANGUAGE_SOURCE`.
        init_from (`str`, *optional*):
            An InternVL model instead of these two; its projector is taken as well.
        points (`str`, *optional*):
            Point encoder. The default is `POINT_SOURCE`.
        reconstructor (`str`, *optional*):
            VGGT; `None` leaves it out, and geometry must then come with the inputs.
        model_overrides (`dict`, *optional*):
            Fields of [`GeodeConfig`], such as `{"drm_config": {"hidden_size": 512}}`. Entries of `control_tokens` need no `token_id`.
        dtype (`str`, defaults to `"auto"`):
            `"float32"`, `"bfloat16"` or `"float16"`; `"auto"` keeps each part's, so that nothing is rounded, with new tensors in
            float32. Weights that the model wants in float32 are so with the others as well.
        seed (`int`, defaults to 0):
            Decides the new tensors.

    Raises:
        FileNotFoundError: If a part is not found.
        ValueError: If the parts do not fit: a tensor is missing, unexpected, or of a wrong shape or type.
    """

    def __init__(
        self,
        *,
        vision: str | None = None,
        language_model: str | None = None,
        init_from: str | None = None,
        points: str | None = None,
        reconstructor: str | None = RECONSTRUCTOR_SOURCE,
        model_overrides: dict | None = None,
        dtype: str = "auto",
        seed: int = 0,
    ):
        if dtype not in DTYPES:
            raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {dtype!r}.")
        check_overrides(model_overrides)
        sources = _sources(vision, language_model, init_from, points, reconstructor)
        files = {part: find_part(source) for part, source in sources.items()}
        self.parts = {part: (found, _LAYOUTS[part](found)) for part, found in files.items()}
        self.terms = [find_terms(part, found.name, found.revision, found.folder) for part, found in files.items()]
        self.texts = {part: find_texts(part, found.folder) for part, found in files.items()}
        self.seed = seed
        part = "language_model" if init_from is None else "vision_language_model"
        speaker, layout = self.parts[part]
        self.tokenizer, self.control_tokens, self.vocabulary = _read_tokenizer(
            speaker, layout.settings["text_config"], (model_overrides or {}).get("control_tokens")
        )
        self.is_tied = _is_tied(speaker, layout)
        if self.is_tied:
            key = re.escape(layout.published(HEAD).key)
            self.parts[part] = speaker, layout._replace(skipped=((f"^{key}$", "equal to the embedding"),))
        self.config = self._make_config(model_overrides or {})
        with torch.device("meta"):
            self.model = GeodeForConditionalGeneration(self.config)
        self.plan = make_plan(self.model, self.parts, self.vocabulary, is_tied=self.is_tied, dtype=DTYPES[dtype])
        self._set_dtype(DTYPES[dtype])

    def _make_config(self, overrides: dict) -> GeodeConfig:
        settings: dict[str, Any] = {"reconstructor_config": None}
        for _, layout in self.parts.values():
            settings |= layout.settings
        ties = {"tie_word_embeddings": self.is_tied}
        settings["text_config"] = {**settings["text_config"], **ties, "vocab_size": self.vocabulary.size}
        try:
            config = GeodeConfig(
                **settings,
                **ties,
                image_token_id=self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
                rationale_token_id=self.tokenizer.convert_tokens_to_ids(RATIONALE_TOKEN),
                control_tokens=self.control_tokens,
                parts=[part._asdict() for part in self.terms],
            )
            config = overridden(config, {name: value for name, value in overrides.items() if name != "control_tokens"})
        except StrictDataclassError as error:
            raise ValueError(f"Parts and `model_overrides` do not make a GEODE model: {error}") from error
        config.architectures = [GeodeForConditionalGeneration.__name__]
        return config

    def _set_dtype(self, dtype: torch.dtype | None) -> None:
        """What the model is loaded in by default: the language model's type, if none was asked for."""
        embedding = next(step for step in self.plan.steps if step.name == EMBEDDING)
        for config in (self.config, *(getattr(self.config, name) for name in self.config.sub_configs)):
            if config is not None:
                config.dtype = dtype or embedding.dtype

    def make_processor(self) -> GeodeProcessor:
        """Return the processor that belongs to the model."""
        config = self.config
        height, width = config.vision_config.image_size
        reconstructor = config.reconstructor_config
        return GeodeProcessor(
            GeodeImageProcessor(size={"height": height, "width": width}),
            self.tokenizer,
            num_rationale_tokens=config.drm_config.num_rationale_tokens,
            image_seq_length=config.image_seq_length,
            grid_size=config.point_config.grid_size,
            geometry_frame_size=None if reconstructor is None else reconstructor.image_size,
            question_conditioned=config.drm_config.question_conditioned,
            control_tokens=config.control_tokens,
        )

    def write(
        self, directory: str | os.PathLike, *, max_shard_size: int | str = "2GB", show_progress: bool = True
    ) -> None:
        """
        Write the model, its processor, their code, the facts about the parts and the licence files that came with them.

        One file of the result is in memory at a time, and of one public file at a time what was read of it. The folder appears when
        it is complete.

        Args:
            directory (`str` or `os.PathLike`):
                A folder that is new or empty.
            max_shard_size (`int` or `str`, defaults to `"2GB"`):
                Largest size of a file with weights.
            show_progress (`bool`, defaults to `True`):
                Show progress bars.

        Raises:
            ValueError: If the folder holds something.
            NotADirectoryError: If there is a file of this name.
        """
        directory = Path(directory)
        check_new(directory)
        # Beside its place, so that the last step is a renaming within one file system.
        partial = directory.with_name(f".{directory.name}-{secrets.token_hex(4)}")
        partial.mkdir(parents=True)
        try:
            facts = self._facts(show_progress)
            _write_weights(partial, self.plan, self._new_tensors(), max_shard_size, show_progress)
            self.config.parts = [
                {**part, **{key: facts["parts"][index][key] for key in ("files", "texts")}}
                for index, part in enumerate(self.config.parts)
            ]
            self.config.save_pretrained(partial)
            _generation_config(self.tokenizer).save_pretrained(partial)
            self.make_processor().save_pretrained(partial)
            for texts in self.texts.values():
                copy_texts(texts, partial)
            (partial / FACTS_NAME).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
            partial.replace(directory)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _new_tensors(self) -> dict[str, torch.Tensor]:
        """Initial values of what no part has, as a new model has them."""
        names = {step.name for step in self.plan.steps if step.action == NEW}
        owners = {name.rpartition(".")[0] for name in names}
        modules = [module for name, module in self.model.named_modules() if name in owners]
        for module in modules:
            _materialise(module)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(self.seed)
            # As the library does it, a module comes after its children, whose values it may change.
            for module in reversed(modules):
                self.model._init_weights(module)
        return {name: tensor for name, tensor in self.model.state_dict().items() if name in names}

    def _facts(self, show_progress: bool) -> dict[str, Any]:
        paths = [path for files, _ in self.parts.values() for path in files.files]
        bar = tqdm(paths, desc="Hashing parts", unit="file", disable=not show_progress)
        hashes = {path: {"sha256": hash_file(path), "bytes": path.stat().st_size} for path in bar}
        parts = []
        for part in self.terms:
            files, _ = self.parts[part.name]
            counts = {
                "read": len({step.source for step in self.plan.steps if step.source and step.part == part.name}),
                "skipped": sum(found.part == part.name for found in self.plan.skipped),
            }
            hashed = {path.name: hashes[path] for path in files.files}
            texts = list(self.texts[part.name])
            parts.append({**part._asdict(), "files": hashed, "texts": texts, "tensors": counts})
        return {
            "format_version": FORMAT_VERSION,
            "geode_version": __version__,
            "seed": self.seed,
            "new_parts": sorted({step.part for step in self.plan.steps if step.action == NEW}),
            "new_tokens": self.tokenizer.convert_ids_to_tokens(list(self.vocabulary.new_ids)),
            "parts": parts,
            **combined_terms(OWN_LICENSE, self.terms)._asdict(),
        }


def check_new(directory: str | os.PathLike) -> None:
    """Refuse a folder that holds something, before anything is downloaded for it."""
    directory = Path(directory)
    if directory.exists() and any(directory.iterdir()):
        raise ValueError(f"`directory` must be new or empty, and {str(directory)!r} is not. Choose another one.")


def _sources(vision, language_model, init_from, points, reconstructor) -> dict[str, str]:
    if init_from is not None:
        if vision is not None or language_model is not None:
            raise ValueError(
                f"`init_from` {init_from!r} holds vision tower and language model, and {vision or language_model!r} is given as "
                "well. Choose one."
            )
        sources = {"vision_language_model": init_from}
    else:
        sources = {"vision_tower": vision or VISION_SOURCE, "language_model": language_model or LANGUAGE_SOURCE}
    sources["point_encoder"] = points or POINT_SOURCE
    return sources if reconstructor is None else {**sources, "reconstructor": reconstructor}


def _read_tokenizer(
    part: PartFiles, text_config: Mapping[str, Any], control_tokens: Mapping[str, dict] | None
) -> tuple[PreTrainedTokenizerBase, dict[str, dict], Vocabulary]:
    """Return the language model's tokenizer with GEODE's tokens, what control tokens stand for, and the embedding's rows."""
    # With a configuration at hand, the loader does not read the model's, which may name remote code.
    tokenizer = AutoTokenizer.from_pretrained(
        part.folder, config=PreTrainedConfig(), padding_side="left", trust_remote_code=False
    )
    num_known, num_rows = max(tokenizer.get_vocab().values()) + 1, text_config["vocab_size"]
    if num_known > num_rows:
        raise ValueError(
            f"The tokenizer of {part.name!r} has {num_known} tokens, and its model {num_rows} rows. They do not belong together."
        )
    known = tokenizer.get_vocab()
    add_geode_tokens(tokenizer)
    entries = dict(default_control_tokens() if control_tokens is None else control_tokens)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in entries])
    entries = {
        token: {**entry, "token_id": tokenizer.convert_tokens_to_ids(token)} for token, entry in entries.items()
    }
    # The processor has its own, which puts media before text.
    tokenizer.chat_template = None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = END_OF_TEXT_TOKEN if END_OF_TEXT_TOKEN in known else tokenizer.eos_token
    added = [token for token in (*TOKEN_ATTRIBUTES.values(), *entries) if token not in known]
    new_ids = tuple(tokenizer.convert_tokens_to_ids(list(dict.fromkeys(added))))
    return tokenizer, entries, Vocabulary(num_rows, num_known, new_ids, max(num_rows, len(tokenizer)))


def _is_tied(part: PartFiles, layout: Layout) -> bool:
    """
    Whether the output layer is the embedding.

    An output layer that differs from it is not, whatever the configuration says. A file without one has it tied, unless the
    configuration says otherwise: then the layer is missing.
    """
    head, embedding = (part.tensors.get(layout.published(name).key) for name in (HEAD, EMBEDDING))
    states = [part.config.get("tie_word_embeddings"), layout.settings["text_config"].get("tie_word_embeddings")]
    if head is None or embedding is None:
        # Where both speak, the language model's own word counts.
        return next((state for state in reversed(states) if state is not None), True)
    if head.shape != embedding.shape or False in states:
        return False
    with TensorReader() as reader:
        pairs = zip(reader.read(head).split(4096), reader.read(embedding).split(4096), strict=True)
        return all(torch.equal(*pair) for pair in pairs)


def _generation_config(tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    ends = dict.fromkeys([tokenizer.convert_tokens_to_ids(TURN_END_TOKEN), tokenizer.eos_token_id])
    return GenerationConfig(
        do_sample=False,
        eos_token_id=[token for token in ends if token is not None],
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=MAX_NEW_TOKENS,
    )


def _materialise(module: nn.Module) -> None:
    """Give a module's own parameters memory."""
    for name, parameter in module.named_parameters(recurse=False):
        setattr(
            module,
            name,
            nn.Parameter(torch.empty_like(parameter, device="cpu"), requires_grad=parameter.requires_grad),
        )


def _write_weights(
    folder: Path, plan: Plan, new: Mapping[str, torch.Tensor], max_shard_size: int | str, show_progress: bool
) -> None:
    split = split_state_dict_into_shards_factory(
        {step.name: step for step in plan.steps},
        get_storage_size=num_bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    steps = {step.name: step for step in plan.steps}
    total = sum(map(num_bytes, plan.steps))
    with tqdm(total=total, desc="Writing", unit="B", unit_scale=True, disable=not show_progress) as bar:
        for file, names in split.filename_to_tensors.items():
            tensors = {}
            with TensorReader() as reader:
                for name in names:
                    tensors[name] = make_tensor(steps[name], reader, plan.vocabulary, new)
                    bar.update(num_bytes(steps[name]))
            save_file(tensors, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        path = folder / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


__all__ = ["Assembly", "check_new"]
