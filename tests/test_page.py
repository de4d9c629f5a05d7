"""The web page: what it takes and refuses, and what its server gives away. A person's visit: test_page_visit.py."""

import json
import os
import urllib.error
import urllib.request
import uuid
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("gradio", reason="the page needs gradio: pip install -e .[demo]")

from mini_answers import scene
from mini_page import LIMITS, file_of, serving
from PIL import Image

from pipeline.config import DemoArguments
from pipeline.inference import page_html
from pipeline.inference.results import Answer, SegmentedObject
from pipeline.inference.uploads import read_upload

PATIENCE = 120


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page's address."""
    with serving(tmp_path_factory.mktemp("page")) as address:
        yield address


# What an upload becomes.


def test_uploads_that_are_pictures(tmp_path):
    wide = Image.fromarray(np.arange(40 * 60 * 3, dtype=np.uint8).reshape(40, 60, 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    half = wide.convert("RGBA")
    half.putalpha(0)
    for made, size in (
        (file_of(wide.convert("CMYK"), tmp_path / "cmyk.jpg"), (40, 60)),
        (file_of(wide, tmp_path / "turned.jpg", exif=exif), (60, 40)),
        (file_of(half, tmp_path / "alpha.png"), (40, 60)),
        (file_of(wide.convert("P"), tmp_path / "palette.png"), (40, 60)),
    ):
        upload = read_upload(made, **LIMITS)
        assert upload.size == size == upload.shown.size[::-1] and upload.shown.mode == "RGB"
    assert np.asarray(read_upload(tmp_path / "alpha.png", **LIMITS).shown).min() == 255, "clear is white"
    large = file_of(Image.new("RGB", (1900, 1000)), tmp_path / "large.png")
    assert read_upload(large, **LIMITS).shown.size == (1024, 539)
    assert read_upload(large, **LIMITS).size == (1000, 1900)


def test_uploads_that_are_refused(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (700, 700, 3), dtype=np.uint8))
    (tmp_path / "text.png").write_text("no picture")
    for made, message in (
        (None, "no picture yet"),
        (tmp_path / "text.png", "no readable JPEG or PNG"),
        (file_of(Image.new("RGB", (9000, 5600)), tmp_path / "50mp.png"), "9000 x 5600 pixels, more than the 2 million"),
        (file_of(frames[0], tmp_path / "moves.png", save_all=True, append_images=frames[1:]), "an animation"),
        (file_of(frames[0], tmp_path / "moves.gif", save_all=True, append_images=frames[1:]), "no readable JPEG"),
        (file_of(frames[0], tmp_path / "picture.webp"), "no readable JPEG or PNG"),
        (file_of(noise, tmp_path / "noise.png"), "larger than 1 MB"),
    ):
        with pytest.raises(ValueError, match=message):
            read_upload(made, **LIMITS)


def test_what_is_written_on_the_page_is_text():
    evil = '<script>alert(1)</script>" onerror="x'
    thing = SegmentedObject(
        number=1, phrase=evil, span=(0, len(evil)), mask=np.ones((4, 4), bool), box=(0, 0, 4, 4), score=0.5
    )
    answer = Answer(task="reasoning", question=evil, text=evil, tagged=evil, size=(4, 4), objects=[thing])
    written = (page_html.answer_html(answer), page_html.error_html(evil), page_html.writing_html(evil))
    for text in written:
        assert "<script" not in text and 'onerror="' not in text and "&lt;script" in text


def test_the_page_is_this_machines_own_unless_asked():
    assert DemoArguments().host == "127.0.0.1"
    with pytest.raises(ValueError, match="max_upload_mb must be at least 1"):
        DemoArguments(max_upload_mb=0)


def test_without_a_checkpoint_the_command_says_how_to_make_one(run_python, repo, tmp_path):
    done = run_python(repo / "pipeline/demo.py", "--checkpoint", tmp_path / "nowhere")
    assert done.returncode == 2
    assert "there is no whole checkpoint; `make quickstart`" in done.stderr and len(done.stderr.splitlines()) == 1


# What the server gives away.


def fetch(url: str, data: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=PATIENCE) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "../../../../etc/passwd",
        "..%2f..%2f..%2fetc%2fpasswd",
        "%2e%2e/%2e%2e/etc/passwd",
        "{repo}/README.md",
        "{repo}/models/mini/llm/config.json",
        "{temp}/../../etc/passwd",
        "file:///etc/passwd",
        "http://127.0.0.1:1/",
    ],
)
def test_no_file_of_another_folder_is_served(page, repo, path):
    path = path.format(repo=repo, temp=os.environ["GRADIO_TEMP_DIR"])
    for route in ("/gradio_api/file=", "/file=", "/gradio_api/file/", "/static/", "/assets/"):
        status, body = fetch(page + route + path)
        assert status >= 400 or b"<html" in body[:2000].lower() or b"<!doctype" in body[:2000].lower(), (route, status)
        assert b"root:x:" not in body and b"Neural Tuning (Sun et al." not in body and b"hidden_size" not in body


