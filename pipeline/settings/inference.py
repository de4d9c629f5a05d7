"""The flags of using a tuned model: infer.py, demo.py and export.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.runtime.command_line import flag
from pipeline.settings.checks import need


@dataclass(kw_only=True)
class LoadArguments:
    """The tuned model, and where the frozen ones lie."""

    checkpoint: str = flag("", "checkpoint, run or exported folder; empty: runs/mini, else runs/quickstart")
    base: str = flag("", "folder of the frozen LM; empty: as in training (the same for clip, vqgan, prior)")
    base_quant: Literal["", "none", "nf4", "int8"] = flag("", "bits of the frozen LM; empty: as in training")
    clip: str = flag("", "frozen CLIP, as in training when empty")
    clip_weights: str = flag("", "weights file of the CLIP, as in training when empty")
    vqgan: str = flag("", "folder of the VQGAN, as in training when empty")
    prior: str = flag("", "folder of the image prior, as in training when empty")
    mechanism: Literal["", "paper", "released"] = flag("", "refuse a checkpoint that was tuned with another one")
    device: str = flag("", "cpu, cuda, cuda:1, ...; empty: the first GPU, else the CPU")
    dtype: Literal["", "float32", "bfloat16", "float16"] = flag("", "of the frozen LM; empty: bfloat16 on a GPU")

    @property
    def model(self) -> dict[str, str]:
        """Arguments of `NeuralTuner.from_pretrained` by name, `dtype` apart."""
        names = ("checkpoint", "base", "base_quant", "clip", "clip_weights", "vqgan", "prior", "mechanism", "device")
        return {name: getattr(self, name) for name in names}


@dataclass(kw_only=True)
class InferArguments:
    """What is asked, of which pictures, and where the answers go."""

    task: Literal["reason", "segment", "caption", "generate"] = flag(
        "reason", "what to do; a JSONL line may say another"
    )
    image: str = flag("", "a picture, or a folder of JPEG and PNG files")
    text: str = flag("", "the question (reason), phrases (segment) or description (generate)")
    input: str = flag(
        "", 'JSONL of {"id", "task", "image", "text"} lines instead; image paths are relative to the file'
    )
    out: str = flag(
        "runs/infer", "folder of answers.jsonl, overlays, masks and pictures; the same command goes on in it"
    )
    overwrite: bool = flag(False, "start anew in a folder of other answers")
    batch_size: int = flag(8, "texts answered together")
    max_new_tokens: int = flag(64, "tokens of an answer at most")
    min_score: float = flag(0.0, "objects with a lower score (0..1) count as not there")
    do_sample: bool = flag(False, "draw the words instead of taking the likeliest")
    temperature: float = flag(1.0, "of that draw, above 0")
    top_p: float = flag(1.0, "of that draw: words with this mass, above 0 to 1")
    seed: int = flag(0, "of both draws, words and pictures")
    n: int = flag(1, "pictures for each description")
    candidates: int = flag(4, "pictures drawn for each; the one nearest to the wanted CLIP embedding is kept")
    picture_temperature: float = flag(1.0, "of the draw of picture codes; 0: the likeliest code")
    picture_top_k: int | None = flag(
        None, "picture codes drawn from the likeliest so many; 0: all; unset: 100 for each 512 codes, at most 500"
    )
    picture_top_p: float = flag(0.95, "picture codes drawn from the likeliest with this mass, above 0 to 1")

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_new_tokens", "n", "candidates"):
            need(getattr(self, name) >= 1, f"{name} must be at least 1", getattr(self, name))
        for name in ("picture_temperature", "picture_top_k"):
            need((getattr(self, name) or 0) >= 0, f"{name} must not be negative", getattr(self, name))
        for name in ("top_p", "picture_top_p"):
            need(0 < getattr(self, name) <= 1, f"{name} must be above 0 and at most 1", getattr(self, name))
        need(
            self.temperature > 0,
            "temperature must be above 0 (leave out --do_sample to draw nothing)",
            self.temperature,
        )
        need(0 <= self.min_score <= 1, "min_score must lie in 0..1", self.min_score)

    @property
    def words(self) -> dict[str, object]:
        """Options of every answer in words."""
        drawn = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p} if self.do_sample else {}
        return {"max_new_tokens": self.max_new_tokens, **drawn}

    @property
    def pictures(self) -> dict[str, object]:
        """Options of `generate`."""
        names = ("n", "candidates", "picture_temperature", "picture_top_k", "picture_top_p")
        return {name: getattr(self, name) for name in names}


@dataclass(kw_only=True)
class DemoArguments:
    """The web page."""

    host: str = flag(
        "127.0.0.1", "address to listen at; 0.0.0.0 shows the page to the whole network, without a password"
    )
    port: int = flag(0, "port; 0: the first free one from 7860 on")
    max_upload_mb: int = flag(16, "largest picture file that is taken, in MB")
    max_megapixels: int = flag(40, "largest picture that is taken, in millions of pixels")
    max_new_tokens: int = flag(64, "tokens of an answer at most")
    open_browser: bool = flag(False, "open the page in a browser of this machine")

    def __post_init__(self) -> None:
        need(0 <= self.port < 65536, "port must lie in 0..65535", self.port)
        for name in ("max_upload_mb", "max_megapixels", "max_new_tokens"):
            need(getattr(self, name) >= 1, f"{name} must be at least 1", getattr(self, name))


@dataclass(kw_only=True)
class ExportArguments:
    """The folder to publish."""

    checkpoint: str = flag("", "checkpoint or run's folder; empty: runs/mini, else runs/quickstart")
    out: str = flag("", "folder to write; its name becomes the model's")
    license: str = flag("other", "licence of the trained part, as Hugging Face's model cards name licences")

    def __post_init__(self) -> None:
        need(bool(self.out), "--out names the folder to write", self.out)
