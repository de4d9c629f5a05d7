"""A tuned model small enough for any test: random LMs 32 wide, a 4 x 4 patch grid, four rows of four tasks."""

import copy

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from pipeline.data.batch import IGNORE, NO_SAMPLE, Batch, PromptBatch, VisionFeatures
from pipeline.data.rows import lay_out
from pipeline.model.backbone import tune_layers
from pipeline.model.decoders import ClipHead, ImageProjector, MaskDecoder
from pipeline.model.initialise import initialise
from pipeline.model.losses import Norms
from pipeline.model.sparse import SparseNetwork
from pipeline.model.tuner import NeuralTuner

VOCAB, HIDDEN, WIDTH, EMBED, OBJECTS = 40, 32, 24, 6, 3
OBJ, GEN, SLOT = VOCAB, VOCAB + OBJECTS, VOCAB + OBJECTS + 1
PICTURE = [SLOT] * 17
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=2),
    "tied": LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True),
}
RELEASED = {"alpha": 0.2, "activation": "shifted", "norm": True, "inference_sparsity": False}
NORMS = Norms(tokens=7.0, masks=3.0, pictures=2.0)


def base(name="llama"):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])).eval()


def build(name="llama", *, fill=True, train_embeddings="new", first_layer=0, adapt=None, **options):
    """`adapt` puts something else than sparse networks into the LM."""
    llm = base(name)

    def make(index, hidden, out_features):
        return SparseNetwork(hidden, 16, out_features, layer_index=index, **options)

    if adapt is None:
        tune_layers(llm, first_layer=first_layer, projections="qv", make_network=make)
    else:
        adapt(llm)
    tuner = NeuralTuner(
        llm,
        max_objects=OBJECTS,
        projector=ImageProjector(WIDTH, HIDDEN, output_rms=0.3),
        mask_decoder=MaskDecoder(WIDTH, HIDDEN, 4, dim=16, upsample=8),
        clip_head=ClipHead(HIDDEN, EMBED),
        train_embeddings=train_embeddings,
    )
    initialise(tuner, 0)
    if fill:
        generator = torch.Generator().manual_seed(3)
        for network in tuner.networks:
            torch.nn.init.normal_(network.wb, std=0.3, generator=generator)
        torch.nn.init.normal_(llm.lm_head.rows, std=0.5, generator=generator)
        torch.nn.init.normal_(llm.model.embed_tokens.rows, std=0.5, generator=generator)
    return tuner


def features(rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(4, rows, 17, WIDTH, generator=generator)
    embedding = torch.randn(rows, EMBED, generator=generator)
    return VisionFeatures(tokens=tokens[3], taps=tuple(tokens[:3]), embedding=embedding)


ROWS = [
    ("reasoning", [1, *PICTURE, 5, 6], [7, OBJ, 8, OBJ + 1, 2]),
    ("caption", [1, *PICTURE, 5, 6, 9], [10, 11, 2]),
    ("generation", [1, 5, 12], [GEN, 2]),
    ("referring", [1, *PICTURE, 14], [13, OBJ + 2, 2]),
]


def batch(rows=ROWS, *, clip_targets=True, pack_tokens=None):
    layout = lay_out([prompt + answer for _, prompt, answer in rows], pad_id=0, budget=pack_tokens)
    ids = layout.input_ids
    labels = torch.full_like(ids, IGNORE)
    at = {"mask": [], "gen": []}
    for (row, start), (_, prompt, answer) in zip(layout.starts, rows, strict=True):
        begin, end = start + len(prompt), start + len(prompt) + len(answer)
        labels[row, begin:end] = torch.tensor(answer)
        for place in range(begin, end):
            if OBJ <= ids[row, place] < GEN:
                at["mask"].append((row, place))
            elif ids[row, place] == GEN:
                at["gen"].append((row, place))
    where = {kind: torch.tensor(pairs, dtype=torch.long).reshape(-1, 2) for kind, pairs in at.items()}
    generator = torch.Generator().manual_seed(1)
    return Batch(
        keys=[str(i) for i in range(len(rows))],
        tasks=[task for task, _, _ in rows],
        input_ids=ids,
        segment_ids=layout.segment_ids,
        position_ids=layout.position_ids,
        labels=labels,
        pixel_values=torch.zeros(len(rows), 3, 8, 8),
        mask_rows=where["mask"][:, 0],
        mask_positions=where["mask"][:, 1],
        masks=(torch.rand(len(where["mask"]), 16, 16, generator=generator) > 0.5).float(),
        gen_rows=where["gen"][:, 0],
        gen_positions=where["gen"][:, 1],
        clip_targets=torch.randn(len(where["gen"]), EMBED, generator=generator) if clip_targets else None,
    )


def empty_batch():
    one = torch.zeros(1, 1, dtype=torch.long)
    none = torch.zeros(0, dtype=torch.long)
    return Batch(
        keys=[],
        tasks=[],
        input_ids=one,
        segment_ids=torch.full((1, 1), NO_SAMPLE),
        position_ids=one,
        labels=torch.full((1, 1), IGNORE),
        pixel_values=torch.zeros(1, 3, 8, 8),
        mask_rows=none,
        mask_positions=none,
        masks=torch.zeros(0, 16, 16),
        gen_rows=none,
        gen_positions=none,
    )


def prompts(rows=ROWS):
    length = max(len(prompt) for _, prompt, _ in rows)
    ids, mask = torch.zeros(2, len(rows), length, dtype=torch.long)
    for row, (_, prompt, _) in enumerate(rows):
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    return PromptBatch(
        keys=[str(i) for i in range(len(rows))],
        tasks=[task for task, _, _ in rows],
        input_ids=ids,
        attention_mask=mask,
        pixel_values=torch.zeros(len(rows), 3, 8, 8),
        references=[{} for _ in rows],
        answer_ids=[answer for _, _, answer in rows],
    )
