"""The parts of a run, made from settings: CLIP, tokens, batches, LM, tuned model.

Cheap things come first, so that a wrong path or number is answered in seconds: the LM's config and tokenizer before
its weights.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from pipeline.config import DataArguments, ModelArguments
from pipeline.data import prompts
from pipeline.data.collate import Collator
from pipeline.data.mixture import MixedDataset, open_data
from pipeline.data.tasks import TASKS
from pipeline.data.tokens import TokenMap
from pipeline.model import quantisation
from pipeline.model.adapters import add_ia3, add_lora, matched_rank
from pipeline.model.backbone import enable_checkpointing, tune_layers
from pipeline.model.decoders import ClipHead, ImageProjector, MaskDecoder
from pipeline.model.heads import HEADS
from pipeline.model.sparse import SparseNetwork
from pipeline.model.tuner import NeuralTuner
from pipeline.model.vision import VisionTower
from pipeline.model.weight_files import refuse_gaps


def load_vision(model: ModelArguments, device: torch.device) -> VisionTower:
    """The frozen CLIP on its device. Raises ValueError naming what is missing or does not fit."""
    return load_tower(model.clip, model.clip_weights, device, model.tap_layers(10**6) if model.clip_taps else None)


def load_tower(clip: str, weights: str, device: torch.device, taps: tuple[int, ...] | None = None) -> VisionTower:
    """The same by its settings alone."""
    return VisionTower.from_local(clip, weights or None, taps=taps).to(device)


def load_token_map(model: ModelArguments) -> TokenMap:
    """The LM's tokenizer with the task tokens behind its vocabulary; reads the LM's config, not its weights."""
    read_config(model)
    vocabulary = AutoConfig.from_pretrained(model.base).vocab_size
    return TokenMap(AutoTokenizer.from_pretrained(model.base), vocabulary, model.max_objects)


def read_config(model: ModelArguments) -> dict[str, Any]:
    """config.json of the LM. Raises ValueError naming --base where there is none."""
    try:
        return json.loads((Path(model.base) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--base {model.base} is no folder of a Hugging Face model (config.json, *.safetensors, tokenizer): {error}"
        ) from error


def make_collator(
    model: ModelArguments, data: DataArguments, token_map: TokenMap, tower: VisionTower, seed: int
) -> Collator:
    """The maker of batches for this LM and this CLIP."""
    patches = tower.grid // model.image_merge
    if tower.grid % model.image_merge:
        raise ValueError(
            f"--image_merge {model.image_merge} does not divide the CLIP's {tower.grid} x {tower.grid} patches"
        )
    image_tokens = patches * patches + int(model.image_cls)
    return Collator(
        token_map,
        image_size=tower.image_size,
        mean=tower.mean,
        std=tower.std,
        mask_size=mask_size(model, tower),
        image_prefix=prompts.image_prefix(model.image_prefix, image_tokens),
        max_length=data.max_length,
        mask_tokens=model.mask_tokens,  # type: ignore[arg-type]
        referring_objects=data.referring_objects,
        seed=seed,
        tasks=data.task_names,
        pack_tokens=data.row_tokens,
    )


def mask_size(model: ModelArguments, tower: VisionTower) -> int:
    """Side of the mask decoder's output in pixels."""
    return tower.grid * ((model.mask_upsample or tower.patch_size) // 4) ** 2


def open_split(data: str, split: str) -> MixedDataset:
    """One split of the packed data sets that `--data` names. Raises ValueError with the packing command if one lacks
    it."""
    return open_data(data, split)


def load_llm(
    model: ModelArguments, dtype: torch.dtype, *, attn: str | None = None, device: torch.device | None = None
) -> PreTrainedModel:
    """The frozen LM in `dtype`.

    attn: transformers' name of an attention implementation; None for its choice. device: where --base_quant quantises
    it, matrix by matrix; without quantisation it is loaded into CPU memory. Raises ValueError naming the tensors that
    its files lack: on every rank alike where the weights are loaded in pieces.
    """
    # Every rank would draw a bar for what takes seconds; the run's own lines say what is loaded.
    disable_progress_bar()
    quantised = quantisation.options(model.base_quant, dtype, device or torch.device("cpu"))
    # A pair, which transformers' types do not say.
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        model.base, dtype=dtype, attn_implementation=attn, output_loading_info=True, **quantised
    )
    llm, found = loaded
    refuse_gaps(model.base, found)
    return llm


