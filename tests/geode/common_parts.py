# SPDX-License-Identifier: Apache-2.0
"""
Public checkpoints that tests make up: the published names, shapes and file layouts, with random or no values.

Names of Qwen2 and InternVL come from transformers' own classes, those of OpenGVLab from their published table, those of VGGT and Sonata
from lists of the public files in `tests/fixtures`.
"""

import json
import shutil
import struct
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    InternVLVisionModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode


FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
QWEN_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *(f"<|extra_{index}|>" for index in range(19)),  # Qwen2.5 has 22 in all
]
INTERNVL_TOKENS = ["<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"]
VISION = {
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "image_size": 448,
    "patch_size": 14,
}
TEXT = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "rms_norm_eps": 1e-6,
}
TINY_VISION = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 56,
    "patch_size": 14,
}
TINY_TEXT = {**TEXT, "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2}
# Not GEODE's default, so that tests which do not look at the module are quick.
SMALL_DRM = {"drm_config": {"hidden_size": 16, "num_attention_heads": 2, "num_position_frequencies": 2}}


def make_tokenizer(num_words: int = 300, extra: list[str] | None = None) -> Qwen2Tokenizer:
    """A tokenizer of Qwen2's kind that knows bytes, made-up words and Qwen's special tokens; `<img>` and such are `extra`."""
    vocabulary = {letter: index for index, letter in enumerate(bytes_to_unicode().values())}
    vocabulary |= {f"word{index}": index for index in range(256, num_words)}
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary, merges=[], pad_token="<|endoftext|>", unk_token="<|endoftext|>", eos_token="<|im_end|>"
    )
    tokenizer.add_tokens([*QWEN_TOKENS, *(extra or [])], special_tokens=True)
    tokenizer.chat_template = "{{ 'not the one of GEODE' }}"
    return tokenizer


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give every parameter its own random values: initial ones, such as zeros and ones, would hide a swap."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return model.eval()


def make_qwen(
    folder: Path, *, sizes: dict = TEXT, num_layers: int = 1, rows: int = 336, **options
) -> Qwen2ForCausalLM:
    """Qwen2.5 with its tokenizer; more rows than tokens, as in the public one."""
    config = Qwen2Config(
        **{"tie_word_embeddings": True, "vocab_size": rows, "num_hidden_layers": num_layers, **sizes, **options}
    )
    model = randomise(Qwen2ForCausalLM(config), seed=1)
    model.tie_weights()
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return model


def make_vision(folder: Path, *, sizes: dict = VISION, num_layers: int = 1) -> InternVLVisionModel:
    """InternViT as transformers has it in `folder/"own"`, and as OpenGVLab publishes it in `folder/"public"`."""
    config = InternVLVisionConfig(**sizes, num_hidden_layers=num_layers, attention_bias=True)
    model = randomise(InternVLVisionModel(config), seed=2)
    model.save_pretrained(folder / "own")
    write_public_vision(folder / "public", opengvlab_vision(model.state_dict(), num_layers), sizes, num_layers)
    return model


def write_public_vision(folder: Path, state: dict, sizes: dict, num_layers: int) -> None:
    """Weights and configuration of a vision tower in OpenGVLab's form."""
    folder.mkdir(parents=True)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(public_vision_config(sizes, num_layers)))


def public_vision_config(sizes: dict, num_layers: int) -> dict:
    """What OpenGVLab's `config.json` says, as far as it is known."""
    return {
        **sizes,
        "architectures": ["InternVisionModel"],
        "auto_map": {"AutoModel": "modeling_intern_vit.InternVisionModel"},
        "model_type": "intern_vit_6b",
        "num_hidden_layers": num_layers,
        "hidden_act": "gelu",
        "norm_type": "layer_norm",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "qk_normalization": False,
        "num_channels": 3,
        "torch_dtype": "bfloat16",
        "use_flash_attn": True,
    }


def opengvlab_vision(own: dict[str, torch.Tensor], num_layers: int) -> dict[str, torch.Tensor]:
    """The published table, line by line: transformers' tensors of a vision tower under OpenGVLab's names, q, k and v as one."""
    state = {
        "embeddings.class_embedding": own["embeddings.cls_token"],
        "embeddings.position_embedding": own["embeddings.position_embeddings"],
        "embeddings.patch_embedding.weight": own["embeddings.patch_embeddings.projection.weight"],
        "embeddings.patch_embedding.bias": own["embeddings.patch_embeddings.projection.bias"],
    }
    for layer in range(num_layers):
        here, there = f"encoder.layer.{layer}.", f"encoder.layers.{layer}."
        for kind in ("weight", "bias"):
            thirds = [own[f"{here}attention.{third}_proj.{kind}"] for third in "qkv"]
            state[f"{there}attn.qkv.{kind}"] = (
                torch.cat(thirds) if thirds[0].device.type != "meta" else triple(thirds[0])
            )
            state[f"{there}attn.proj.{kind}"] = own[f"{here}attention.projection_layer.{kind}"]
            state[f"{there}norm1.{kind}"] = own[f"{here}layernorm_before.{kind}"]
            state[f"{there}norm2.{kind}"] = own[f"{here}layernorm_after.{kind}"]
            state[f"{there}mlp.fc1.{kind}"] = own[f"{here}mlp.fc1.{kind}"]
            state[f"{there}mlp.fc2.{kind}"] = own[f"{here}mlp.fc2.{kind}"]
        state[f"{there}ls1"], state[f"{there}ls2"] = own[f"{here}lambda_1"], own[f"{here}lambda_2"]
    return {name: tensor.clone() for name, tensor in state.items()}


