"""Loading gates, one message each; export and loading back; hostile texts and pictures at the API's door."""

import io
import json
import shutil
import struct
import subprocess
import zlib
from pathlib import Path

import pytest
import torch
from mini_answers import digest, mini_checkpoint, scene
from PIL import Image
from safetensors.torch import load_file, save_file

from pipeline.config import REPO
from pipeline.inference import NeuralTuner
from pipeline.inference.export import save_pretrained
from pipeline.runtime.checkpoint import EXPORTED_STATE, MANIFEST, STATE, WEIGHTS, seal

MINI = REPO / "models" / "mini"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return mini_checkpoint(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def model(checkpoint):
    return NeuralTuner.from_pretrained(checkpoint)


@pytest.fixture
def broken(checkpoint, tmp_path):
    """A copy of the checkpoint to be damaged."""
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoint-3"))


def reseal(folder: Path) -> None:
    """A manifest that vouches for the files as they are now."""
    (folder / MANIFEST).unlink()
    part = folder.with_name(folder.name + ".tmp")
    folder.rename(part)
    seal(part, folder, 3)


def refuses(message: str, *args, **options) -> None:
    """from_pretrained raises one line that holds `message`."""
    with pytest.raises(ValueError, match=message) as caught:
        NeuralTuner.from_pretrained(*args, **options)
    assert len(str(caught.value).splitlines()) == 1


def test_a_missing_or_wrong_base_is_refused(checkpoint, tmp_path):
    refuses("is no folder of a Hugging Face model", checkpoint, base=str(tmp_path / "nowhere"))
    other = Path(shutil.copytree(MINI / "llm", tmp_path / "llm"))
    weights = load_file(other / "model.safetensors")
    name = sorted(weights)[0]
    save_file(weights | {name: weights[name] + 1}, other / "model.safetensors", metadata={"format": "pt"})
    refuses("is not the model that .* was tuned on", checkpoint, base=str(other))


def test_another_clip_is_refused(checkpoint, tmp_path):
    other = Path(shutil.copytree(MINI / "clip", tmp_path / "clip"))
    with (other / "open_clip_model.safetensors").open("r+b") as file:
        file.seek(-4, io.SEEK_END)
        file.write(b"\0\0\0\1")
    refuses("is not the CLIP that .* was tuned with", checkpoint, clip=f"local-dir:{other}")
    refuses("there are no CLIP weights", checkpoint, clip=f"local-dir:{tmp_path / 'nowhere'}")


def test_no_checkpoint_and_damaged_ones_are_refused(broken, tmp_path):
    refuses("there is no whole checkpoint", tmp_path / "nowhere")
    weights = broken / WEIGHTS
    data = weights.read_bytes()
    weights.write_bytes(data[:-100])
    refuses("is no whole checkpoint: trained.safetensors has .* bytes instead of", broken)
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    refuses("another sha256", broken)
    # A manifest that vouches for a cut file.
    weights.write_bytes(data[:-100])
    reseal(broken)
    refuses("its weights cannot be read", broken)
    (broken / STATE).write_text("{")
    refuses("cannot be read", broken)


def test_a_checkpoint_of_another_mechanism_is_refused(broken):
    refuses("was tuned with --mechanism paper, not released", broken, mechanism="released")
    state = json.loads((broken / STATE).read_text())
    state["config"]["ModelArguments"] |= {"mechanism": "released", "sparse_norm": True, "clip_head": "mlp"}
    (broken / STATE).write_text(json.dumps(state))
    reseal(broken)
    refuses("does not fit the model .missing: clip_head.* of another shape: ", broken)


def test_an_absent_decoder_is_told(broken):
    weights = load_file(broken / WEIGHTS)
    save_file({name: each for name, each in weights.items() if "mask_decoder" not in name}, broken / WEIGHTS)
    reseal(broken)
    refuses("does not fit the model .missing: mask_decoder", broken)


def test_without_a_picture_decoder_the_rest_works(broken):
    state = json.loads((broken / STATE).read_text())
    state["config"]["ModelArguments"] |= {"prior": "", "vqgan": ""}
    (broken / STATE).write_text(json.dumps(state))
    reseal(broken)
    model = NeuralTuner.from_pretrained(broken)
    assert model.caption(scene(0), max_new_tokens=3).task == "caption"
    with pytest.raises(ValueError, match=r"names no picture decoder: give prior= and vqgan="):
        model.generate("a red circle")


def test_an_export_answers_bit_by_bit_as_its_checkpoint_does_in_another_process(checkpoint, tmp_path, run_python):
    report = {"tuned": {"referring_miou": 0.5, "caption_cider": None}, "untuned": {"referring_miou": 0.25}}
    run = {"checkpoint": str(checkpoint), "split": "test", "protocol": "free-running", "commit": "abc"}
    (checkpoint.parent / "report.json").write_text(json.dumps(report | {"shuffled": {}, "run": run}))
    out = tmp_path / "published"
    done = run_python(REPO / "pipeline/export.py", "--checkpoint", checkpoint, "--out", out, "--license", "mit")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in out.iterdir()} == {"model.safetensors", "config.json", "README.md", MANIFEST}
    text = (out / EXPORTED_STATE).read_text()
    assert str(REPO) not in text and str(tmp_path) not in text, "an export holds no path of the machine that trained"
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n")
    assert json.loads(text)["base"]["fingerprint"] in card
    assert "| referring_miou | 0.5 | 0.25 |" in card and "caption_cider" not in card
    fresh = run_python(Path(__file__).parent / "mini_answers.py", out)
    assert fresh.returncode == 0, fresh.stderr
    assert fresh.stdout.strip() == digest(str(checkpoint))


