# SPDX-License-Identifier: Apache-2.0
"""
The page of the Space, and `geode demo --ui`: a room from above and in space, and a chat about it. It needs gradio.

What a visitor uploads belongs to that visitor: files are deleted once the room is encoded, pictures go to the page as data and never
as files, and room and conversation are kept in the state of the session. `guard.py` says what the server answers at all.

Load: one job has the model at a time, the others wait in the order in which they came. The queue, the jobs of one visitor, the uploads that
wait, the sessions that are kept and what each of them holds are bounded, by the constants below and those of `guard.py` and `room.py`.
"""

import contextlib
import html
import json
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import gradio as gr
from gradio.components.plot import PlotData
from gradio_client.utils import is_http_url_like
from starlette.middleware import Middleware

from geode import embedded_scene
from geode.hub_cards.space.guard import Guard, uploads_folder
from geode.hub_cards.space.room import (
    Room,
    ask_room,
    describe_reply,
    describe_room,
    open_embedded_room,
    open_room,
    plain,
)
from geode.hub_cards.space.uploads import (
    MAX_QUESTION_LENGTH,
    MAX_UPLOAD_BYTES,
    MAX_VIDEO_FRAMES,
    VIDEO_SUFFIXES,
    check_question,
)
from geode.hub_cards.space.view import as_html, figure_in_space, picture_from_above, strip_of
from geode.modeling_geode.answers_geode import Box3D


MAX_WAITING = 20  # visitors in the queue; more are told to come back
MAX_SESSIONS = 50  # rooms that are kept; those asked longest ago go first
SESSION_S = 3600.0  # a room that nobody asks about for so long is dropped
MAX_TURNS = 100  # questions of a conversation
CLEANING_S = 600  # how often files that were uploaded and never encoded are looked for
# Of each of these kinds the first question of the embedded room is an example.
EXAMPLE_KINDS = ("object_localization", "object_abs_distance", "object_counting", "room_size_estimation")
NOTHING_TO_DRAW = '<p style="padding: 3em 1em; text-align: center">There is no geometry to draw yet.</p>'
INTRODUCTION = f"""# GEODE
Questions about a room, answered with numbers that are regressed and not spelled: metres, square metres, counts, boxes.

Upload a video (up to {MAX_UPLOAD_BYTES // 2**20} MiB and {MAX_VIDEO_FRAMES:,} frames) and its geometry, or take the room that comes with the package.
Uploads are deleted once they are encoded, and nobody else sees them. Not for measurements that anybody relies on.
"""
CSS = """
.gradio-container { max-width: 1360px !important; margin: auto; }
#from-above img { border-radius: 6px; max-width: 520px; margin: auto; display: block; }
#strip img { max-height: 120px; width: auto !important; max-width: 100%; }
footer { display: none !important; }
"""


class Session(NamedTuple):
    """What belongs to one visitor: the room, the boxes that were predicted in it, and the conversation."""

    room: Room | None = None
    boxes: tuple[Box3D, ...] = ()
    chat: tuple[dict, ...] = ()


def build_app(model, processor) -> gr.Blocks:
    """
    Make the page.

    Args:
        model ([`GeodeForConditionalGeneration`]): The model, in eval mode.
        processor ([`GeodeProcessor`]): Its processor.

    Returns:
        `gr.Blocks`: The app; [`launch_app`] starts it.

    Raises:
        ValueError: If the model encodes a scene anew for each question.
    """
    if model.config.drm_config.question_conditioned:
        raise ValueError(
            "The app encodes a scene once, and with `drm_config.question_conditioned` the encoding depends on the question. Use "
            "another model, or `geode ask`."
        )
    uploads_folder()  # before the components, which remember it
    with gr.Blocks(title="GEODE", analytics_enabled=False, delete_cache=(CLEANING_S, int(SESSION_S))) as app:
        gr.Markdown(INTRODUCTION)
        session = gr.State(Session(), time_to_live=SESSION_S)
        with gr.Row():
            with gr.Column(scale=5):
                inputs, buttons = _input_components(has_reconstructor=model.model.reconstructor is not None)
                facts = gr.Markdown(elem_id="facts")
                chat = gr.Chatbot(
                    label="Questions and answers", height=440, elem_id="chat", buttons=[], latex_delimiters=[]
                )
                with gr.Row():
                    question = gr.Textbox(
                        show_label=False,
                        placeholder="Locate the sofa.",
                        max_length=MAX_QUESTION_LENGTH,
                        scale=5,
                        elem_id="question",
                    )
                    ask = gr.Button("Ask", variant="primary", elem_id="ask", scale=1, min_width=80)
                gr.Examples(example_questions(), [question], label="Questions about the embedded room")
            with gr.Column(scale=6):
                strip = gr.HTML(elem_id="strip")
                above = gr.HTML(
                    NOTHING_TO_DRAW, label="From above", show_label=True, container=True, elem_id="from-above"
                )
                space = gr.Plot(label="In space: drag to turn, scroll to come closer", elem_id="in-space")
        views = [session, chat, facts, strip, above, space]
        # One job at a time has the model; the others wait in the queue.
        job = {"concurrency_limit": 1, "concurrency_id": "model"}
        # Progress is shown at one place each: by default it, and then the word "Error", would cover every output.
        encoding, asking = {**job, "show_progress_on": facts}, {**job, "show_progress_on": question}
        encode_upload, use_embedded = buttons
        video, archive = inputs[:2]
        encode_upload.click(
            partial(on_upload, model, processor), inputs, [*views, video, archive], api_name="encode", **encoding
        )
        use_embedded.click(partial(on_embedded, model, processor), None, views, api_name="embedded", **encoding)
        chat.clear(on_clear, [session], [session, above, space], show_progress="hidden", **job)
        answered = [session, chat, question, above, space]
        gr.on(
            [ask.click, question.submit],
            partial(on_question, model, processor),
            [session, question],
            answered,
            api_name="ask",
            **asking,
        )
    for block in app.blocks.values():
        if isinstance(block, gr.components.Component):
            _fetch_nothing(block)
    return app.queue(max_size=MAX_WAITING, api_open=False)


