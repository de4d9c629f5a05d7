"""Pretraining of the mini LLM: a LlamaForCausalLM that reads a scene from a text map and answers about it.

A training text is the text map ("c00 _ c01 small-red-circle ..."), then several dialogues about it, with the prompts of
pipeline.data.prompts; only answers carry a loss. Where a tuned answer has <OBJ-i>, these texts have the word of the
cell that the object lies in ("the small red circle c01"), so the state that follows a name knows the place. Gaussian
noise on the map words' embeddings makes the LLM tolerant of what an image projector will later put in their places.
The gate: captions written freely from the map.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.data import prompts
from pipeline.mini import grammar, training
from pipeline.mini.questions import choose_question, referring_phrases
from pipeline.mini.scenes import Scene, scene_at
from pipeline.mini.tokenizer import build_tokenizer

MAP_NOISE = 0.3
"""Standard deviation of the noise on map words, relative to the root mean square of the embeddings."""
_TAG = re.compile(r"<OBJ-(\d+)>")


def build_llm(seed: int) -> LlamaForCausalLM:
    """A 4-layer LLaMA, 192 wide, over the mini vocabulary."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(grammar.VOCABULARY),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def map_text(scene: Scene) -> str:
    """ "c00 _ c01 small-red-circle ...": the image prefix with words where the pictures' tokens will stand."""
    return " ".join(f"{cell} {word}" for cell, word in zip(grammar.CELL_WORDS, scene.text_map(), strict=True))


def dialogue_text(scene: Scene, question: str, answer: str) -> tuple[str, str]:
    """(prompt, answer) as the tuned model will see them, with the object's cell word in the place of each <OBJ-i>."""
    cells = [grammar.CELL_WORDS[o.cell] for o in scene.objects]
    return prompts.dialogue(question), _TAG.sub(lambda tag: cells[int(tag[1]) - 1], answer)


def _choose(options: tuple[str, ...], rng: np.random.Generator) -> str:
    return options[rng.integers(len(options))]


def dialogues(scene: Scene, rng: np.random.Generator) -> list[tuple[str, str]]:
    """One caption, one referring, two reasoning and four lookup dialogues of a scene, in a random order."""
    count = int(rng.integers(1, min(3, len(scene.objects)) + 1))
    chosen = rng.permutation(len(scene.objects))[:count]
    phrases = []
    for i in chosen:
        options = referring_phrases(scene, int(i))
        phrases.append(options[rng.integers(len(options))])
    names = [f"the {scene.objects[i].text} <OBJ-{i + 1}>" for i in chosen]
    found = [
        (_choose(prompts.CAPTION, rng), scene.caption()),
        (
            _choose(prompts.REFERRING, rng).format(phrases=prompts.join_phrases(phrases)),
            prompts.join_phrases(names) + ".",
        ),
    ]
    for _ in range(2):
        qa = choose_question(scene, rng)
        found.append((qa.question, qa.answer))
    found += lookups(scene, rng)
    return [dialogue_text(scene, *found[i]) for i in rng.permutation(len(found))]


