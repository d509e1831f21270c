# SPDX-License-Identifier: Apache-2.0
"""Ask several questions about one video: it is encoded once, and the questions are answered in one batch."""

from collections.abc import Sequence
from pathlib import Path

from geode.data.schemas import fill_path
from geode.modeling_geode.answers_geode import Answer
from geode.modeling_geode.scene_encoding_geode import SceneEncoding
from geode.modeling_geode.scene_geode import SceneGeometry
from geode.modeling_geode.shared_prefix_geode import can_share_prefix


def geometry_path(media_root: Path, pattern: str, video: Path) -> Path:
    """
    Return where the saved geometry of a video would be.

    Args:
        media_root (`Path`): Folder that the pattern is below.
        pattern (`str`): A path with `{scene}`, `{stem}` (the same) and `{parent}` of the video in it.
        video (`Path`): The video, below the folder.

    Returns:
        `Path`: The path, whether there is something or not.

    Raises:
        ValueError: If the pattern asks for another name, or the video's would lead out of its place in the path.

    Example:
    ```python
    >>> geometry_path(Path("root"), "geometry/{scene}", Path("rooms/room_1.mp4")).as_posix()
    'root/geometry/room_1'

    ```
    """
    return media_root / fill_path(
        pattern, {"scene": video.stem, "stem": video.stem, "parent": video.parent.as_posix()}
    )


def show_video(
    model,
    processor,
    video: Path,
    *,
    geometry: SceneGeometry | None,
    use_geometry: bool = True,
    num_frames: int | None = None,
) -> tuple[list[dict], SceneEncoding | None]:
    """
    Encode a video for questions about it.

    Args:
        model ([`GeodeForConditionalGeneration`]): The model.
        processor ([`GeodeProcessor`]): Its processor.
        video (`Path`): The video.
        geometry ([`SceneGeometry`], *optional*): Its geometry; without one the model's reconstructor makes it.
        use_geometry (`bool`, defaults to `True`): False shows the frames alone.
        num_frames (`int`, *optional*): Frames that the language model sees; the default is the processor's.

    Returns:
        The parts of a chat that show it, and the encoded scene that they name, with the prefix that its questions share. A rationale module that reads the question
        encodes anew for each one: then there is none.
    """
    if model.config.drm_config.question_conditioned and use_geometry:
        return [{"type": "video", "video": str(video), "geometry": geometry}], None
    inputs = processor.prepare_scene(video=video, geometry=geometry, num_frames=num_frames, use_geometry=use_geometry)
    scene = model.encode_scene(**inputs)
    if can_share_prefix(model.model.language_model.config):
        # Each batch of questions begins with it.
        scene = model.prefill_scene(processor, scene, use_geometry=use_geometry)
    return [{"type": "scene", "scene": scene}], scene


def ask(
    model,
    processor,
    prompts: Sequence[str],
    *,
    parts: Sequence[dict] = (),
    scene: SceneEncoding | None = None,
    use_geometry: bool = True,
    num_frames: int | None = None,
    max_new_tokens: int = 16,
) -> list[Answer]:
    """
    Answer questions by greedy decoding, in one batch.

    Args:
        model ([`GeodeForConditionalGeneration`]): The model.
        processor ([`GeodeProcessor`]): Its processor.
        prompts (`Sequence[str]`): The questions.
        parts (`Sequence[dict]`): What is shown with each of them; nothing by default.
        scene ([`SceneEncoding`], *optional*): The encoded scene that `parts` name; see [`show_video`].
        use_geometry (`bool`, defaults to `True`): See [`show_video`].
        num_frames (`int`, *optional*): See [`show_video`].
        max_new_tokens (`int`, defaults to 16): Longest answer.

    Returns:
        `list[Answer]`: The answers.
    """
    if scene is not None:
        return model.ask(processor, scene, prompts, use_geometry=use_geometry, max_new_tokens=max_new_tokens)
    chats = [[{"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}] for prompt in prompts]
    inputs = processor.apply_chat_template(
        chats,
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        padding=True,
        padding_side="left",
        use_geometry=use_geometry,
        num_frames=num_frames,
    ).to(model.device)
    output = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        return_dict_in_generate=True,
    )
    return processor.post_process_answers(output, input_ids=inputs["input_ids"])


__all__ = ["ask", "geometry_path", "show_video"]
