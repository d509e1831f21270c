# SPDX-License-Identifier: Apache-2.0
"""Bad pictures, videos, prompts and chats."""

import numpy as np
import torch
from PIL import Image

from geode.modeling_geode.processing_geode import GeodeProcessor
from geode.modeling_geode.video_processing_geode import load_image, load_video_frames
from tests.reliability.common_reliability import GARBAGE, PICTURE, Case, World, png_that_claims


def image(source):
    return lambda world: load_image(source)


def image_file(content: bytes):
    return lambda world: load_image(world.write("picture.png", content))


def video(source, num_frames=2):
    return lambda world: load_video_frames(source, num_frames=num_frames)


def video_file(content: bytes):
    return lambda world: load_video_frames(world.write("video.mp4", content), num_frames=2)


def prompt(**options):
    return lambda world: world.processor(**options)


def scene_prompt(**options):
    def call(world: World):
        return world.processor(**{"text": "<video>", "videos": [world.video], "geometry": [world.geometry], **options})

    return call


def chat(conversation, **options):
    return lambda world: world.processor.apply_chat_template(conversation, tokenize=True, **options)


def user(content):
    return chat([{"role": "user", "content": content}])


def answer(**part):
    part = {"type": "value", "token": "<REG>", "value": 2.0, **part}
    return chat([{"role": "user", "content": "How far?"}, {"role": "assistant", "content": [part]}])


def made(**options):
    def call(world: World):
        parts = {"image_processor": world.processor.image_processor, "tokenizer": world.processor.tokenizer}
        return GeodeProcessor(**parts, **options)

    return call


def answers(output, input_ids):
    return lambda world: world.processor.post_process_answers(output, input_ids=input_ids)


def nested(depth: int):
    images = PICTURE
    for _ in range(depth):
        images = [images]
    return images


IDS = torch.zeros(1, 3, dtype=torch.long)
_IMAGE, _VIDEO, _CALL = "`load_image`", "`load_video_frames`", "`GeodeProcessor.__call__`"
_CHAT, _SCENE = "`GeodeProcessor.apply_chat_template`", "`GeodeProcessor.prepare_scene`"
_MAKE, _ANSWERS = "`GeodeProcessor`", "`GeodeProcessor.post_process_answers`"

