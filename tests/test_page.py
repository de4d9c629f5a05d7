"""The web page: what it takes and refuses, what its server gives away, and a person's visit in a real browser.

The browser has no window; the visit is skipped where there is none. SCREENSHOT_DIR keeps what it saw.
"""

import io
import json
import os
import shutil
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest

pytest.importorskip("gradio", reason="the page needs gradio: pip install -e .[demo]")
pytest.importorskip("selenium", reason="the page's visit needs selenium: pip install -e .[dev]")

from mini_answers import mini_checkpoint, saying, scene
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from pipeline.config import DemoArguments
from pipeline.inference import NeuralTuner, page_html
from pipeline.inference.page import Page
from pipeline.inference.results import Answer, SegmentedObject
from pipeline.inference.session import Session
from pipeline.inference.uploads import read_upload
from pipeline.runtime.ranks import free_port

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
DRIVER = shutil.which("chromedriver")
LIMITS = {"max_megapixels": 2, "max_bytes": 1 << 20}
PATIENCE = 120
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1280,1300",
]


def file_of(image: Image.Image, path: Path, **options) -> Path:
    image.save(path, **options)
    return path


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page's address; its model says what `mini_answers.ANSWERS` holds."""
    folder = tmp_path_factory.mktemp("page")
    examples = []
    for i, question in enumerate(("Which object is highest?", "How many circles are there?")):
        path = folder / f"scene-{i}.jpg"
        path.write_bytes(scene(i))
        examples.append((str(path), question, "the red circle"))
    model = NeuralTuner.from_pretrained(mini_checkpoint(folder / "run"))
    page = Page(
        Session(model), name="test", examples=examples, descriptions=["a red circle"], max_new_tokens=20, **LIMITS
    )
    with saying(model):
        try:
            yield page.serve("127.0.0.1", free_port()).rstrip("/")
        finally:
            page.close()


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


# A visit.


