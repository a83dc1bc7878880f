"""Opens a report in a browser without network, looks at it in four ways, and clicks through it as a person would.

    report_opens.py REPORT.html OUT_DIR [--chromium PATH]

Screenshots and the printed page go to OUT_DIR. A report need not have every section: what it lacks is not looked at, and the JSON that
is printed at the end says what there was.
"""

import argparse
import json
import re
from pathlib import Path

from axe_playwright_python.sync_playwright import Axe
from check import check
from playwright.sync_api import Browser, Locator, Page, TimeoutError, sync_playwright

CHROMIUM = "/usr/bin/chromium"
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--no-first-run",
    "--disable-component-update",
    "--disable-sync",
]
WIDE = {"width": 1440, "height": 900}
NARROW = {"width": 390, "height": 844}

# In the page, before its own scripts: what its policy forbids is no error of the page, so it is collected here.
COLLECT_VIOLATIONS = """
    window.violations = [];
    document.addEventListener("securitypolicyviolation", (event) => violations.push(event.violatedDirective + " " + event.blockedURI));
"""
# Whether the data has a thumbnail of the point of an id, and what is drawn of it.
THUMBNAIL = """id => {
    const { map } = JSON.parse(document.getElementById("report").textContent);
    return map.sheet !== null && map.sheet_place[map.image_id.indexOf(id)] >= 0;
}"""
PIXELS = "canvas => [...canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data.filter((_, at) => at % 4 < 3)]"
# Where on a map a point is drawn in a color: below the legend, in a window whose pixels are those of CSS.
COLORED = """canvas => {
    const { data, width } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    const colored = (at) => Math.max(...data.slice(at, at + 3)) - Math.min(...data.slice(at, at + 3)) > 40;
    for (let at = 4 * width * 60; at < data.length; at += 4)
        if ([-2, -1, 0, 1, 2].every((by) => colored(at + 4 * by) && colored(at + 4 * by * width)))
            return [(at / 4) % width, Math.floor(at / 4 / width)];
    return null;
}"""
FIRST_PAINT = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? null"


def main(report: Path, out: Path, chromium: str) -> dict:
    out.mkdir(parents=True, exist_ok=True)
    seen: dict = {"axe": {}, "first_paint_ms": {}}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        for size in (WIDE, NARROW):
            for scheme in ("light", "dark"):
                look(browser, report, out, size, scheme, seen)
        page, problems = open_report(browser, report, WIDE, "light")
        seen |= click_through(page)
        print_report(page, out)
        check(not problems, f"while clicking: {problems}")
        browser.close()
    return seen