def upload(page: str, name: str, data: bytes) -> tuple[int, bytes]:
    mark = uuid.uuid4().hex
    head = f'--{mark}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
    body = head + data + f"\r\n--{mark}--\r\n".encode()
    return fetch(f"{page}/gradio_api/upload", body, **{"Content-Type": f"multipart/form-data; boundary={mark}"})


def ask(page: str, data: list) -> str:
    """What the first tab's button sends, and every line the server answers with."""
    session = uuid.uuid4().hex
    config = json.loads(fetch(f"{page}/config")[1])
    button = next(c["id"] for c in config["components"] if c["props"].get("elem_id") == "reason-go")
    index = next(d["id"] for d in config["dependencies"] if [button, "click"] in [list(t) for t in d["targets"]])
    join = json.dumps({"data": data, "fn_index": index, "session_hash": session, "trigger_id": button}).encode()
    status, body = fetch(f"{page}/gradio_api/queue/join", join, **{"Content-Type": "application/json"})
    if status >= 400:
        return body.decode()
    return fetch(f"{page}/gradio_api/queue/data?session_hash={session}")[1].decode()


def test_names_of_uploads_lead_nowhere(page):
    for name in (
        "../../../../tmp/nt-escaped.png",
        "/tmp/nt-escaped.png",
        "..\\\\nt-escaped.png",
        "a\0b.png",
        "x" * 900,
    ):
        status, body = upload(page, name, scene(0))
        if status < 400:
            (path,) = json.loads(body)
            assert Path(path).resolve().is_relative_to(Path(os.environ["GRADIO_TEMP_DIR"]).resolve())
    assert not Path("/tmp/nt-escaped.png").exists()
    status, _ = upload(page, "large.png", bytes(LIMITS["max_bytes"] + 1_000_000))
    assert status == 413, "more than the limit is not taken"


def test_only_uploaded_files_are_read(page, repo):
    kind = {"meta": {"_type": "gradio.FileData"}, "orig_name": "a.png"}
    for path in ("/etc/passwd", str(repo / "docs/results/mini/contact_sheet.png"), "../../etc/passwd"):
        said = ask(page, [{"path": path, **kind}, "Which object is highest?", 0.0, 0, 0])
        assert "nt-base" not in said and "root:x:" not in said, "a file that was never uploaded is not shown"
    for odd in ("text", 7, {"path": 3}, {"url": "http://127.0.0.1:1/x.png", "path": None}, [], {"path": "x" * 10_000}):
        assert "nt-base" not in ask(page, [odd, "Which object is highest?", 0.0, 0, 0])
    (path,) = json.loads(upload(page, "scene.jpg", scene(0))[1])
    picture = {"path": path, **kind}
    for text, heat in (
        ("why " * 2_500, 0),
        (["a"], 0),
        ({"a": 1}, 0),
        (None, 0),
        ("x", "hot"),
        ("x", -3),
        ("x", 1e308),
    ):
        assert "Traceback" not in ask(page, [picture, text, 0.0, heat, 0])
    assert "the large red circle" in ask(page, [picture, "Which object is highest?", 0.0, 0, 0]), "it still answers"
