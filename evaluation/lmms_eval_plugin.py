# SPDX-License-Identifier: Apache-2.0
"""
GEODE as a model of lmms-eval 0.7, found by its entry point: `lmms-eval --model geode --model_args pretrained=DIR --tasks ...`.

The requests of a video are answered together, so that it is encoded once. An answer with a regressed value is that number in the unit
that the question asks for, and nothing else. `rooms` in `lmms_eval_tasks/` is the embedded benchmark (`--include_path`).
"""

from pathlib import Path

from accelerate import Accelerator
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from tqdm.auto import tqdm

from geode.data.processes import process_state
from geode.evaluation.asking import ask, geometry_path, show_video
from geode.modeling_geode.answers_geode import Answer
from geode.modeling_geode.modeling_geode import GeodeForConditionalGeneration
from geode.modeling_geode.processing_geode import GeodeProcessor
from geode.modeling_geode.scene_geode import SceneGeometry


def manifest() -> ModelManifest:
    """Return what lmms-eval registers."""
    return ModelManifest(model_id="geode", simple_class_path=f"{__name__}.GeodeLmms")


def answer_text(answer: Answer) -> str:
    """Return the first regressed number of an answer, or else its text."""
    numbers = [value.text for value in answer.values if isinstance(value.value, float)]
    return numbers[0] if numbers else answer.text.strip()


class GeodeLmms(lmms):
    """
    GEODE for lmms-eval.

    Args:
        pretrained (`str`): A checkpoint's folder or its name on the Hub.
        revision (`str`, defaults to `"main"`): Branch, tag or commit on the Hub.
        geometry (`str`, defaults to `"geometry/{scene}"`): Where a saved geometry is, below the folder two levels above the video.
            Without one the model's reconstructor makes it.
        use_geometry (`bool`, defaults to `True`): False shows the frames alone.
        num_frames (`int`, *optional*): Frames that the language model sees; the default is the processor's.
        batch_size (`int`, defaults to 16): Questions about one video at a time.
        device (`str`, *optional*): The default is that of the process.
        max_batch_size (`int`, *optional*): Given by lmms-eval, and not used.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        revision: str = "main",
        geometry: str = "geometry/{scene}",
        use_geometry: bool = True,
        num_frames: int | None = None,
        batch_size: int | str = 16,
        device: str | None = None,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        process_state()  # the accelerator shares it
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        is_alone = self._world_size == 1
        self.model = GeodeForConditionalGeneration.from_pretrained(pretrained, revision=revision).eval()
        self.model.to(device if device and is_alone else self.accelerator.device)
        self.processor = GeodeProcessor.from_pretrained(pretrained, revision=revision)
        self.geometry = geometry
        self.view = {"use_geometry": use_geometry, "num_frames": num_frames}
        self.batch_size = int(batch_size)

    def generate_until(self, requests) -> list[str]:
        """Answer requests, those of a video together."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(self._video_of(request), []).append(number)
        texts = [""] * len(requests)
        for video, numbers in tqdm(groups.items(), desc="Videos", unit="video", disable=self.rank != 0):
            parts, scene = show_video(
                self.model, self.processor, Path(video), geometry=self._geometry_of(Path(video)), **self.view
            )
            for start in range(0, len(numbers), self.batch_size):
                chosen = numbers[start : start + self.batch_size]
                batch = [requests[number].args for number in chosen]
                answers = ask(
                    self.model,
                    self.processor,
                    [context for context, *_ in batch],
                    parts=parts,
                    scene=scene,
                    max_new_tokens=max(options.get("max_new_tokens", 16) for _, options, *_ in batch),
                    **self.view,
                )
                for number, answer in zip(chosen, answers, strict=True):
                    texts[number] = answer_text(answer)
        return texts

    def _video_of(self, request) -> str:
        _, _, doc_to_visual, doc_id, task, split = request.args
        visuals = doc_to_visual(self.task_dict[task][split][doc_id])
        if len(visuals) != 1 or not isinstance(visuals[0], str):
            raise ValueError(f"A question must show one video, and one of task {task!r} shows {visuals!r:.200}.")
        return visuals[0]

    def _geometry_of(self, video: Path) -> SceneGeometry | None:
        if not self.view["use_geometry"]:
            return None
        root = video.parents[1]
        path = geometry_path(root, self.geometry, video.relative_to(root))
        if path.exists():
            return SceneGeometry.load(path)
        if self.model.config.reconstructor_config is None:
            raise FileNotFoundError(
                f"There is no geometry {path}, and the model has no reconstructor. Pass geometry=PATTERN or use_geometry=False."
            )
        return None

    def loglikelihood(self, requests):
        """Raise: answers are generated."""
        raise NotImplementedError("GEODE generates answers; tasks that compare likelihoods cannot be run with it.")

    def generate_until_multi_round(self, requests):
        """Raise: questions have one turn."""
        raise NotImplementedError(
            "GEODE is asked one question at a time; tasks of several rounds cannot be run with it."
        )


__all__ = ["GeodeLmms", "answer_text", "manifest"]
