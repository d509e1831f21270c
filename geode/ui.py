# SPDX-License-Identifier: Apache-2.0
"""`geode demo --ui`: the page of the Space on this machine."""

import os

from geode.commands import load_checkpoint


def run_ui(model: str | os.PathLike | None = None, revision: str | None = None, *, port: int | None = None) -> None:
    """
    Load a model and serve the page on which a room is shown and asked about, until interrupted. Prints its address.

    Args:
        model (`str` or `os.PathLike`, *optional*):
            A checkpoint's folder or its name on the Hub; the default is the tiny one of this package.
        revision (`str`, *optional*):
            Branch, tag or commit of a checkpoint on the Hub.
        port (`int`, *optional*):
            Port to listen at; by default the first that is free from 7860 on.

    Raises:
        FileNotFoundError: If `model` is a path and holds no checkpoint.
        ImportError: If gradio is missing.
        OSError: If the port is taken.
    """
    try:
        import gradio  # noqa: F401 - named here, so that nothing else that is missing is taken for it
    except ImportError as error:
        raise ImportError(
            'The page needs gradio, which is not installed: `pip install "geode-vlm[ui]"`. `geode demo` needs none.'
        ) from error
    from geode.hub_cards.space.interface import build_app, launch_app

    app = build_app(*load_checkpoint(model, revision))
    print(f"page: {launch_app(app, port=port)}", flush=True)
    app.block_thread()


__all__ = ["run_ui"]
