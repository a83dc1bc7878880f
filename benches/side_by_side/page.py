"""The README's page of what was measured: a table in Markdown on standard output, and a drawing of the rates.

    page.py FILE.json FILE.svg

Bars are medians, the line at the end of each goes from the smallest to the largest value; each case has a scale of its own.
"""

import json
import statistics
import sys
from pathlib import Path

from runs import HERE

sys.path.insert(0, str(HERE.parent))
from plot import text  # noqa: E402

# Cases in which sides do the same work.
DRAWN = ["photographs", "cells", "one_layer"]
WIDTH, LEFT, RIGHT, TOP = 760, 230, 110, 20
BAR, GAP = 18, 8
OURS, THEIRS = "#1f5fa8", "#9a9a9a"


def table(found: dict) -> str:
    machine = found["machine"]
    lines = [f"{machine['cpu']}, {machine['cores']} cores, {found['date'][:10]}; median of the pairs, from the smallest to the largest.", ""]
    lines += ["| | | median | from | to | wanted |", "|---|---|---|---|---|---|"]
    for name, case in found["cases"].items():
        if "failed" in case:
            lines.append(f"| {name} | failed | | | | |")
        for what, result in case["results"].items():
            wanted = "".join(f"{sign} {result[key]}" for key, sign in (("at_least", "≥"), ("at_most", "≤")) if result[key] is not None)
            figures = [f"{figure:.3g}" for figure in (result["median"], min(result["values"]), max(result["values"]))]
            lines.append(f"| {name} | {what} | {' | '.join(figures)} | {wanted} |")
    return "\n".join(lines)


def drawing(found: dict) -> str:
    y, out = TOP, []
    for name in DRAWN:
        case = found["cases"].get(name, {"failed": "not run"})
        if "failed" in case:
            continue
        out.append(text(16, y + BAR, case["title"], size=14))
        y += BAR + 2 * GAP
        rates = {side: [run["rate"] for run in runs] for side, runs in case["runs"].items()}
        scale = (WIDTH - LEFT - RIGHT) / max(max(values) for values in rates.values())
        for side, values in rates.items():
            median, least, most = statistics.median(values), min(values), max(values)
            middle = y + BAR / 2
            out.append(text(LEFT - 8, y + BAR - 4, side, anchor="end"))
            color = OURS if side.startswith("lookalike") else THEIRS
            out.append(f'<rect x="{LEFT}" y="{y}" width="{median * scale:.1f}" height="{BAR}" fill="{color}"/>')
            ends = f'x1="{LEFT + least * scale:.1f}" x2="{LEFT + most * scale:.1f}"'
            out.append(f'<line {ends} y1="{middle}" y2="{middle}" stroke="#222" stroke-width="2"/>')
            out.append(text(LEFT + most * scale + 8, y + BAR - 4, f"{median:.0f} images/s"))
            y += BAR + GAP
        y += 2 * GAP
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" font-family="sans-serif" font-size="13">'
    return "\n".join([head, f'<rect width="{WIDTH}" height="{y}" fill="#fff"/>', *out, "</svg>"]) + "\n"


def main(file: Path, svg: Path) -> None:
    found = json.loads(file.read_text())
    print(table(found))
    svg.write_text(drawing(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