CASES = (
    Case(_IMAGE, "None", image(None), TypeError, "got NoneType", "must be a path, a PIL image, an array or a tensor"),
    Case(_IMAGE, "no such file", image("no.png"), FileNotFoundError, "There is no image at no.png", "Check the path"),
    Case(_IMAGE, "a name of 10,000 letters", image("a" * 10_000), FileNotFoundError, "aaaa", "Check the path"),
    Case(_IMAGE, "an address", image("https://a.org/b.png"), ValueError, "got 'https://a.org/b.png'", "fetch the file first"),
    Case(_IMAGE, "an array in floating point", image(PICTURE / 255), TypeError, "got float64", "must be uint8 with values in 0..255"),
    Case(_IMAGE, "an array without channels", image(PICTURE[..., 0]), ValueError, "got (1, 20, 30)", "(num_frames, height, width, 3)"),
    Case(_IMAGE, "no pixels", image(Image.new("RGB", (0, 3))), ValueError, "is 3 x 0", "needs at least one pixel"),
    Case(_IMAGE, "16 bits", image(Image.new("I;16", (3, 3))), ValueError, "mode 'I;16'", "Scale its values to 0..255"),
    Case(_IMAGE, "10^10 pixels that are not there", image(np.broadcast_to(np.uint8(0), (100_000, 100_000, 3))), ValueError, "is 100000 x 100000", "scale them down first"),
    Case(_IMAGE, "file: empty", image_file(b""), ValueError, "cannot be read", "save it again as PNG or JPEG"),
    Case(_IMAGE, "file: garbage", image_file(GARBAGE), ValueError, "cannot be read", "save it again as PNG or JPEG"),
    Case(_IMAGE, "file: a bomb of 10^10 pixels", image_file(png_that_claims(100_000, 100_000)), ValueError, "10000000000 pixels", "save it again as PNG or JPEG"),
    Case(_IMAGE, "file: a bomb below Pillow's limit", image_file(png_that_claims(8000, 9000)), ValueError, "is 8000 x 9000", "scale them down first"),
    Case(_IMAGE, "file: PostScript", image_file(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), ValueError, "cannot be read", "save it again as PNG or JPEG"),
    Case(_VIDEO, "None", video(None), TypeError, "got NoneType", "must be a path, a folder of images"),
    Case(_VIDEO, "no frames", video([]), ValueError, "got an empty list", "needs at least one frame"),
    Case(_VIDEO, "a single picture", video(PICTURE), ValueError, "got (20, 30, 3)", "(num_frames, height, width, 3)"),
    Case(_VIDEO, "no such file", video("no.mp4"), FileNotFoundError, "There is no video at no.mp4", "Check the path"),
    Case(_VIDEO, "2.5 frames", video([PICTURE], 2.5), ValueError, "got 2.5", "whole number of at least 1"),
    Case(_VIDEO, "file: empty", video_file(b""), ValueError, "(0 bytes) cannot be read", "copy it again, or re-encode it"),
    Case(_VIDEO, "file: garbage", video_file(GARBAGE), ValueError, "(1024 bytes) cannot be read", "copy it again, or re-encode it"),
    Case(_VIDEO, "file: a playlist", video_file(b"#EXTM3U\n#EXTINF:1\n/etc/passwd\n"), ValueError, "cannot be read", "copy it again, or re-encode it"),
    Case(_VIDEO, "file: the first half", lambda world: load_video_frames(world.write("half.mp4", (world.room / "room.mp4").read_bytes()[:134_018]), num_frames=2), ValueError, "is incomplete", "copy it again, or re-encode it"),
    Case(_CALL, "no text", prompt(), ValueError, "`text` is required", "one `<IMG_CONTEXT>` per image"),
    Case(_CALL, "numbers for text", prompt(text=[3]), TypeError, "got 3 of type int", "must be a string or a list of strings"),
    Case(_CALL, "no prompts", prompt(text=[]), ValueError, "got an empty list", "at least one prompt"),
    Case(_CALL, "half a character", prompt(text="\ud800"), ValueError, "half of a surrogate pair at 0", "Write the whole character"),
    Case(_CALL, "an image too many", prompt(text="a", images=[PICTURE]), ValueError, "it has 0", "one `<IMG_CONTEXT>` for each of the 1"),
    Case(_CALL, "lists in lists", prompt(text="<IMG_CONTEXT>", images=nested(2000)), ValueError, "got more", "Flatten them"),
    Case(_CALL, "a video without geometry", lambda world: world.processor(text="<video>", videos=[world.video]), ValueError, "neither was any given", "pass `use_geometry=False`"),
    Case(_CALL, "geometry that is none", scene_prompt(geometry=[3]), TypeError, "got int", "must be a SceneGeometry or the path of one"),
    Case(_CALL, "a forged `<spatio>`", prompt(text="<spatio>"), ValueError, "it has 1", "leave the markup to the processor"),
    Case(_CALL, "an unknown option", prompt(text="a", foo=1), TypeError, "Unknown options ['foo']", "The processor takes"),
    Case(_CALL, "`num_frames` of 0", scene_prompt(num_frames=0), ValueError, "got 0", "whole number of at least 1"),
    Case(_CALL, "more rationale tokens than there are", scene_prompt(num_rationale_tokens=99), ValueError, "got 99", "may be at most 16"),
    Case(_CALL, "`use_geometry` in words", scene_prompt(use_geometry="no"), TypeError, "got 'no'", "must be True or False"),
    Case(_CALL, "`padding_side` of 'top'", prompt(text="a", padding_side="top"), ValueError, "got 'top'", "'left' or 'right'"),
    Case(_CALL, "an encoded scene that is none", prompt(text="<video>", scene=3), TypeError, "got int", "must be a SceneEncoding"),
    Case(_CHAT, "None", chat(None), ValueError, "got None", "a list of at least one turn"),
    Case(_CHAT, "no turns", chat([]), ValueError, "got []", "a list of at least one turn"),
    Case(_CHAT, "a text for a turn", chat(["a"]), ValueError, "in 'a'", "must have `role` and `content`"),
    Case(_CHAT, "an unknown role", chat([{"role": "tool", "content": "a"}]), ValueError, "got 'tool'", "must be one of ('system'"),
    Case(_CHAT, "an unknown key", chat([{"role": "user", "content": "a", 1: 2}]), ValueError, "got ['1', 'content', 'role']", "and nothing else"),
    Case(_CHAT, "content that is a number", user(3), ValueError, "got int", "a string or a list of parts"),
    Case(_CHAT, "a part of unknown type", user([{"type": "audio"}]), ValueError, "got 'audio'", "must have a `type` of"),
    Case(_CHAT, "a type that is a list", user([{"type": []}]), ValueError, "got []", "must have a `type` of"),
    Case(_CHAT, "a text that is a number", user([{"type": "text", "text": 3}]), ValueError, "got 3", "needs a string `text`"),
    Case(_CHAT, "half a character", user("\udc00"), ValueError, "half of a surrogate pair at 0", "Write the whole character"),
    Case(_CHAT, "a video with two sources", user([{"type": "video", "path": "a", "url": "b"}]), ValueError, "got ['path', 'url']", "needs exactly one of"),
    Case(_CHAT, "a video of the system", chat([{"role": "system", "content": [{"type": "video", "path": "a"}]}]), ValueError, "in a turn of 'system'", "belongs into a user turn"),
    Case(_CHAT, "a scene that is none", user([{"type": "scene", "scene": 3}]), TypeError, "got int", "must be a SceneEncoding"),
    Case(_CHAT, "a value of the user", user([{"type": "value", "token": "<REG>", "value": 1}]), ValueError, "in a turn of 'user'", "belongs into an assistant turn"),
    Case(_CHAT, "a value of unknown token", answer(token="<X>"), ValueError, "got '<X>'", "must be one of ['<3DBBOX>', '<REG>']"),
    Case(_CHAT, "a value in words", answer(value="far"), ValueError, "got 'far'", "must be a finite number"),
    Case(_CHAT, "a value of NaN", answer(value=float("nan")), ValueError, "got nan", "must be a finite number"),
    Case(_CHAT, "a value of 400 digits", answer(value=10**400), ValueError, "got 1000", "must be a finite number"),
    Case(_CHAT, "a value of unknown unit", answer(unit="parsec"), ValueError, "got 'parsec'", "a length, area or volume"),
    Case(_CHAT, "a box of two numbers", answer(token="<3DBBOX>", value=[1, 2]), ValueError, "got [1, 2]", "must have 7 numbers"),
    Case(_CHAT, "a template that is none", chat([{"role": "user", "content": "a"}], chat_template="{{ foo( }}"), ValueError, "TemplateSyntaxError", "Correct the template"),
    Case(_CHAT, "a template that never ends", chat([{"role": "user", "content": "a"}], chat_template="{% for i in range(10**12) %}a{% endfor %}"), ValueError, "Range too big", "Correct the template"),
    Case(_CHAT, "tools", chat([{"role": "user", "content": "a"}], tools=[1]), ValueError, "are not supported", "Write what they say into a system turn"),
    Case(_SCENE, "neither video nor frames", lambda world: world.processor.prepare_scene(), ValueError, "must be given", "Exactly one of `video` and `frames`"),
    Case(_MAKE, "`num_frames` of 0", made(num_frames=0), ValueError, "got 0", "whole number of at least 1"),
    Case(_MAKE, "`grid_size` in words", made(grid_size="a"), ValueError, "got 'a'", "a positive length in metres"),
    Case(_MAKE, "control tokens without ids", made(control_tokens={"<REG>": {}}), ValueError, "got {}", "must have `token_id`, `dim` and `kind`"),
    Case(_MAKE, "unknown control tokens", made(control_tokens={"<X>": {}}), ValueError, "lacks the special tokens ['<X>']", "add_geode_tokens"),
    Case(_ANSWERS, "None", answers(None, IDS), TypeError, "got NoneType", "what `generate` returned"),
    Case(_ANSWERS, "prompts in a list", answers(IDS, [[1]]), TypeError, "got list", "must be a tensor of tokens"),
    Case(_ANSWERS, "tokens in floating point", answers(IDS.float(), IDS), ValueError, "got torch.float32", "must hold tokens"),
    Case(_ANSWERS, "negative tokens", answers(IDS - 1, IDS), ValueError, "got -1", "not negative"),
    Case(_ANSWERS, "2 prompts and 3 answers", answers(IDS.repeat(3, 1), IDS.repeat(2, 1)), ValueError, "got 3", "a whole number of sequences for each of the 2 prompts"),
)  # fmt: skip

__all__ = ["CASES"]
