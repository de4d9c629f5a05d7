"""infer.py: what it is asked, what it leaves behind, how it goes on, and its command line."""

import json
from pathlib import Path

import numpy as np
import pytest
from mini_answers import ANSWERS, mini_checkpoint, saying, scene
from PIL import Image

from pipeline.config import REPO
from pipeline.data import rle
from pipeline.inference import NeuralTuner
from pipeline.inference.batches import Output, answer_all, describe
from pipeline.inference.jobs import read_requests
from pipeline.scoring.contact_sheet import PALETTE

WORDS, PICTURES = {"max_new_tokens": 16}, {"n": 2, "candidates": 1}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return mini_checkpoint(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def model(checkpoint):
    return NeuralTuner.from_pretrained(checkpoint)


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(5):
        (folder / f"scene {i}.jpg").write_bytes(scene(i))
    (folder / "notes.txt").write_text("no picture")
    return folder


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def answer(model, requests, out, settings=None, *, batch_size=2, **options):
    output = Output(out, settings or {"seed": 0}, **options)
    with saying(model):
        return answer_all(model, requests, output, batch_size=batch_size, seed=0, words=WORDS, pictures=PICTURES)


def test_a_folder_becomes_masks_overlays_and_lines(model, pictures, tmp_path):
    requests = read_requests(task="reason", image=str(pictures), text="Which object is highest?", input="")
    assert [request.id for request in requests] == [f"scene_{i}.jpg" for i in range(5)]
    out = tmp_path / "out"
    _, failures = answer(model, requests, out)
    found = lines(out / "answers.jsonl")
    assert failures == 0 and [line["id"] for line in found] == [request.id for request in requests]
    first, second = found[0]["objects"]
    assert (first["number"], first["phrase"]) == (1, "the large red circle")
    mask = np.asarray(Image.open(out / first["mask"]))
    assert mask.shape == (128, 128) and set(np.unique(mask)) == {0, 255}
    assert np.array_equal(rle.decode(first["rle"]), mask // 255)
    assert found[0]["text"][slice(*second["span"])] == "a small star"
    x1, _, x2, _ = second["box"]
    xs = np.nonzero(rle.decode(second["rle"]))[1]
    assert (x1, x2) == (xs.min(), xs.max() + 1)
    shown = np.asarray(Image.open(out / found[0]["overlay"]).convert("RGB")).astype(int)
    blue = np.array([int(PALETTE[0][i : i + 2], 16) for i in (1, 3, 5)])
    assert np.abs(shown[0, 10] - blue).max() <= 1, "a rim in the object's colour"
    assert not (out / "errors.jsonl").exists()


def test_a_jsonl_of_four_tasks_with_faults(model, pictures, tmp_path):
    rows = [
        {"task": "segment", "image": "scene 0.jpg", "text": "the red circle", "id": "one"},
        {"task": "caption", "image": "scene 1.jpg"},
        {"task": "generate", "text": "a red circle"},
        {"image": "scene 2.jpg", "text": "Which object is highest?"},
        {"image": "notes.txt", "text": "Which object is highest?"},
        {"image": "../../../../etc/passwd", "text": "Which object is highest?"},
        {"image": "scene 3.jpg", "text": "why " * 3_000},
        {"image": "scene 3.jpg", "text": "Which object is lowest?"},
    ]
    (pictures / "ask.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    requests = read_requests(task="reason", image="", text="", input=str(pictures / "ask.jsonl"))
    out = tmp_path / "out"
    _, failures = answer(model, requests, out, batch_size=8)
    found = {line["id"]: line for line in lines(out / "answers.jsonl")}
    assert set(found) == {"one", "2", "3", "4", "8"} and failures == 3
    assert found["one"]["task"] == "referring" and len(found["one"]["objects"]) == 1
    assert found["2"]["text"] == "a red circle."
    assert found["3"]["pictures"] == ["pictures/3-0.png", "pictures/3-1.png"]
    assert all(Image.open(out / name).size == (64, 64) for name in found["3"]["pictures"])
    errors = {line["id"]: line["error"] for line in lines(out / "errors.jsonl")}
    assert "no readable JPEG" in errors["5"]
    assert "no readable JPEG" in errors["6"] or "cannot be read" in errors["6"]
    assert "shorten it" in errors["7"]


def test_a_stopped_run_goes_on(model, pictures, tmp_path):
    requests = read_requests(task="caption", image=str(pictures), text="", input="")
    out = tmp_path / "out"
    answer(model, requests[:3], out)
    whole = (out / "answers.jsonl").read_bytes()
    (out / "answers.jsonl").write_bytes(whole[:-9])
    calls, inner = [], model.caption
    model.caption = lambda images, **options: calls.append(len(images)) or inner(images, **options)
    try:
        answer(model, requests, out)
    finally:
        del model.caption
    assert sum(calls) == 3, "the line that was cut and the two that were never answered"
    assert [line["id"] for line in lines(out / "answers.jsonl")] == [request.id for request in requests]
    assert (out / "answers.jsonl").read_bytes().startswith(whole)


def test_answers_are_not_mixed(model, pictures, tmp_path):
    requests = read_requests(task="caption", image=str(pictures), text="", input="")[:1]
    answer(model, requests, tmp_path / "out", {"seed": 0})
    with pytest.raises(ValueError, match=r"other settings \(seed\)"):
        answer(model, requests, tmp_path / "out", {"seed": 1})
    answer(model, requests, tmp_path / "out", {"seed": 1}, overwrite=True)
    assert len(lines(tmp_path / "out" / "answers.jsonl")) == 1
    with pytest.raises(ValueError, match="holds other files"):
        Output(pictures, {}, overwrite=True)
    assert (pictures / "notes.txt").exists()


def test_another_request_of_the_same_id_is_refused(model, pictures, tmp_path):
    def asked(text: str):
        path = tmp_path / "ask.jsonl"
        path.write_text(json.dumps({"image": "pictures/scene 0.jpg", "task": "segment", "text": text}) + "\n")
        return read_requests(task="reason", image="", text="", input=str(path))

    out = tmp_path / "out"
    answer(model, asked("the red circle"), out)
    answer(model, asked("the red circle"), out)
    with pytest.raises(ValueError, match="another request of the id '1' .*text 'the red circle'.*--overwrite"):
        answer(model, asked("the green star"), out)
    (out / "answers.jsonl").write_text('{"id": "1"}\n')
    with pytest.raises(ValueError, match=r"answers.jsonl, line 1 is no answer of infer.py .*--overwrite"):
        answer(model, asked("the red circle"), out)


def test_ids_of_files_and_texts_of_any_script(pictures, tmp_path):
    folder = tmp_path / "more"
    folder.mkdir()
    for name in ("图.jpg", "猫.jpg"):
        (folder / name).write_bytes(scene(0))
    found = read_requests(task="caption", image=str(folder), text="", input="")
    assert sorted(request.id for request in found) == ["_.jpg", "_.jpg-2"]
    (tmp_path / "ask.jsonl").write_text(json.dumps({"image": "x.jpg", "text": "a\u2028b"}, ensure_ascii=False) + "\n")
    (one,) = read_requests(task="reason", image="", text="", input=str(tmp_path / "ask.jsonl"))
    assert one.text == "a\u2028b"


def test_nothing_found_is_said(model, tmp_path):
    with saying(model, ANSWERS | {"referring": "none."}):
        nothing = model.segment(scene(0), "the green star")
    assert describe(nothing).endswith("no such object")
    assert nothing.to_json()["nothing_found"] is True


@pytest.mark.parametrize(
    "row, message",
    [
        ("[1]", "must be an object"),
        ("{", "is no JSON"),
        ('{"image": 3, "text": "x"}', "image must be a path"),
        ('{"image": "a.jpg"}', "needs a text"),
        ('{"image": "a.jpg", "text": ["x"]}', "needs a text"),
        ('{"image": "a.jpg", "text": "x", "task": "dance"}', "task must be one of"),
        ('{"image": "a.jpg", "text": "x", "id": "../../up"}', "an id is letters"),
        ('{"image": "a.jpg", "text": "x", "id": ".."}', "an id is letters"),
        ('{"image": "a.jpg", "text": "x", "id": 1, "mask": 2}', "must be an object"),
        ("[" * 100_000, "is no JSON"),
        ("", "holds no requests"),
    ],
)
def test_hostile_lines(tmp_path, row, message):
    (tmp_path / "ask.jsonl").write_text(row + "\n")
    with pytest.raises(ValueError, match=message):
        read_requests(task="reason", image="", text="", input=str(tmp_path / "ask.jsonl"))


def test_what_the_flags_must_hold(pictures, tmp_path):
    for flags, message in (
        ({}, "give either --input"),
        ({"text": "x"}, "is about a picture: give --image"),
        ({"image": str(pictures)}, "needs a text"),
        ({"image": str(tmp_path / "nowhere"), "text": "x"}, "no such file or folder"),
        ({"image": "a", "text": "x", "input": "b"}, "give either --input"),
        ({"input": str(tmp_path / "nowhere")}, "cannot be read"),
    ):
        with pytest.raises(ValueError, match=message):
            read_requests(**{"task": "reason", "image": "", "text": "", "input": ""} | flags)
    (tmp_path / "twice.jsonl").write_text('{"id": "a", "image": "x", "text": "y"}\n' * 2)
    with pytest.raises(ValueError, match="two requests have the id 'a'"):
        read_requests(task="reason", image="", text="", input=str(tmp_path / "twice.jsonl"))


def test_the_command_as_it_is_typed(checkpoint, pictures, tmp_path, run_python):
    script = REPO / "pipeline/infer.py"
    asked = ("--task", "reason", "--image", pictures / "scene 1.jpg", "--text", "Which object is highest?")
    flags = ("--checkpoint", checkpoint.parent, "--out", tmp_path / "out", "--max_new_tokens", "6")
    done = run_python(script, *asked, *flags)
    assert done.returncode == 0, done.stderr
    assert "1 of 1 answered" in done.stdout and "Working with z" not in done.stdout
    (found,) = lines(tmp_path / "out" / "answers.jsonl")
    assert found["id"] == "scene_1.jpg" and found["task"] == "reasoning"
    wrong = run_python(script, *asked, "--checkpoint", tmp_path / "nowhere")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("infer.py: error: --checkpoint") and len(wrong.stderr.splitlines()) == 1
