"""Draws time per query against the number of rows, from what `neighbors.rs sizes` wrote.

    plot.py FILE.csv FILE.svg

Both axes are logarithmic. Nothing but Python is needed.
"""

import csv
import math
import sys
from pathlib import Path

WIDTH, HEIGHT = 760, 480
LEFT, RIGHT, TOP, BOTTOM = 84, 176, 48, 60
# Column, name, color (dark enough on white, and distinct without colors by their markers), marker.
SERIES = [
    ("exact_secs_per_query", "exact", "#b03060", "square"),
    ("ivf_secs_per_query", "by cells, in all", "#1f5fa8", "circle"),
    ("ivf_search_secs_per_query", "by cells, search", "#4f8f3a", "diamond"),
]
UNITS = [(1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns")]


def main(table: Path, drawing: Path) -> None:
    rows = list(csv.DictReader(table.open()))
    sizes = [int(row["num_rows"]) for row in rows]
    lines = {column: [float(row[column]) for row in rows] for column, *_ in SERIES}
    x_decades = (math.floor(math.log10(min(sizes))), math.ceil(math.log10(max(sizes))))
    every = [secs for line in lines.values() for secs in line]
    y_decades = (math.floor(math.log10(min(every))), math.ceil(math.log10(max(every))))

    def x(size: float) -> float:
        return LEFT + (math.log10(size) - x_decades[0]) / (x_decades[1] - x_decades[0]) * (WIDTH - LEFT - RIGHT)

    def y(secs: float) -> float:
        return HEIGHT - BOTTOM - (math.log10(secs) - y_decades[0]) / (y_decades[1] - y_decades[0]) * (HEIGHT - TOP - BOTTOM)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="14">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        text(LEFT, 26, "Time per query against the number of rows", size=17),
    ]
    for decade in range(x_decades[0], x_decades[1] + 1):
        at = x(10**decade)
        out.append(line(at, TOP, at, HEIGHT - BOTTOM))
        out.append(text(at, HEIGHT - BOTTOM + 20, f"{10**decade:,}", anchor="middle"))
    for decade in range(y_decades[0], y_decades[1] + 1):
        at = y(10.0**decade)
        out.append(line(LEFT, at, WIDTH - RIGHT, at))
        out.append(text(LEFT - 8, at + 5, duration(10.0**decade), anchor="end"))
    out.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 14, "rows", anchor="middle"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    out.append(text(20, middle, "time per query", anchor="middle", more=f' transform="rotate(-90 20 {middle})"'))
    # Names stand beside the last points, moved apart where those are close.
    label = math.inf
    for column, name, color, marker in sorted(SERIES, key=lambda series: -lines[series[0]][-1], reverse=True):
        points = [(x(size), y(secs)) for size, secs in zip(sizes, lines[column])]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
        out.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        out.extend(mark(marker, px, py, color) for px, py in points)
        label = min(points[-1][1], label - 20)
        out.append(text(points[-1][0] + 12, label + 5, name, color=color))
    out.append("</svg>")
    drawing.write_text("\n".join(out) + "\n")


def line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#ddd"/>'


def text(x: float, y: float, words: str, *, anchor: str = "start", size: int = 14, color: str = "#222", more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{color}"{more}>{words}</text>'


def mark(marker: str, x: float, y: float, color: str) -> str:
    if marker == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{color}"/>'
    turn = f' transform="rotate(45 {x:.1f} {y:.1f})"' if marker == "diamond" else ""
    return f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" fill="{color}"{turn}/>'


def duration(secs: float) -> str:
    unit, name = next((unit for unit in UNITS if secs >= unit[0] * 0.999), UNITS[-1])
    return f"{secs / unit:g} {name}"


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
