"""A person's visit to every tab of the web page, in a real browser.

The browser is Debian's or Google's, without a window; the visit is skipped where there is none. SCREENSHOT_DIR keeps
what it saw.
"""

import io
import json
import os
import shutil
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest

pytest.importorskip("gradio", reason="the page needs gradio: pip install -e .[demo]")
pytest.importorskip("selenium", reason="the page's visit needs selenium: pip install -e .[dev]")

from mini_answers import scene
from mini_page import file_of, serving
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
DRIVER = shutil.which("chromedriver")
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
def test_a_visit_to_every_tab(tmp_path):
    with serving(tmp_path) as page:
        visit(page, tmp_path)


def visit(page: str, tmp_path: Path) -> None:
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