def _fetch_nothing(component: gr.components.Component) -> None:
    """Gradio downloads what an address in the place of a file names, without a bound on its size. Here files are uploaded."""
    move = component.async_move_resource_to_block_cache

    async def checked(path):
        if path is not None and is_http_url_like(str(path)):
            raise gr.Error("An address is not fetched. Upload the file itself.", print_exception=False)
        return await move(path)

    component.async_move_resource_to_block_cache = checked


def _input_components(*, has_reconstructor: bool) -> tuple[list[gr.components.Component], list[gr.Button]]:
    with gr.Row():
        video = gr.File(label="Video", file_types=list(VIDEO_SUFFIXES), height=160, elem_id="video")
        archive = gr.File(
            label="Its geometry (.zip)" + (", optional" if has_reconstructor else ""),
            file_types=[".zip"],
            height=160,
            elem_id="geometry",
        )
    with gr.Accordion("What geometry is, and how to get it", open=False):
        gr.Markdown(
            "A .zip with `geometry.json` and `geometry.safetensors`, as `SceneGeometry.save` writes them: a point cloud with cameras, in "
            "metres. `SceneGeometry.from_rgbd(...)` makes it from depth and camera poses (a phone with a depth sensor has both), "
            "`geode reconstruct room.mp4 -o scene --camera-height-m 1.5` from a video alone. "
            + (
                "Without it this model makes it from the frames."
                if has_reconstructor
                else "This model cannot make it."
            )
        )
    frames_alone = gr.Checkbox(label="Answer from the frames alone, without geometry", elem_id="frames-alone")
    height = gr.Number(
        label="Height of the first camera above the floor, in metres (gives a reconstruction its scale)",
        visible=has_reconstructor,
        value=None,
    )
    with gr.Row():
        encode = gr.Button("Encode the upload", variant="primary", elem_id="encode")
        embedded = gr.Button("Take the embedded room", elem_id="embedded")
    return [video, archive, frames_alone, height], [encode, embedded]


def launch_app(app: gr.Blocks, *, port: int | None = None) -> str:
    """
    Serve the page at the address in GRADIO_SERVER_NAME, which Spaces set, else for this machine alone, and return at once.

    Args:
        app (`gr.Blocks`):
            What [`build_app`] returned.
        port (`int`, *optional*):
            Its port; by default that of GRADIO_SERVER_PORT, else the first that is free from 7860 on.

    Returns:
        `str`: The address.
    """
    # A private name, checked on gradio 6.31: no public one tells how many jobs of a session wait or run.
    waiting = app._queue.pending_event_ids_session
    guard = Middleware(
        Guard,
        folder=uploads_folder(),
        max_upload_bytes=MAX_UPLOAD_BYTES,
        max_age_s=SESSION_S,
        jobs_of=lambda visitor: len(waiting.get(visitor, ())),
    )
    _, url, _ = app.launch(
        app_kwargs={"middleware": [guard]},
        allowed_paths=[],
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        ssr_mode=False,
        run_history=False,
        footer_links=[],
        max_file_size=MAX_UPLOAD_BYTES,
        state_session_capacity=MAX_SESSIONS,
        enable_monitoring=False,
        css=CSS,
        # Fonts of the system: a page that loads nothing from elsewhere needs none.
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    )
    return url


