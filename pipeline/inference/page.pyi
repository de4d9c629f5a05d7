"""The web page of demo.py, the one place that knows gradio.

The page fetches nothing from the internet, sends nothing there, and serves no file but its own uploads and results,
which lie in a temporary folder that goes with the process.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import gradio as gr

from pipeline.inference import page_html
from pipeline.inference.results import Answer, Drawing
from pipeline.inference.session import Session, pack_answer, pack_drawing
from pipeline.inference.uploads import read_upload

TABS = {
    "reason": ("Reason", "Ask a question about the picture", "Which object is highest?"),
    "segment": ("Segment", "Name one or more objects", "the red circle and the blue star"),
    "caption": ("Caption", "", ""),
}
INTRODUCTION = """# Neural Tuning
Four tasks, one frozen language model with a sparse network beside it. Ask, and point at the words of the answer:
each phrase lights up its mask; a click keeps it lit."""

class RawPicture(gr.Image):
    """An upload that is handed on as the file it is: our own reader judges it, not whatever Pillow makes of it."""

    is_template = True

    def preprocess(self, payload: Any) -> Any:
        """The path of the uploaded file, which gradio has put into its own folder; None without one."""
        return None if payload is None else payload.path
    from collections.abc import Callable, Sequence
    from typing import TYPE_CHECKING, Any, Literal

    from gradio.blocks import Block

    if TYPE_CHECKING:
        from gradio.components import Timer
        from gradio.components.base import Component

class Page:
    """The page's four tabs.

    Args:
        examples: (picture file, question, phrases) to click on.
        descriptions: texts to click on for drawing.
        max_megapixels, max_bytes: limits of an upload.
    """

    def __init__(
        self,
        session: Session,
        *,
        name: str,
        examples: list[tuple[str, str, str]],
        descriptions: list[str],
        max_megapixels: int,
        max_bytes: int,
        max_new_tokens: int,
    ) -> None:
        self.session, self.name = session, name
        self.examples, self.descriptions = examples, descriptions
        self.limits = {"max_megapixels": max_megapixels, "max_bytes": max_bytes}
        self.max_new_tokens = max_new_tokens
        # gradio keeps uploads and results here and serves no other folder.
        self._folder = tempfile.TemporaryDirectory(prefix="neural-tuning-page-")
        os.environ["GRADIO_TEMP_DIR"] = self._folder.name
        self.blocks = self._build()

    def _build(self) -> gr.Blocks:
        with gr.Blocks(title="Neural Tuning", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
            gr.Markdown(f"{INTRODUCTION}\n\nModel: `{self.name}`")
            with gr.Tabs():
                for task in TABS:
                    self._picture_tab(task)
                self._drawing_tab()
        return blocks.queue(max_size=32, default_concurrency_limit=1, api_open=False)

    def _picture_tab(self, task: str) -> None:
        title, label, placeholder = TABS[task]
        with gr.Tab(title, id=task), gr.Row():
            with gr.Column(scale=2):
                picture = RawPicture(
                    label="Picture (JPEG or PNG)",
                    sources=["upload", "clipboard"],
                    elem_id=f"{task}-picture",
                    height=280,
                    buttons=[],
                )
                text = gr.Textbox(
                    label=label, placeholder=placeholder, elem_id=f"{task}-text", visible=bool(label), max_length=20_000
                )
                button = gr.Button(title, variant="primary", elem_id=f"{task}-go")
                with gr.Accordion("Options", open=False):
                    least = gr.Slider(0, 1, 0.3, step=0.05, label="Smallest score of an object that counts as there")
                    heat = gr.Slider(0, 2, 0, step=0.1, label="Temperature of the words; 0: always the likeliest")
                    seed = gr.Number(0, precision=0, minimum=0, maximum=2**32 - 1, label="Seed")
                if self.examples:
                    rows = [
                        [path, question if task == "reason" else phrases] for path, question, phrases in self.examples
                    ]
                    given = [picture, text] if label else [picture]
                    gr.Examples([row[: len(given)] for row in rows], given, elem_id=f"{task}-examples")
            with gr.Column(scale=3, elem_classes=["nt-answer"], elem_id=f"{task}-answer"):
                shown = gr.HTML(page_html.empty_html("The picture with its masks comes here."))
                words = gr.HTML(elem_id=f"{task}-words")
                packed = gr.DownloadButton("Download masks and answer", visible=False, elem_id=f"{task}-download")
                with gr.Accordion("Neurons that fired", open=False, elem_id=f"{task}-neurons"):
                    neurons = gr.HTML("Ask first.")

        def ask(path: str | None, question: str, least: float, heat: float, seed: float) -> Iterator[tuple[Any, ...]]:
            yield from self._ask(task, path, question, least, heat, seed)

        gr.on(
            [button.click, text.submit] if label else [button.click],
            ask,
            [picture, text, least, heat, seed],
            [shown, words, neurons, packed],
            show_progress="minimal",
            api_visibility="private",
        )

    def _ask(
        self, task: str, path: str | None, question: str, least: float, heat: float, seed: float
    ) -> Iterator[tuple[Any, ...]]:
        """Values of the picture's, the words', the neurons' and the download's places, as the answer grows."""
        hidden = gr.DownloadButton(visible=False)
        empty = page_html.empty_html("The picture with its masks comes here.")
        try:
            upload = read_upload(path, **self.limits)
            drawn = {"do_sample": True, "temperature": float(heat)} if heat else {}
            options = {"max_new_tokens": self.max_new_tokens, "min_score": float(least), "seed": int(seed), **drawn}
            yield page_html.picture_html(upload), page_html.writing_html(""), "", hidden
            for step in self.session.answer(task, upload, question, **options):
                if isinstance(step, str):
                    yield gr.skip(), page_html.writing_html(step), gr.skip(), gr.skip()
                    continue
                answer, firing = step
                yield (
                    page_html.picture_html(upload, answer.objects),
                    page_html.answer_html(answer),
                    page_html.neurons_html(firing),
                    gr.DownloadButton(value=str(self._pack(task, answer, upload)), visible=True),
                )
        except (ValueError, OSError) as error:
            yield empty, page_html.error_html(str(error)), "", hidden

    def _drawing_tab(self) -> None:
        with gr.Tab("Draw", id="draw"), gr.Row():
            with gr.Column(scale=2):
                text = gr.Textbox(label="Describe a picture", lines=3, elem_id="draw-text", max_length=20_000)
                count = gr.Slider(1, 4, 2, step=1, label="Pictures")
                seed = gr.Number(0, precision=0, minimum=0, maximum=2**32 - 1, label="Seed", elem_id="draw-seed")
                button = gr.Button("Draw", variant="primary", elem_id="draw-go")
                if self.descriptions:
                    gr.Examples([[each] for each in self.descriptions], [text], elem_id="draw-examples")
            with gr.Column(scale=3, elem_id="draw-answer"):
                gallery = gr.Gallery(
                    label="Pictures", columns=2, object_fit="contain", format="png", buttons=["download"]
                )
                words = gr.HTML(elem_id="draw-words")
                packed = gr.DownloadButton("Download pictures", visible=False, elem_id="draw-download")

        def draw(text: str, count: float, seed: float) -> tuple[Any, ...]:
            try:
                drawing = self.session.model.generate(text, n=int(count), seed=int(seed))
            except ValueError as error:
                return None, page_html.error_html(str(error)), gr.DownloadButton(visible=False)
            if not drawing.pictures:
                said = f"The model drew nothing; it wrote: {drawing.answer or '(nothing)'}"
                return None, page_html.error_html(said), gr.DownloadButton(visible=False)
            packed = gr.DownloadButton(value=str(self._pack("draw", drawing)), visible=True)
            return drawing.images(), "", packed

        gr.on([button.click], draw, [text, count, seed], [gallery, words, packed], api_visibility="private")

    def _pack(self, task: str, result: Answer | Drawing, upload: Any = None) -> Path:
        path = Path(tempfile.mkdtemp(dir=self._folder.name)) / f"{task}.zip"
        return pack_drawing(result, path) if isinstance(result, Drawing) else pack_answer(result, upload, path)

    def serve(self, host: str, port: int, *, open_browser: bool = False) -> str:
        """Starts the server in threads of its own; returns its address. Raises ValueError if the port is taken."""
        try:
            _, address, _ = self.blocks.launch(
                server_name=host,
                server_port=port or None,
                inbrowser=open_browser,
                prevent_thread_lock=True,
                share=False,
                quiet=True,
                max_file_size=self.limits["max_bytes"],
                allowed_paths=[],
                ssr_mode=False,
                enable_monitoring=False,
                footer_links=[],
                theme=gr.themes.Default(
                    primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
                ),
                css=page_html.style(),
            )
        except OSError as error:
            raise ValueError(f"--host {host} --port {port}: {error}") from error
        return address

    def wait(self) -> None:
        """Until the process is interrupted."""
        self.blocks.block_thread()

    def close(self) -> None:
        """Stops the server and removes what was uploaded."""
        self.blocks.close(verbose=False)
        self._folder.cleanup()
