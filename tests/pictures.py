"""The pictures of README.md, taken of a workbench after `cvops demo`: `python tests/pictures.py WORKBENCH [FOLDER]`.

Every page is opened in headless Chromium; a request that leaves the machine, or an error on a page, ends it with status 1."""
import io
import os
import sys
from pathlib import Path

from PIL import Image

REPO = Path(__file__).parents[1]


def shrink(shot: bytes, path: Path, width: int = 1000, colours: int = 128) -> None:
    "A screenshot as a small PNG."
    image = Image.open(io.BytesIO(shot)).convert("RGB")
    image = image.resize((width, round(image.height*width/image.width)), Image.Resampling.LANCZOS) if image.width > width else image
    image.quantize(colours, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path.stat().st_size//1024:5} kB  {path.name}")


class Camera:
    "A browser that writes down what it sees and what it asks for."

    def __init__(self, browser, folder: Path):
        self.browser, self.folder, self.outside, self.errors = browser, folder, [], []

    def open(self, address: str, width: int = 1100, height: int = 800, dark: bool = False, wait: str = "", ours: bool = True):
        "A page, loaded."
        page = self.browser.new_context(viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light").new_page()
        near = ("http://127.0.0.1", "ws://127.0.0.1", "data:", "blob:", "file:", "about:")
        page.on("response", lambda r: self.outside.append(r.url) if not r.url.startswith(near) else None)     # what a page's policy blocks gets none
        if ours: page.on("pageerror", lambda e: self.errors.append(f"{address}: {e}"))
        page.goto(address, wait_until="load", timeout=90_000)
        if wait: page.wait_for_selector(wait, timeout=90_000)
        page.wait_for_timeout(1500)
        return page

    def take(self, page, name: str, full: bool = False, **options) -> None:
        "One picture."
        shrink(page.screenshot(full_page=full), self.folder/f"{name}.png", **options)


def take_all(camera: Camera, root: Path) -> None:
    "Service, dashboard, App and report pages."
    from cvops_wb.core.settings import load_settings
    from cvops_wb.data.views import serving_app
    from cvops_wb.loop import find_run
    from cvops_wb.serve import service_running
    from cvops_wb.watch import dashboard_running
    settings = load_settings(root)
    photo = sorted((root/".cvops/cache/synth").glob("traffic-*/*.jpg"))[3]
    with service_running(find_run(settings, "bento").record, log=settings.cache/"pictures") as service:
        page = camera.open(service.url)
        page.set_input_files("input[type=file]", photo)
        page.wait_for_timeout(1500)
        camera.take(page, "service", colours=200)
        camera.take(camera.open(f"{service.url}/docs", height=1000), "docs")
    with dashboard_running(settings=settings) as (address, _):
        camera.take(camera.open(address, 1300, 1080, wait=".wb h1"), "dashboard", colours=200)
        camera.take(camera.open(address, 390, 844, dark=True, wait=".wb h1"), "dashboard-phone", width=390)
    with serving_app(find_run(settings, "view").record) as address:
        page = camera.open(address, 1300, 860, ours=False)     # it asks for news of itself, which its policy here forbids
        page.wait_for_timeout(6000)
        if page.get_by_text("Dismiss").count(): page.get_by_text("Dismiss").first.click()
        page.wait_for_timeout(3000)
        camera.take(page, "app", colours=200)
    for stage, file in (("ingest", "notebook"), ("evaluate", "notebook"), ("monitor", "notebook"), ("monitor", "evidently")):
        run = find_run(settings, {"ingest": "batch", "evaluate": "evaluation", "monitor": "window"}[stage])
        page = camera.open((settings.reports/run.run/f"{file}.html").as_uri(), 1000, 900)
        page.wait_for_timeout(2500)
        camera.take(page, f"{stage}-{file}", full=file == "notebook", width=800)


def main(root: Path, folder: Path) -> int:
    "0 if nothing left the machine and no page failed."
    from playwright.sync_api import sync_playwright
    os.environ["CVOPS_ROOT"] = str(root)
    os.chdir(root)
    folder.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"])
        camera = Camera(browser, folder)
        try: take_all(camera, root)
        finally: browser.close()
    for what, found in (("left the machine", camera.outside), ("failed", camera.errors)):
        for line in found: print(f"{what}: {line}", file=sys.stderr)
    return int(bool(camera.outside or camera.errors))


if __name__ == "__main__": sys.exit(main(Path(sys.argv[1]).resolve(), Path(sys.argv[2] if len(sys.argv) > 2 else REPO/"nbs"/"images").resolve()))
