# SPDX-License-Identifier: Apache-2.0
"""GEODE at the smallest size that runs every part, with random weights: tests do not depend on the shipped checkpoint's sizes."""

from geode import embedded_scene
from geode.modeling_geode.processing_geode import GeodeProcessor
from geode.trainers import tiny
from geode.trainers.tiny import make_config, read_rows


def make_processor() -> GeodeProcessor:
    """A processor whose tokenizer knows the embedded scene's questions."""
    return tiny.make_processor(read_rows(embedded_scene()))


__all__ = ["make_config", "make_processor", "read_rows"]