class Visitor:
    """A person at the page, in a browser without a window."""

    def __init__(self, address: str, folder: Path) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = BROWSER
        for flag in (*FLAGS, f"--user-data-dir={folder / 'profile'}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        self.driver.get(address)
        self.folder = Path(os.environ.get("SCREENSHOT_DIR", folder))
        self.folder.mkdir(parents=True, exist_ok=True)
        self.wait(lambda: self.all("#reason-go"))

    def all(self, selector: str) -> list:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def wait(self, until):
        return WebDriverWait(self.driver, PATIENCE, ignored_exceptions=[Exception]).until(lambda _: until())

    def open_tab(self, title: str, task: str) -> None:
        next(tab for tab in self.all("button[role=tab]") if tab.text == title).click()
        self.wait(lambda: self.all(f"#{task}-go")[0].is_displayed())

    def example(self, task: str, place: int) -> None:
        selector = f"#{task}-examples tbody tr, #{task}-examples .gallery-item"
        self.wait(lambda: len(self.all(selector)) > place and self.all(selector)[place].is_displayed())
        self.all(selector)[place].click()
        if task != "draw":
            self.wait(lambda: self.all(f"#{task}-picture img"))

    def text(self, task: str) -> str:
        return self.all(f"#{task}-words")[0].text

    def go(self, task: str, until: str) -> None:
        self.all(f"#{task}-go")[0].click()
        self.wait(lambda: until in self.text(task) and not self.all(f"#{task}-words .nt-caret"))

    def light(self, task: str) -> list[float]:
        """How bright each mask is, once it has stopped changing."""

        def now() -> list[float]:
            return [float(mask.value_of_css_property("opacity")) for mask in self.all(f"#{task}-answer .nt-mask")]

        def steady() -> list[float] | None:
            before = now()
            time.sleep(0.3)
            return before if before == now() else None

        return self.wait(steady)

    def away(self) -> None:
        ActionChains(self.driver).move_to_element(self.all("h1")[0]).perform()

    def keep(self, name: str) -> None:
        self.driver.save_screenshot(str(self.folder / f"{name}.png"))

    def hosts(self) -> set[str]:
        """Every server that the page asked for anything."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return {urlsplit(url).netloc for url in urls if url.startswith(("http", "ws"))}


@pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="no chromium with its driver: apt install chromium chromium-driver"
)
def test_a_visit_to_every_tab(page, tmp_path):
    visitor = Visitor(page, tmp_path)
    try:
        # Reason: an example, the answer, and masks that follow the words.
        visitor.example("reason", 0)
        visitor.wait(
            lambda: visitor.all("#reason-text textarea")[0].get_attribute("value") == "Which object is highest?"
        )
        visitor.all("#reason-answer")[0].find_element(By.XPATH, ".//*[contains(text(), 'comes here')]")
        # An untrained model is sure of nothing.
        visitor.all("#reason-go")[0].click()
        visitor.wait(lambda: "No such object: the model is not sure enough" in visitor.text("reason"))
        visitor.all("#reason-options button")[0].click()
        least = visitor.wait(lambda: visitor.all("#reason-least input[type=number]"))[0]
        visitor.wait(least.is_displayed)
        visitor.driver.execute_script(
            "arguments[0].value = 0; arguments[0].dispatchEvent(new Event('input', {bubbles: true}));"
            "arguments[0].dispatchEvent(new Event('change', {bubbles: true}));"
            "arguments[0].dispatchEvent(new Event('blur', {bubbles: true}));",
            least,
        )
        visitor.go("reason", "the large red circle")
        phrases = visitor.wait(lambda: visitor.all("#reason-words .nt-phrase"))
        assert [phrase.text for phrase in phrases] == ["the large red circle", "a small star"]
        visitor.away()
        assert visitor.light("reason") == [1, 1]
        ActionChains(visitor.driver).move_to_element(phrases[0]).perform()
        lit = visitor.light("reason")
        assert lit[0] == 1 and lit[1] < 0.1, "pointing at a phrase lights its mask alone"
        phrases[1].click()
        visitor.away()
        lit = visitor.light("reason")
        assert lit[1] == 1 and lit[0] < 0.1, "a click keeps it lit"
        visitor.keep("reason")
        phrases[1].click()
        visitor.away()
        assert visitor.light("reason") == [1, 1]
        visitor.all("#reason-neurons button")[0].click()
        strips = visitor.wait(lambda: [s for s in visitor.all("#reason-neurons .nt-neurons") if s.is_displayed()])
        assert len(strips) == 4
        assert visitor.wait(lambda: visitor.all("#reason-download")[0].is_displayed())

        # Segment, with a picture of one's own, turned by its EXIF, and errors.
        visitor.open_tab("Segment", "segment")
        visitor.all("#segment-go")[0].click()
        visitor.wait(lambda: "no picture yet" in visitor.text("segment"))
        exif = Image.Exif()
        exif[0x0112] = 6
        file_of(Image.open(io.BytesIO(scene(2))).crop((0, 0, 128, 64)), tmp_path / "turned.jpg", exif=exif)
        (tmp_path / "text.png").write_text("no picture")
        file_of(Image.new("RGB", (2000, 2000)), tmp_path / "large.png")
        chooser = "#segment-picture input[type=file]"
        for name, message in (
            ("text.png", "no readable JPEG or PNG"),
            ("large.png", "2000 x 2000 pixels, more than the 2 million"),
            ("turned.jpg", "There is no text"),
        ):
            if clear := visitor.all("#segment-picture button[aria-label=Clear], #segment-picture button[title=Clear]"):
                clear[0].click()
            visitor.wait(lambda: visitor.all(chooser))[0].send_keys(str(tmp_path / name))
            # The preview has its address once the server has the file.
            visitor.wait(lambda name=name: visitor.all(f"#segment-picture img[src*='{name}']"))
            visitor.go("segment", message)
            assert visitor.all("#segment-words [role=alert]") and not visitor.all("#segment-answer .nt-mask")
        visitor.keep("error")
        visitor.all("#segment-text textarea")[0].send_keys("the red circle")
        visitor.go("segment", "No such object")
        base = visitor.all("#segment-answer .nt-base")[0]
        assert base.size["height"] > base.size["width"], "the picture stands upright"

        # Caption and Draw.
        visitor.open_tab("Caption", "caption")
        visitor.example("caption", 1)
        visitor.go("caption", "a red circle.")
        assert not visitor.all("#caption-words .nt-none")
        visitor.open_tab("Draw", "draw")
        visitor.all("#draw-go")[0].click()
        visitor.wait(lambda: "There is no text" in visitor.text("draw"))
        visitor.example("draw", 0)
        visitor.wait(lambda: visitor.all("#draw-text textarea")[0].get_attribute("value") == "a red circle")
        visitor.all("#draw-go")[0].click()
        visitor.wait(
            lambda: len(visitor.all("#draw-answer .grid-container img, #draw-answer .thumbnail-item img")) >= 2
        )
        visitor.keep("draw")

        assert visitor.hosts() == {urlsplit(page).netloc}, "nothing is fetched from elsewhere"
        severe = [entry["message"] for entry in visitor.driver.get_log("browser") if entry["level"] == "SEVERE"]
        assert not severe, severe
    except Exception:
        visitor.keep("failed")
        raise
    finally:
        visitor.driver.quit()