def lookups(scene: Scene, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Short questions about the map itself: what lies in a cell (two), where an object lies, what there is in order.

    They teach finding things in the map, on which every longer answer rests.
    """
    cells, words = grammar.CELL_WORDS, scene.text_map()
    occupied = [o.cell for o in scene.objects]
    asked = [occupied[rng.integers(len(occupied))], int(rng.integers(len(cells)))]
    found = [(f"What is at {cells[i]}?", words[i]) for i in asked]
    one = scene.objects[rng.integers(len(scene.objects))]
    found.append((f"Where is {grammar.map_word(one.name)}?", cells[one.cell]))
    found.append(("Which objects are there?", " ".join(grammar.map_word(o.name) for o in scene.objects)))
    return found


def _training_text(scene: Scene, rng: np.random.Generator, encode) -> tuple[list[int], list[bool], list[bool]]:
    """Token ids, which of them carry a loss, and which are map words."""
    if rng.random() < 0.1:
        listed = " ".join(grammar.map_word(o.name) for o in scene.objects)
        turns = [dialogue_text(scene, _choose(prompts.GENERATION, rng).format(caption=scene.caption()), listed)]
        ids, loss, noisy = [1], [False], [False]
    else:
        map_ids = encode(map_text(scene))
        turns = dialogues(scene, rng)
        ids = [1, *map_ids]
        loss = [False] * len(ids)
        noisy = [False] + [i % 2 == 1 for i in range(len(map_ids))]
    for prompt, answer in turns:
        prompt_ids, answer_ids = encode(prompt), [*encode(answer), 2]
        ids += prompt_ids + answer_ids
        loss += [False] * len(prompt_ids) + [True] * len(answer_ids)
        noisy += [False] * (len(prompt_ids) + len(answer_ids))
    return ids, loss, noisy


def pretrain_llm(out: Path, *, steps: int, pool: int, seed: int, batch: int = 16, lr: float = 4e-3) -> dict[str, float]:
    """Trains and saves the LLM with its tokenizer to `out`; returns the gate's figures."""
    tokenizer = build_tokenizer(add_special_tokens=False)
    llm: Any = build_llm(seed).to(training.device())  # type: ignore[arg-type]
    scenes = [scene_at("train", i, seed) for i in range(pool)]
    rng = np.random.default_rng([seed, 1])

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    def step_loss(_: int) -> dict[str, Tensor]:
        rows = [_training_text(scenes[rng.integers(pool)], rng, encode) for _ in range(batch)]
        length = max(len(ids) for ids, _, _ in rows)

        def padded(column: int) -> Tensor:
            filled = [row[column] + [0] * (length - len(row[column])) for row in rows]
            return torch.tensor(np.array(filled, dtype=np.int64), device=llm.device)

        ids_BT, loss_BT, noisy_BT = padded(0), padded(1).bool(), padded(2).bool()
        with training.autocast():
            h_BTD = llm.get_input_embeddings()(ids_BT)
            scale = MAP_NOISE * h_BTD.detach().square().mean().sqrt()
            h_BTD = h_BTD + noisy_BT.unsqueeze(-1) * scale * torch.randn_like(h_BTD)
            hidden = llm.model(inputs_embeds=h_BTD).last_hidden_state
            keep = loss_BT[:, 1:]
            logits = llm.lm_head(hidden[:, :-1][keep])
        return {"answers": F.cross_entropy(logits.float(), ids_BT[:, 1:][keep])}

    held_out = [scene_at("valid", i, seed) for i in range(200)]

    def check() -> dict[str, float]:
        llm.save_pretrained(out)
        tokenizer.save_pretrained(out)
        return caption_gate(llm, tokenizer, held_out)

    llm.train()
    training.fit("mini LLM", llm, steps, step_loss, lr=lr, check=check)
    return check()


@torch.no_grad()
def caption_gate(llm: Any, tokenizer, scenes: list[Scene]) -> dict[str, float]:
    """Free-running from the text map: F1 of the objects (size, colour, shape) in captions; share of right answers, and
    of right places among their rightly named objects."""
    training_mode = llm.training
    llm.eval()
    rng = np.random.default_rng(5)
    hits = named = present = right = found = placed = 0
    questions = [choose_question(s, rng) for s in scenes]
    captions = _answers(llm, tokenizer, scenes, [prompts.CAPTION[0]] * len(scenes))
    replies = _answers(llm, tokenizer, scenes, [qa.question for qa in questions])
    for scene, caption, qa, reply in zip(scenes, captions, questions, replies, strict=True):
        got, want = set(grammar.names_in(caption)), {o.name for o in scene.objects}
        hits, named, present = hits + len(got & want), named + len(got), present + len(want)
        right += set(grammar.names_in(reply)) == {scene.objects[i].name for i in qa.objects}
        mentioned = [scene.objects[i] for i in qa.objects if scene.objects[i].text in reply]
        found += len(mentioned)
        placed += sum(f"{o.text} {grammar.CELL_WORDS[o.cell]}" in reply for o in mentioned)
    llm.train(training_mode)
    return {
        "caption_object_f1": 2 * hits / max(1, named + present),
        "reasoning_accuracy": right / len(scenes),
        "place_accuracy": placed / max(1, found),
    }


def _answers(llm: Any, tokenizer, scenes: list[Scene], asked: list[str]) -> list[str]:
    texts = [f"<s> {map_text(s)} {prompts.dialogue(q)}" for s, q in zip(scenes, asked, strict=True)]
    rows = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
    rows = rows.to(llm.device)
    out = llm.generate(input_ids=rows.input_ids, attention_mask=rows.attention_mask, max_new_tokens=64, do_sample=False)
    return tokenizer.batch_decode(out[:, rows.input_ids.shape[1] :], skip_special_tokens=True)
