"""The frozen CLIP of the pipeline, the one place that knows open_clip.

It stays outside the DeepSpeed engine (open_clip's logit_scale is a parameter without dimensions, which
`deepspeed.initialize` cannot take) and runs without gradients.

Shape suffixes: B batch, N patches, C width, E embedding width; S picture side.
"""

from __future__ import annotations

import logging
import re
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from pipeline.data.batch import VisionFeatures
from pipeline.model.weight_files import check_whole

_OPENAI_FILE = re.compile(r"openai|^(ViT-[BL]-(32|16|14)(-336px)?|RN\d+(x\d+)?)\.pt$", re.IGNORECASE)


def default_taps(layers: int, n: int = 3) -> tuple[int, ...]:
    """n blocks evenly up to the last, 0-based: (7, 15, 23) of 24. Raises ValueError for fewer blocks than taps."""
    if layers < n:
        raise ValueError(f"the vision tower has {layers} blocks, too few for {n} taps: name the taps yourself")
    return tuple(layers * (i + 1) // n - 1 for i in range(n))


class VisionTower(nn.Module):
    """CLIP in eval mode: picture tokens, taps for the mask decoder, and embeddings of pictures and texts."""

    model: Any

    def __init__(
        self, model: nn.Module, tokenizer: Callable[[list[str]], Tensor], taps: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        visual = getattr(model, "visual", None)
        if not isinstance(visual, open_clip.transformer.VisionTransformer):
            raise ValueError(f"the CLIP's picture side is {type(visual).__name__}: take a ViT, e.g. ViT-L-14-quickgelu")
        if visual.grid_size[0] != visual.grid_size[1]:
            raise ValueError(f"the CLIP's patches form a {visual.grid_size} grid: take a model with a square input")
        self.model, self.tokenizer = model, tokenizer
        self.layers: int = visual.transformer.layers
        self.width: int = visual.transformer.width
        self.embed_dim: int = visual.output_dim
        self.image_size: int = visual.image_size[0]
        self.patch_size: int = visual.patch_size[0]
        self.grid: int = visual.grid_size[0]
        self.mean = tuple(float(x) for x in visual.preprocess_cfg["mean"])
        self.std = tuple(float(x) for x in visual.preprocess_cfg["std"])
        self.taps = tuple(taps) if taps else default_taps(self.layers)
        if list(self.taps) != sorted(set(self.taps)) or not 0 <= self.taps[0] <= self.taps[-1] < self.layers:
            raise ValueError(f"clip_taps must rise within 0..{self.layers - 1} (0-based blocks), not {self.taps}")
        self.requires_grad_(False)
        self.train(False)

    @classmethod
    def from_local(cls, model: str, weights: str | None = None, *, taps: Sequence[int] | None = None) -> VisionTower:
        """CLIP from "local-dir:PATH" (open_clip_config.json and weights in PATH) or an open_clip name and a file.

        Nothing is downloaded. Raises ValueError when weights are missing, or come from OpenAI for a model without
        QuickGELU: open_clip warns of that only for its own tags, never for a local file.
        """
        source = find_local(model, weights)
        try:
            clip = open_clip.create_model(model, pretrained=weights or None, require_pretrained=True)
        except (RuntimeError, FileNotFoundError, AssertionError) as error:
            raise ValueError(f"CLIP {model} does not load from {source}: {error}") from error
        if _OPENAI_FILE.search(source.name) and not _has_quick_gelu(clip):
            raise ValueError(
                f"{source} holds OpenAI's weights, which were trained with QuickGELU, but {model} uses GELU: "
                "take the -quickgelu variant of the model (or set quick_gelu in open_clip_config.json)"
            )
        return cls(clip, open_clip.get_tokenizer(model), taps)

    @classmethod
    def skeleton(cls, model: str, *, taps: Sequence[int] | None = None) -> VisionTower:
        """The tower without weights, on the meta device, to be counted; it knows shapes and cannot read texts."""
        root = logging.getLogger()
        level = root.level
        # open_clip warns of random weights, of which there are none here either.
        root.setLevel(logging.ERROR)
        try:
            with torch.device("meta"):
                clip = open_clip.create_model(model, device="meta", load_weights=False)
        except (RuntimeError, FileNotFoundError) as error:
            raise ValueError(f"--clip {model}: give an open_clip model name or local-dir:FOLDER ({error})") from error
        finally:
            root.setLevel(level)
        return cls(clip, _no_texts, taps)

    def train(self, mode: bool = True) -> VisionTower:
        """Stays in eval mode: the tower is frozen."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> VisionFeatures:
        """Features of pictures [B,3,S,S], normalised with this tower's mean and std; tokens after the last block.

        Not in inference mode: the trained projector keeps the features for its backward, which such tensors forbid.
        """
        visual = self.model.visual
        if pixel_values.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(f"pictures are {tuple(pixel_values.shape)}: this CLIP wants [B,3,{self.image_size}²]")
        pixel_values = pixel_values.to(visual.conv1.weight.dtype)
        wanted = sorted({*self.taps, self.layers - 1})
        out = visual.forward_intermediates(pixel_values, indices=wanted, output_fmt="NLC", output_extra_tokens=True)
        pairs = zip(out["image_intermediates_prefix"], out["image_intermediates"], strict=True)
        blocks = dict(zip(wanted, (torch.cat(pair, dim=1) for pair in pairs), strict=True))
        taps = tuple(blocks[i] for i in self.taps)
        return VisionFeatures(tokens=blocks[self.layers - 1], taps=taps, embedding=out["image_features"])

    @torch.no_grad()
    def encode_text(self, texts: list[str]) -> Tensor:
        """[n,E] projected, unnormalised embeddings of the texts, each cut to CLIP's context length."""
        device = next(self.model.parameters()).device
        return self.model.encode_text(self.tokenizer(texts).to(device))


def find_local(model: str, weights: str | None = None) -> Path:
    """Where `VisionTower.from_local` would load from: a folder or a file. Reads no weights.

    Raises ValueError naming what is missing, cut off, or cannot be loaded.
    """
    if model.startswith("local-dir:"):
        source = Path(model.removeprefix("local-dir:"))
        if weights:
            raise ValueError(f"{model} brings its own weights: leave clip_weights ({weights}) empty")
        if not (source / "open_clip_config.json").is_file():
            raise ValueError(f"no open_clip_config.json in {source}: clip must name a folder saved for open_clip")
        check_whole(source.glob("*.safetensors"))
        return source
    if model.startswith("hf-hub:"):
        raise ValueError(f"{model}: fetch the model yourself and name its folder as local-dir:PATH")
    if model.replace("/", "-") not in open_clip.list_models():
        raise ValueError(f"clip {model} is no model that open_clip knows, nor local-dir:FOLDER")
    if not weights or not Path(weights).is_file():
        raise ValueError(f"clip {model} needs clip_weights, a file with its weights (got {weights!r})")
    source = Path(weights)
    _refuse_torchscript(source)
    check_whole([source] if source.suffix == ".safetensors" else [])
    return source


def new_clip(model_cfg: dict[str, Any]) -> open_clip.CLIP:
    """A CLIP with random weights to be trained: open_clip's class, from the `model_cfg` of an open_clip_config.json."""
    return open_clip.CLIP(**model_cfg)


def _no_texts(texts: list[str]) -> Tensor:
    raise AssertionError("a CLIP without weights reads no texts")


def _has_quick_gelu(clip: Any) -> bool:
    return any(isinstance(module, open_clip.transformer.QuickGELU) for module in clip.visual.modules())


def _refuse_torchscript(path: Path) -> None:
    """OpenAI's own .pt files are TorchScript archives, which cannot be read without running their code."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("constants.pkl") for name in archive.namelist()):
                raise ValueError(f"{path} is a TorchScript archive: convert it to a safetensors state dict first")