def test_what_export_refuses(checkpoint, broken, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="exists and is no earlier export"):
        save_pretrained(checkpoint, mine)
    assert [path.name for path in mine.iterdir()] == ["thesis.tex"]
    (broken / WEIGHTS).write_bytes(b"")
    with pytest.raises(ValueError, match="no whole checkpoint"):
        save_pretrained(broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    out = save_pretrained(checkpoint, tmp_path / "out")
    assert save_pretrained(checkpoint, out) == out, "an earlier export is replaced"
    again = save_pretrained(out, tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(b"cut")
    refuses("is no whole checkpoint", out)


def test_an_export_of_another_preset_asks_for_its_base(broken, tmp_path):
    state = json.loads((broken / STATE).read_text())
    state["config"]["ModelArguments"] |= {"preset": "7b"}
    (broken / STATE).write_text(json.dumps(state))
    reseal(broken)
    out = save_pretrained(broken, tmp_path / "out")
    refuses("holds the tuned part alone: give --base", out)
    folders = {name: str(MINI / name) for name in ("prior", "vqgan")}
    model = NeuralTuner.from_pretrained(out, base=str(MINI / "llm"), clip=f"local-dir:{MINI / 'clip'}", **folders)
    assert torch.equal(
        load_file(out / "model.safetensors")["mask_decoder.norms.0.weight"], model.tuner.mask_decoder.norms[0].weight
    )


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "there is no text"),
        ("  \n", "there is no text"),
        ("why " * 2_500, "tokens long, .* fit: shorten it"),
        ("x" * 10_000_000, "characters, 20000 are allowed"),
        (7, "a text must be a str, not int"),
        (b"why", "a text must be a str, not bytes"),
    ],
)
def test_hostile_texts(model, text, message):
    for ask in (lambda: model.segment(scene(0), text), lambda: model.reason(scene(0), text)):
        with pytest.raises(ValueError, match=message):
            ask()
    with pytest.raises(ValueError, match=message):
        model.generate([text])


def test_a_text_of_tags_alone_is_no_text(model):
    with pytest.raises(ValueError, match="there is no text to answer"):
        model.reason(scene(0), "<image> <OBJ-1>")


@pytest.mark.parametrize(
    "text", ["Where is <OBJ-999999>?", "a <ima<GEN>ge> b <image><image>", "<OB<GEN>J-77> ok", "\0\x1b[2J ok"]
)
def test_tags_in_a_text_are_no_tags(model, text):
    made, _ = model.loaded.collator.ask(["0"], "reasoning", [text], answer=8)
    slots = int((made.input_ids == model.token_map.image_id).sum())
    assert slots == 16, "the picture's own slots alone"
    assert not (made.input_ids[:, :] == model.token_map.gen_id).any()
    model.reason(scene(0), text, max_new_tokens=2)


def bomb() -> bytes:
    """A PNG of a few bytes that says it has 60,000 x 60,000 pixels."""
    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


@pytest.mark.parametrize(
    "picture, message",
    [
        (bomb(), "larger than the limit|above the limit"),
        (b"", "no readable JPEG or PNG"),
        (b"GIF89a" + bytes(100), "no readable JPEG or PNG"),
        (scene(0)[:300], "no readable JPEG or PNG"),
        (scene(0)[:900], "cut or damaged"),
        ("/etc/passwd", "no readable JPEG or PNG"),
        ("/no/such/file", "cannot be read"),
        (".", "cannot be read"),
        (None, "a picture is a path, bytes, a PIL image or an array"),
        (torch.zeros(3, 4, 4).numpy(), "an array must be uint8"),
    ],
)
def test_hostile_pictures(model, picture, message):
    with pytest.raises(ValueError, match=message):
        model.reason(picture, "Which object is highest?")


def test_lists_that_do_not_match(model):
    with pytest.raises(ValueError, match="2 pictures and 3 texts"):
        model.reason([scene(0), scene(1)], ["a", "b", "c"])
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        model.reason(scene(0), ["a", "b"], batch_size=0)
    assert model.reason([], []) == []


def test_large_pictures_have_large_masks(model):
    big = Image.new("RGB", (5000, 4000), "white")
    assert model.caption(big, max_new_tokens=2).size == (4000, 5000)


def test_inference_starts_without_deepspeed_and_mlflow(run_python):
    code = "import sys, pipeline.inference; print([m for m in ('deepspeed', 'mlflow', 'gradio') if m in sys.modules])"
    done: subprocess.CompletedProcess[str] = run_python("-c", code, cwd=REPO)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
