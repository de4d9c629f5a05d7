"""The mini world: what it draws and asks (seconds), and that its foundation models can be made again (smoke size)."""

import json
from collections import Counter

import numpy as np
import pytest

from pipeline.data import rle
from pipeline.mini import grammar, language, questions, scenes
from pipeline.mini.build import GATES, SMOKE, Builder, failed_gates, judge, write_card
from pipeline.mini.source import MiniSource, foundation_folder
from pipeline.mini.tokenizer import build_tokenizer

SOME = 80


@pytest.fixture(scope="module")
def drawn() -> dict[str, list[scenes.Scene]]:
    return {split: [scenes.scene_at(split, i) for i in range(SOME)] for split in scenes.SPLITS}


def test_splits_share_no_scene(drawn):
    signatures = {split: {s.signature() for s in some} for split, some in drawn.items()}
    assert not signatures["train"] & signatures["test"]
    assert not signatures["train"] & signatures["valid"]
    assert not signatures["valid"] & signatures["test"]


def test_scenes_hold_two_to_four_different_objects_that_do_not_overlap(drawn):
    for scene in drawn["test"]:
        assert 2 <= len(scene.objects) <= 4
        assert len({o.name for o in scene.objects}) == len(scene.objects) == len({o.cell for o in scene.objects})
        assert sum(scenes.object_mask(o).astype(int) for o in scene.objects).max() == 1


def test_the_world_is_varied(drawn):
    objects = [o for scene in drawn["test"] for o in scene.objects]
    assert len({o.colour for o in objects}) >= 5
    assert len({o.shape for o in objects}) >= 4
    assert len({o.size for o in objects}) == 2
    assert len({o.cell for o in objects}) == grammar.GRID**2


def test_referring_phrases_are_true_of_one_object_and_mostly_hard(drawn):
    shared = []
    for scene in drawn["test"]:
        for i, o in enumerate(scene.objects):
            phrases = questions.referring_phrases(scene, i)
            assert phrases, scene
            for phrase in phrases:
                shared.append(questions.shares_attribute(scene, o, phrase))
                words = set(phrase.split())
                others = [p for p in scene.objects if p is not o]
                fits = [p for p in others if words <= {"the", "object", "at", *p.name, *p.place.split()}]
                assert not fits, (phrase, scene.signature())
    assert np.mean(shared) >= 0.5


def test_reasoning_has_families_some_of_two_objects_and_never_names_its_answer(drawn):
    found = [qa for scene in drawn["test"] for qa in questions.questions(scene)]
    families = Counter(qa.family for qa in found)
    assert len(families) >= 4
    assert any(len(qa.objects) == 2 for qa in found)
    for qa in found:
        assert not grammar.names_in(qa.question)


def test_every_word_is_in_the_vocabulary(drawn):
    tokenizer = build_tokenizer(add_special_tokens=False)
    rng = np.random.default_rng(0)
    for scene in drawn["test"]:
        texts = [language.map_text(scene), scene.caption()]
        texts += [part for turn in language.dialogues(scene, rng) for part in turn]
        for text in texts:
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert tokenizer.unk_token_id not in ids, text


def test_a_sample_is_a_pure_function_of_its_index():
    first, second = (MiniSource({"test": 5}, seed=3).load("test", 4) for _ in range(2))
    assert first == second
    assert first != MiniSource({"test": 5}, seed=4).load("test", 4)
    assert first.objects[0].category in first.caption.lower()
    x0, y0, x1, y1 = first.objects[0].box
    mask = rle.decode(first.objects[0].mask)
    assert mask[int(y0) : int(y1), int(x0) : int(x1)].sum() == mask.sum() > 0


def test_names_are_read_back_from_text():
    text = "Two: the small red circle <OBJ-1> and the large blue cross <OBJ-2>."
    assert grammar.names_in(text) == [("small", "red", "circle"), ("large", "blue", "cross")]
    assert grammar.colour_shapes_in(text) == [("red", "circle"), ("blue", "cross")]


def test_the_foundations_can_be_made_again(tmp_path):
    Builder(tmp_path, SMOKE, seed=1).build()
    write_card(tmp_path)
    figures = judge(tmp_path, tuple(GATES), SMOKE.held_out, seed=1)
    assert set(figures) == set(GATES)
    assert failed_gates(figures), "three steps cannot make models that pass"
    before = (tmp_path / "llm" / "model.safetensors").read_bytes()
    Builder(tmp_path, SMOKE, seed=1).build()
    assert (tmp_path / "llm" / "model.safetensors").read_bytes() == before, "finished stages are kept"


def test_the_stored_foundations_are_small_and_what_their_card_says():
    folder = foundation_folder()
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) <= 20_000_000
    records = {stage: json.loads((folder / stage / "gate.json").read_text())["figures"] for stage in GATES}
    card = (folder / "README.md").read_text()
    for stage, figures in records.items():
        for name, value in figures.items():
            assert f"| {stage} | {name} | {value:.3f} |" in card
    assert not failed_gates(records)
    measured = judge(folder, ("llm",), 50, seed=0)["llm"]
    assert measured["caption_object_f1"] >= GATES["llm"]["caption_object_f1"]