def make_tuner(
    model: ModelArguments,
    llm: PreTrainedModel,
    tower: VisionTower,
    *,
    seed: int,
    tasks: Sequence[str] = tuple(TASKS),
    gradient_checkpointing: str = "none",
) -> NeuralTuner:
    """The tuned model around a loaded LM, with the decoders of `tasks`; `initialise` gives it its values."""
    layers = llm.config.num_hidden_layers
    first = model.first_tuned_layer
    assert first is not None
    if first >= layers:
        raise ValueError(f"--first_tuned_layer {first}: the LM has {layers} layers, counted from 0")

    _tune(model, llm, first, seed)
    hidden = llm.config.hidden_size
    rows = llm.get_input_embeddings().weight
    tuner = NeuralTuner(
        llm,
        max_objects=model.max_objects,
        projector=ImageProjector(
            tower.width, hidden, merge=model.image_merge, use_cls=model.image_cls, output_rms=_rms(rows)
        ),
        mask_decoder=MaskDecoder(
            tower.width,
            hidden,
            tower.grid,
            dim=model.mask_dim,
            layers=len(tower.taps),
            upsample=model.mask_upsample or tower.patch_size,
        ),
        clip_head=ClipHead(hidden, tower.embed_dim, kind=model.clip_head),  # type: ignore[arg-type]
        train_embeddings=model.train_embeddings,  # type: ignore[arg-type]
        tasks=tuple(TASKS),
        heads={name: HEADS[name](hidden, tower.width) for name in tasks if name in HEADS},
    )
    if gradient_checkpointing != "none":
        enable_checkpointing(llm, gradient_checkpointing)
    return tuner


def _tune(model: ModelArguments, llm: PreTrainedModel, first: int, seed: int) -> None:
    """Puts into the LM what --tuner names, from layer `first` on."""
    layers = llm.config.num_hidden_layers

    def network(index: int, hidden: int, out_features: dict[str, int]) -> SparseNetwork:
        return SparseNetwork(
            hidden,
            model.z_dim,
            out_features,
            alpha=model.alpha,  # type: ignore[arg-type]
            beta=model.beta,
            activation=model.activation,  # type: ignore[arg-type]
            norm=bool(model.sparse_norm),
            inference_sparsity=bool(model.inference_sparsity),
            pattern=model.activation_pattern,
            layer_index=index,
            depth=(index - first, layers - first),
            seed=seed,
        )

    if model.tuner == "neural":
        tune_layers(llm, first_layer=first, projections=model.projections, make_network=network)
    elif model.tuner == "lora":
        rank = model.lora_rank or matched_rank(llm, first_layer=first, projections=model.projections, z_dim=model.z_dim)
        alpha = model.lora_alpha or 2.0 * rank
        add_lora(llm, first_layer=first, projections=model.projections, rank=rank, alpha=alpha)
    else:
        add_ia3(llm, first_layer=first)


def _rms(table: Any) -> float:
    """Root mean square of the LM's embeddings: the scale at which picture tokens start."""
    if table.is_meta:
        # A planned model has no values; LLaMA's 0.02 stands in, as in ImageProjector's default.
        return 0.02
    assert table.numel(), "under ZeRO-3 the table is gathered here"
    return float(torch.linalg.vector_norm(table.detach(), dtype=torch.float32)) / table.numel() ** 0.5