def example_questions() -> list[list[str]]:
    """Return a question of each of some kinds about the embedded room, as `gr.Examples` takes them."""
    lines = (embedded_scene() / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    found = [next(row["question"] for row in rows if row["question_type"] == kind) for kind in EXAMPLE_KINDS]
    return [[question] for question in found]


def on_upload(
    model, processor, video: str | None, archive: str | None, frames_alone: bool, camera_height_m: float | None
) -> list:
    """
    Encode an upload and delete its files; they stay where it fails, so that it can be tried again, until they are cleaned up.

    Args:
        model ([`GeodeForConditionalGeneration`]): The model.
        processor ([`GeodeProcessor`]): Its processor.
        video (`str`, *optional*): The uploaded file.
        archive (`str`, *optional*): Likewise, see [`open_room`].
        frames_alone (`bool`): Use no geometry.
        camera_height_m (`float`, *optional*): See [`open_room`].

    Returns:
        `list`: Values of the session, the views and, emptied, the two inputs.

    Raises:
        gr.Error: With the text of an error of [`open_room`].
    """
    files = [path for path in (video, archive) if path is not None]
    with shown_errors(files):
        options = {"use_geometry": not frames_alone, "camera_height_m": camera_height_m}
        room = open_room(model, processor, video, archive, **options)
    for path in files:
        Path(path).unlink(missing_ok=True)
    return [*_show_room(model, room), None, None]


def on_embedded(model, processor) -> list:
    """
    Encode the embedded room; arguments are those of [`on_upload`].

    Returns:
        `list`: Values of the session and the views.
    """
    return _show_room(model, open_embedded_room(model, processor))


def on_question(model, processor, session: Session, question: str) -> list:
    """
    Answer a question about a session's room.

    Args:
        model ([`GeodeForConditionalGeneration`]): The model.
        processor ([`GeodeProcessor`]): Its processor.
        session ([`Session`]): The visitor's.
        question (`str`): What was typed.

    Returns:
        `list`: Values of the session, the chat, the emptied line for questions, and both drawings.

    Raises:
        gr.Error: With the text of an error of [`ask_room`], or if the conversation is as long as one may be.
    """
    if len(session.chat) >= 2 * MAX_TURNS:
        raise gr.Error(
            f"A conversation may have {MAX_TURNS} questions here. Clear it; the room stays encoded.",
            print_exception=False,
        )
    with shown_errors():
        reply = ask_room(model, processor, session.room, question)
    asked = {"role": "user", "content": plain(check_question(question))}
    answer = {"role": "assistant", "content": describe_reply(reply, len(session.boxes) + 1)}
    boxes = (*session.boxes, *reply.answer.boxes)
    session = session._replace(boxes=boxes, chat=(*session.chat, asked, answer))
    # Without a new box the drawings are those that are there.
    drawings = _drawings(session) if reply.answer.boxes else [gr.skip(), gr.skip()]
    return [session, list(session.chat), "", *drawings]


def on_clear(session: Session) -> list:
    """
    Forget the conversation and its boxes; the room stays encoded.

    Args:
        session ([`Session`]): The visitor's.

    Returns:
        `list`: Values of the session and both drawings.
    """
    session = Session(session.room)
    return [session, *_drawings(session)]


@contextlib.contextmanager
def shown_errors(files: Sequence[str] = ()) -> Iterator[None]:
    """
    Turn an error of what was given into a message on the page; others are defects, and stay in the log.

    Args:
        files (`Sequence[str]`): Uploaded files, whose folders are left out of the message.

    Raises:
        gr.Error: With the text of the error.
    """
    try:
        yield
    except (OSError, ValueError, TypeError, ImportError) as error:
        text = str(error)
        for path in files:
            text = text.replace(f"{Path(path).parent}/", "")
        text = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))
        raise gr.Error(text, duration=None, print_exception=False) from error


def _show_room(model, room: Room) -> list:
    session = Session(room)
    head = model.config.drh_config
    facts = describe_room(room, head.interval_coverage if head.uncertainty else None)
    strip = as_html(strip_of(room.frames), "Frames of the video")
    return [session, [], facts, strip, *_drawings(session)]


def _drawings(session: Session) -> list:
    geometry = None if session.room is None else session.room.geometry
    if geometry is None:
        return [NOTHING_TO_DRAW, None]
    above = as_html(picture_from_above(geometry, session.boxes), "The room from above")
    figure = json.dumps(figure_in_space(geometry, session.boxes), allow_nan=False)
    return [above, PlotData(type="plotly", plot=figure)]


__all__ = [
    "Session",
    "build_app",
    "example_questions",
    "launch_app",
    "on_clear",
    "on_embedded",
    "on_question",
    "on_upload",
    "shown_errors",
]
