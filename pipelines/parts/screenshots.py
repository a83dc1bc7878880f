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
from playwright.sync_api import Page, sync_playwright

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
WORK = ROOT / ".cache/parts"
ARGUMENTS = ["--no-sandbox", "--disable-gpu"]
WIDE = {"width": 1200, "height": 780}


def run(program: str, *arguments: str) -> None:
    subprocess.run([program, *arguments], check=True, cwd=ROOT)


def shot(page: Page, name: str, **options: object) -> None:
    picture = Image.open(io.BytesIO(page.screenshot(**options)))
    picture.convert("RGB").quantize(128).save(HERE / f"{name}.png", optimize=True)


def main(program: str, browser: str) -> None:
    shutil.rmtree(WORK, ignore_errors=True)
    subprocess.run([sys.executable, HERE / "parts_table.py", WORK / "images"], check=True)
    pipeline = "pipelines/parts/parts.toml"
    run(program, "fit", pipeline, "--latent-dim", "24", "--height", "64", "--width", "64", "--where", "ds = '2026-11-01' AND line = 'A'")
    run(program, "calibrate", pipeline, "--where", "ds = '2026-11-01' AND line = 'B'")
    for day in ("2026-11-01", "2026-11-02", "2026-11-03"):
        run(program, "run", pipeline, "--partition", f"ds={day}", "--quiet")
    run(program, "report", pipeline, "--partition", "ds=2026-11-03")
    report = WORK / "tables/reports/parts.html"
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=ARGUMENTS)
        page = chromium.new_page(viewport=WIDE, color_scheme="light", reduced_motion="reduce")
        page.goto(report.as_uri())
        page.wait_for_selector("html[data-ready]", state="attached")
        shot(page, "report")
        for section in ("groups", "scores", "map", "drift"):
            part = page.locator(f"#{section}")
            part.scroll_into_view_if_needed()
            if part.locator(".chart").count():
                part.locator("canvas").first.wait_for()
            if section == "map":
                part.locator("select").first.select_option(label="kind")
                part.locator(".chart").first.focus()
                page.keyboard.press("Home")
            page.wait_for_timeout(500)
            picture = Image.open(io.BytesIO(part.screenshot()))
            picture.convert("RGB").quantize(128).save(HERE / f"report-{section}.png", optimize=True)
        chromium.close()


main(*sys.argv[1:])