def triple(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of three times the rows."""
    return tensor.new_empty(3 * tensor.shape[0], *tensor.shape[1:])


def make_internvl(folder: Path, *, vision: dict = VISION, text: dict = TEXT, is_tied: bool = False):
    """
    InternVL3: in `folder/"own"` as transformers writes it, `folder/"flat"` with the names of its model, `folder/"public"` as OpenGVLab
    publishes its own. The vocabulary has no spare rows.
    """
    tokenizer = make_tokenizer(extra=INTERNVL_TOKENS)
    text = {
        "model_type": "qwen2",
        "num_hidden_layers": 1,
        "vocab_size": len(tokenizer),
        "tie_word_embeddings": is_tied,
        **text,
    }
    config = InternVLConfig(
        vision_config={**vision, "num_hidden_layers": 1, "attention_bias": True},
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=(vision["image_size"] // vision["patch_size"] // 2) ** 2,
        tie_word_embeddings=is_tied,
    )
    model = randomise(InternVLForConditionalGeneration(config), seed=3)
    model.tie_weights()
    model.save_pretrained(folder / "own", max_shard_size="40MB")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if is_tied:
        del state["lm_head.weight"]
    for name in ("flat", "public"):
        shutil.copytree(folder / "own", folder / name, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(state, folder / "flat" / "model.safetensors", metadata={"format": "pt"})
    save_file(opengvlab_internvl(state), folder / "public" / "model.safetensors", metadata={"format": "pt"})
    settings = {"model_type": "internvl_chat", "ps_version": "v2", "select_layer": -1, "downsample_ratio": 0.5}
    parts = {"vision_config": public_vision_config(vision, 1), "llm_config": config.text_config.to_dict()}
    (folder / "public" / "config.json").write_text(json.dumps({**settings, **parts}))
    for name in ("own", "flat", "public"):
        tokenizer.save_pretrained(folder / name)
    return model


def opengvlab_internvl(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A whole InternVL model under OpenGVLab's names."""
    vision = {name.removeprefix("model.vision_tower."): value for name, value in state.items()}
    public = {f"vision_model.{name}": value for name, value in opengvlab_vision(vision, 1).items()}
    for index, layer in ((0, "layer_norm"), (1, "linear_1"), (3, "linear_2")):
        for kind in ("weight", "bias"):
            public[f"mlp1.{index}.{kind}"] = state[f"model.multi_modal_projector.{layer}.{kind}"]
    for name, value in state.items():
        if name.startswith("model.language_model."):
            public[name.replace("model.language_model.", "language_model.model.")] = value
        elif name == "lm_head.weight":
            public["language_model.lm_head.weight"] = value
    return public


def make_geometry(folder: Path) -> tuple[str, str]:
    """Tiny Sonata in a `.pth` file and tiny VGGT in a folder, as published; return what to call them."""
    sonata, vggt = folder / "sonata" / "sonata.pth", folder / "vggt"
    sonata.parent.mkdir(parents=True)
    vggt.mkdir()
    arguments = json.loads((FIXTURES / "sonata" / "config.json").read_text())
    torch.save({"config": arguments, "state_dict": load_file(FIXTURES / "sonata" / "weights.safetensors")}, sonata)
    shutil.copy(FIXTURES / "vggt" / "model.safetensors", vggt)
    (vggt / "config.json").write_text(json.dumps(json.loads((FIXTURES / "vggt" / "config.json").read_text())["model"]))
    return str(sonata), str(vggt)


def write_empty(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str) -> None:
    """A safetensors file of any size that takes no room: all its values are 0, and lie in a hole of the file."""
    header, position = {}, 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel() * (4 if dtype == "F32" else 2)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + position)


__all__ = [
    "FIXTURES",
    "INTERNVL_TOKENS",
    "SMALL_DRM",
    "TEXT",
    "TINY_TEXT",
    "TINY_VISION",
    "VISION",
    "make_geometry",
    "make_internvl",
    "make_qwen",
    "make_tokenizer",
    "make_vision",
    "opengvlab_vision",
    "public_vision_config",
    "randomise",
    "write_empty",
    "write_public_vision",
]
