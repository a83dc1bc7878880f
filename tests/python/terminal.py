"""Proves that a run fits the terminal that it is shown on, and that what is shown elsewhere is plain text.

    terminal.py PROGRAM PIPELINE

PIPELINE is a pipeline file whose output does not exist; it is run several times, to other outputs beside that. Under a
pseudo-terminal, what a person sees is put together from what is written, as a terminal does it: carriage returns go back, "erase line"
erases, and a line that goes on beyond the last column wraps, which it must not.
"""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import unicodedata
from pathlib import Path

from check import check

ESCAPE = "\x1b"

# What moves the cursor within its line or up, erases, and sets colors; there must be nothing else.
SEQUENCE = re.compile(r"\x1b\[(\d*)([A-Za-z])|\x1b\[(\?25)([hl])")

# Lines that a small screen shows of a run at its end.
SCREEN_LINES = 24


def width(text: str) -> int:
    wide = sum(unicodedata.east_asian_width(sign) in "WF" for sign in text)
    return wide + sum(not unicodedata.combining(sign) for sign in text)


class Screen:
    """Lines as a terminal shows them, and the widest that each has ever been."""

    def __init__(self) -> None:
        self.lines, self.row, self.column, self.widest = [""], 0, 0, 0
        self.seen: list[str] = []

    def write(self, text: str) -> None:
        place = 0
        while place < len(text):
            sign = text[place]
            if sign == ESCAPE:
                found = SEQUENCE.match(text, place)
                check(found is not None, f"an unknown escape sequence: {text[place : place + 10]!r}")
                place = found.end()
                self.control(found[1] or "", found[2] or found[4])
                continue
            place += 1
            if sign == "\r":
                self.column = 0
            elif sign == "\n":
                self.row += 1
                if self.row == len(self.lines):
                    self.lines.append("")
            else:
                line = self.lines[self.row].ljust(self.column)
                self.lines[self.row] = line[: self.column] + sign + line[self.column + 1 :]
                self.column += 1
                # A path or URL that is too long for the terminal has a line to itself, and can be copied.
                if len(self.lines[self.row].split()) > 1:
                    self.widest = max(self.widest, width(self.lines[self.row]))
                self.seen.append(self.lines[self.row])

    def control(self, number: str, letter: str) -> None:
        if letter == "A":
            self.row = max(self.row - int(number or 1), 0)
        elif letter == "K":
            self.lines[self.row] = "" if number == "2" else self.lines[self.row][: self.column]
        elif letter == "B":
            self.row += int(number or 1)
        else:
            check(letter in "mhl", f"an unexpected control sequence {number}{letter}")


def run(command: list[str], columns: int, **environment: str) -> tuple[str, str]:
    """Runs a command with standard error on a terminal of so many columns; returns what came there, and standard output."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    names = {"TERM": "xterm-256color", **environment}
    inherited = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "CLICOLOR", "CLICOLOR_FORCE")}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env={**inherited, **names})
    os.close(theirs)
    shown = b""
    while True:
        try:
            bytes_ = os.read(ours, 65536)
        except OSError:  # Linux says so when the other side is closed.
            break
        if not bytes_:
            break
        shown += bytes_
    os.close(ours)
    stdout, _ = process.communicate()
    check(process.returncode == 0, f"{command} ended with {process.returncode}: {shown.decode()}")
    return shown.decode(), stdout.decode()


def main(program: str, pipeline: Path) -> str:
    def command(out: str) -> list[str]:
        return [program, "run", str(pipeline), "--out", str(pipeline.parent / out)]

    lines = {}
    for columns in (80, 60):
        shown, stdout = run(command(f"out{columns}"), columns)
        screen = Screen()
        screen.write(shown)
        check(screen.widest <= columns, f"a line of {screen.widest} columns at {columns}")
        check(any(re.match(r"embed .*\d/\d+ images, ", line) for line in screen.seen), "no progress of embed")
        check("rejected" in "".join(screen.seen), "no rejects")
        closing = [line.rstrip() for line in screen.lines]
        while closing and not closing[-1]:
            closing.pop()
        if columns == 80:
            # Where the test runs, paths may be so long that they have lines to themselves.
            num_lines = sum(len(line.split()) != 1 for line in closing)
            check(num_lines <= SCREEN_LINES, f"{num_lines} lines: {closing}")
        check(" images in, " in closing[0], f"the first line is {closing[0]!r}")
        check(any(line.endswith("…") for line in closing), f"no line was cut at {columns}: {closing}")
        check(ESCAPE not in stdout and stdout.count("\n") == 1, stdout)
        lines[columns] = len(closing)

    # A warning that comes while a bar is shown has a line of its own.
    shown, _ = run(command("loud"), 80, RUST_LOG="lookalike=debug")
    screen = Screen()
    screen.write(shown)
    logged = [line for line in screen.lines if " DEBUG " in line]
    check(logged and all(re.match(r"\d{4}-\d\d-\d\dT", line) for line in logged), f"{logged}")

    shown, _ = run(command("plain"), 80, NO_COLOR="1", RUST_LOG="lookalike=debug")
    check(" DEBUG " in shown and not re.search(r"\x1b\[[\d;]*m", shown), "there are colors in spite of NO_COLOR")
    shown, _ = run(command("dumb"), 80, TERM="dumb", RUST_LOG="lookalike=debug")
    check(ESCAPE not in shown, "there are escape sequences on a dumb terminal")

    piped = subprocess.run(command("piped"), capture_output=True, text=True, check=True)
    check(ESCAPE not in piped.stdout + piped.stderr and "\r" not in piped.stderr, "there are escape sequences in a pipe")
    return f"{lines[80]} lines at 80 columns, {lines[60]} at 60"


if __name__ == "__main__":
    print("ok:", main(sys.argv[1], Path(sys.argv[2])))