def open_report(browser: Browser, report: Path, size: dict, scheme: str) -> tuple[Page, list[str]]:
    """The report in a window of its own, and the list that collects what goes wrong in it."""
    context = browser.new_context(viewport=size, color_scheme=scheme, reduced_motion="reduce")
    context.set_offline(True)
    context.add_init_script(COLLECT_VIOLATIONS)
    page = context.new_page()
    problems: list[str] = []
    page.on("console", lambda message: message.type in ("error", "warning") and problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("dialog", lambda dialog: (problems.append(f"a dialog says {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda asked: asked.url.startswith(("file:", "data:")) or problems.append(f"request of {asked.url}"))
    page.goto(report.resolve().as_uri())
    try:
        page.wait_for_selector("html[data-ready]", state="attached", timeout=10_000)
    except TimeoutError:
        check(False, f"the page is not drawn: {problems}")
    return page, problems


def look(browser: Browser, report: Path, out: Path, size: dict, scheme: str, seen: dict) -> None:
    """No error, nothing cut off at the side, readable to all; with screenshots."""
    name = f"{size['width']}-{scheme}"
    page, problems = open_report(browser, report, size, scheme)
    seen["first_paint_ms"][name] = page.evaluate(FIRST_PAINT)
    page.screenshot(path=out / f"{name}.png")
    scroll_through(page)
    page.screenshot(path=out / f"{name}-full.png", full_page=True)
    width = page.evaluate("document.documentElement.scrollWidth")
    check(width <= size["width"], f"{name}: the page is {width} pixels wide")
    check(page.title() and page.inner_text("h1").strip(), f"{name}: no title")
    check(not page.locator("img[src='x'], main script, main iframe").count(), f"{name}: text of the data became HTML")
    check("[object " not in page.inner_text("body"), f"{name}: an element is shown as text")
    found = Axe().run(page).response["violations"]
    grave = [f"{one['id']}: {one['nodes'][0]['html'][:200]}" for one in found if one["impact"] in ("serious", "critical")]
    check(not grave, f"{name}: axe finds {grave}")
    seen["axe"][name] = len(found)
    check(not problems, f"{name}: {problems}")
    forbidden = page.evaluate("violations")
    check(not forbidden, f"{name}: the policy of the page forbids {forbidden}")
    page.context.close()


def scroll_through(page: Page) -> None:
    """Charts are drawn when they come into view."""
    for chart in page.locator(".chart").all():
        chart.scroll_into_view_if_needed()
        chart.locator("canvas").first.wait_for()
    page.evaluate("scrollTo(0, 0)")


def click_through(page: Page) -> dict:
    """What a person does with the page; says what there was."""
    scroll_through(page)
    seen = {
        "sections": page.locator("main > section").evaluate_all("all => all.map(({ id }) => id)"),
        "cards": page.locator(".card").count(),
        "groups": page.locator("#groups .panel").count(),
        "charts": page.locator(".chart").count(),
        "points": 0,
    }
    for section in seen["sections"]:
        check(page.locator(f"nav a[href='#{section}']").count() == 1, f"no link to {section}")
    if page.locator("#bar input[type=search]").count():
        filter_cards(page, seen["cards"])
    if page.locator(".card button").count():
        enlarge(page)
    if "map" in seen["sections"]:
        seen["points"] = explore_map(page)
    if seen["charts"]:
        first = page.locator(".chart").first
        light = drawn(first)
        page.emulate_media(color_scheme="dark")
        redrawn(first, "!==", light, "a chart does not follow the change to dark")
        page.emulate_media(color_scheme="light")
        redrawn(first, "===", light, "a chart does not follow the change to light")
    if "scores" in seen["sections"]:
        page.get_by_label("logarithmic").check()
        page.get_by_label("linear").check()
    for details in page.locator("details").all():
        details.locator("summary").click()
        details.locator("table").wait_for()
        details.locator("summary").click()
    return seen


def visible_cards(page: Page) -> int:
    return page.locator(".card:visible").count()


def filter_cards(page: Page, cards: int) -> None:
    search = page.locator("#bar input[type=search]")
    if cards:
        wanted = page.locator(".card h3").last.inner_text()
        search.fill(wanted)
        check(1 <= visible_cards(page) <= cards, f"{visible_cards(page)} of {cards} cards have {wanted}")
        check(page.locator(".card:visible h3", has_text=wanted).count() >= 1, f"{wanted} is not among those found")
    search.fill("no name is like this one")
    check(visible_cards(page) == 0, "cards are shown that the filter does not find")
    search.fill("")
    check(visible_cards(page) == cards, "an empty filter does not show all cards")
    only = page.get_by_label("flagged only")
    if only.count():
        only.check()
        flagged = page.locator(".card .badge.flagged").count()
        check(visible_cards(page) == flagged, f"flagged only: {visible_cards(page)} cards, {flagged} of them flagged")
        only.uncheck()
    sort = page.get_by_label("Sort")
    if sort.count():
        sort.select_option("by id")
        sort.select_option("strangest first")


def enlarge(page: Page) -> None:
    """With the keyboard alone: open a card, go to the next one, leave."""
    page.locator(".card button").first.focus()
    page.keyboard.press("Enter")
    heading = page.locator("dialog[open] h2")
    heading.wait_for()
    first = heading.inner_text()
    check(page.locator("dialog img").count() >= 1, "no picture in the dialog")
    if page.locator(".card button").count() > 1:
        page.keyboard.press("ArrowRight")
        check(heading.inner_text() != first, "the arrow does not go to the next image")
        page.keyboard.press("ArrowLeft")
        check(heading.inner_text() == first, "the arrow does not go back")
    page.keyboard.press("Escape")
    check(page.locator("dialog[open]").count() == 0, "Escape leaves the dialog open")
    check(page.evaluate("document.activeElement.matches('.card button')"), "the focus does not return to the card")


def explore_map(page: Page) -> int:
    """Points by key and by mouse, colors, zoom; the number of points."""
    box = page.locator("#map .chart")
    box.scroll_into_view_if_needed()
    box.focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowUp")
    tip = page.locator("#map .chart .tip:visible")
    tip.wait_for()
    check(tip.locator("b").inner_text().strip(), "the tooltip has no id")
    said = page.locator("#map [aria-live=polite]").inner_text()
    check(tip.locator("b").inner_text().strip() in said, f"'{said}' is announced beside another tooltip")
    page.keyboard.press("Home")
    shown = tip.locator("b").inner_text()
    wanted = page.evaluate(THUMBNAIL, shown)
    check(tip.locator("canvas").count() == int(wanted), f"the thumbnail of {shown} is {'missing' if wanted else 'of another'}")
    if wanted:
        check(len(set(tip.locator("canvas").evaluate(PIXELS))) > 1, f"the thumbnail of {shown} is empty")
    page.keyboard.press("Escape")
    tip.wait_for(state="detached")

    area = box.bounding_box()
    point = box.locator("canvas").first.evaluate(COLORED)
    if point:
        page.mouse.move(area["x"] + point[0], area["y"] + point[1])
        tip.wait_for()

    colors = page.get_by_label("Color by")
    for name in colors.locator("option").evaluate_all("all => all.map(({ value }) => value)"):
        before = drawn(box)
        if colors.input_value() != name:
            colors.select_option(name)
            redrawn(box, "!==", before, f"coloring by {name} changes nothing")
    colors.select_option(index=0)
    page.mouse.move(0, 0)

    whole = drawn(box)
    box.focus()
    page.mouse.move(area["x"] + area["width"] / 2, area["y"] + area["height"] / 2)
    page.mouse.wheel(0, -400)
    page.mouse.move(0, 0)
    box.evaluate("box => box.blur()")
    redrawn(box, "!==", whole, "the wheel does not zoom")
    page.get_by_role("button", name="Reset").click()
    page.mouse.move(0, 0)
    redrawn(box, "===", whole, "reset does not show the whole map again")
    status = page.locator("#map .controls [role=status]").inner_text()
    return int(re.search(r"([\d,]+) point", status)[1].replace(",", ""))


def drawn(box: Locator) -> str:
    """What a chart shows."""
    return box.locator("canvas").first.evaluate("canvas => canvas.toDataURL()")


def redrawn(box: Locator, relation: str, before: str, message: str) -> None:
    """A chart is drawn again with the next frame or a few later; `relation` is that to what it showed before."""
    condition = f"([canvas, before]) => canvas.toDataURL() {relation} before"
    try:
        canvas = box.locator("canvas").first.element_handle()
        box.page.wait_for_function(condition, arg=[canvas, before], timeout=5000)
    except TimeoutError:
        check(False, message)


def print_report(page: Page, out: Path) -> None:
    page.emulate_media(media="print", color_scheme="dark")
    check(page.evaluate("getComputedStyle(document.body).color") == "rgb(27, 27, 26)", "paper is not light")
    page.screenshot(path=out / "print.png", full_page=True)
    page.pdf(path=out / "print.pdf", format="A4", print_background=False)
    check((out / "print.pdf").stat().st_size > 10_000, "the printed page is empty")
    page.emulate_media(media="screen", color_scheme="light")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("report", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--chromium", default=CHROMIUM)
    asked = parser.parse_args()
    print(json.dumps(main(asked.report, asked.out, asked.chromium)), flush=True)
