"""Takes the README's pictures of the report of pipelines/parts.

    screenshots.py PROGRAM BROWSER

The first day is what is normal; the days are run one after the other, as a schedule would, and the report is of the last. PNGs go beside
this file, in 128 colors, which keeps them small.
"""

import io
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
WORK = ROOT / ".cache/parts"
ARGUMENTS = ["--no-sandbox", "--disable-gpu"]
DAYS = ["2026-11-01", "2026-11-02", "2026-11-03"]
WIDE = {"width": 1200, "height": 780}


def run(program: str, *arguments: str) -> None:
    subprocess.run([program, *arguments], check=True, cwd=ROOT)


def keep(name: str, picture: bytes) -> None:
    Image.open(io.BytesIO(picture)).convert("RGB").quantize(128).save(HERE / f"{name}.png", optimize=True)


def main(program: str, browser: str) -> None:
    shutil.rmtree(WORK, ignore_errors=True)
    subprocess.run([sys.executable, HERE / "parts_table.py", WORK / "images"], check=True)
    pipeline = "pipelines/parts/parts.toml"
    run(program, "fit", pipeline, "--latent-dim", "48", "--height", "64", "--width", "64", "--where", "ds = '2026-11-01' AND line = 'A'")
    run(program, "calibrate", pipeline, "--where", "ds = '2026-11-01' AND line = 'B'")
    for day in DAYS:
        run(program, "run", pipeline, "--partition", f"ds={day}", "--quiet")
    run(program, "report", pipeline, "--partition", f"ds={DAYS[-1]}")
    report = WORK / "tables/reports/parts.html"
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=ARGUMENTS)
        page = chromium.new_page(viewport=WIDE, color_scheme="light", reduced_motion="reduce")
        page.goto(report.as_uri())
        page.wait_for_selector("html[data-ready]", state="attached")
        keep("report", page.screenshot())
        # The bar stays at the top of the window, in the middle of a picture that is taller.
        page.add_style_tag(content="#bar { position: static !important }")
        part = page.locator("#map")
        part.scroll_into_view_if_needed()
        part.locator("canvas").first.wait_for()
        part.locator("select").first.select_option(label="kind")
        part.locator(".chart").first.focus()
        page.keyboard.press("Home")
        page.wait_for_timeout(500)
        keep("report-map", part.screenshot())
        chromium.close()


main(*sys.argv[1:])
