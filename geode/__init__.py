# SPDX-License-Identifier: Apache-2.0
"""
GEODE: questions about 3D space, answered with real numbers.

Everything here loads on first use, so that `import geode` and `geode --help` are quick.
"""

from importlib import import_module
from pathlib import Path


__version__ = "0.1.0"

_FOLDER = Path(__file__).resolve().parent
# A checkout that is not installed finds its top-level folders under this package's name.
if (_FOLDER.parent / "modeling_geode" / "modeling_geode.py").is_file():
    __path__.append(str(_FOLDER.parent))

_CONFIGURATION, _MODELING = "configuration.configuration_geode", "modeling_geode"
_EXPORTS = {
    "GeodeConfig": _CONFIGURATION,
    "GeodeDrhConfig": _CONFIGURATION,
    "GeodeDrmConfig": _CONFIGURATION,
    "SonataConfig": _CONFIGURATION,
    "VggtConfig": _CONFIGURATION,
    "Answer": f"{_MODELING}.answers_geode",
    "Box3D": f"{_MODELING}.answers_geode",
    "Measurement": f"{_MODELING}.answers_geode",
    "GeodeForConditionalGeneration": f"{_MODELING}.modeling_geode",
    "GeodeModel": f"{_MODELING}.modeling_geode",
    "GeodeProcessor": f"{_MODELING}.processing_geode",
    "KnownLength": f"{_MODELING}.scene_geode",
    "SceneEncoding": f"{_MODELING}.scene_geode",
    "SceneGeometry": f"{_MODELING}.scene_geode",
    "SonataModel": f"{_MODELING}.sonata_geode",
    "VggtImageProcessor": f"{_MODELING}.vggt_processing_geode",
    "VggtModel": f"{_MODELING}.vggt_geode",
    "convert_vggt_checkpoint": f"{_MODELING}.vggt_geode",
    "reconstruct_with_vggt": f"{_MODELING}.reconstruction_geode",
}

__all__ = [*_EXPORTS, "__version__", "embedded_scene", "register_auto_classes", "tiny_checkpoint"]


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module `geode` has no attribute `{name}`. It has {', '.join(__all__)}.")
    value = getattr(import_module(f"geode.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])


def tiny_checkpoint() -> Path:
    """
    Return the folder of the shipped checkpoint.

    It carries no code, so transformers' Auto classes are told about GEODE: `AutoModel.from_pretrained` takes it too.
    """
    register_auto_classes()
    return _FOLDER / "tiny"


def embedded_scene() -> Path:
    """Return the folder of the shipped scene: `room.mp4`, `geometry/`, `scene.json`, `questions.jsonl`."""
    return _FOLDER / "assets" / "embedded_scene"


def register_auto_classes() -> None:
    """
    Make transformers' Auto classes know GEODE and its encoders, so that their checkpoints load without `trust_remote_code`.

    `AutoModel` gives the model with its heads, as a Hub checkpoint does; of an encoder on its own, the encoder.
    """
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModel,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
        AutoProcessor,
    )

    config, model = __getattr__("GeodeConfig"), __getattr__("GeodeForConditionalGeneration")
    AutoConfig.register(config.model_type, config, exist_ok=True)
    for auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        auto_class.register(config, model, exist_ok=True)
    AutoProcessor.register(config, __getattr__("GeodeProcessor"), exist_ok=True)
    for part in ("Sonata", "Vggt"):
        config, model = __getattr__(f"{part}Config"), __getattr__(f"{part}Model")
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
    # Under both backends, as it needs none: transformers warns when the one that it prefers is missing.
    processor = __getattr__("VggtImageProcessor")
    backends = {"pil": processor, "torchvision": processor}
    AutoImageProcessor.register(__getattr__("VggtConfig"), image_processor_classes=backends, exist_ok=True)
