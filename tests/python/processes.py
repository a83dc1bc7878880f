"""Processes of this machine, as the scripts beside this one find them, and waiting for what others do. Linux only."""

import ctypes
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from check import check

T = TypeVar("T")

PR_SET_PDEATHSIG = 1  # linux/prctl.h
PRCTL = ctypes.CDLL(None).prctl

# Longer than anything takes on a machine that is busy: who waits so long waits in vain.
TIMEOUT_SECS, POLL_SECS = 300, 0.01

LINES_SHOWN = 15


def wait_for(what: str, look: Callable[[], T | None]) -> T:
    """What `look` finds, once it finds something."""
    deadline = time.monotonic() + TIMEOUT_SECS
    while not (found := look()):
        check(time.monotonic() < deadline, f"waited {TIMEOUT_SECS} s for {what}")
        time.sleep(POLL_SECS)
    return found


@contextmanager
def showing(folder: Path, pattern: str) -> Iterator[None]:
    """Prints the ends of logs if what is done here fails, for the folder may be gone by then."""
    try:
        yield
    except BaseException:
        for file in sorted(folder.glob(pattern)):
            lines = file.read_text(errors="replace").splitlines()[-LINES_SHOWN:]
            print(f"=== {file.relative_to(folder)}", *lines, sep="\n", file=sys.stderr)
        raise


def command(pid: int) -> list[str]:
    """The command line of a process; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1]
    except (FileNotFoundError, ProcessLookupError):
        return []


def argument(pid: int, option: str) -> str | None:
    """The value that a process was given for an option."""
    arguments = command(pid)
    return arguments[1 + arguments.index(option)] if option in arguments else None


def parent(pid: int) -> int:
    """The process that started this one; 0 if this one has ended."""
    try:
        # The name before it, in parentheses, may hold anything.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def ancestors(pid: int) -> list[int]:
    """The process that started this one, the one that started that, and so on."""
    found = []
    while (pid := parent(pid)) > 1:
        found.append(pid)
    return found


def running(program: str, *arguments: str) -> list[int]:
    """The processes of a program whose command line begins with these arguments."""
    wanted = [program, *arguments]
    everything = (int(name) for name in os.listdir("/proc") if name.isdecimal())
    return [pid for pid in everything if command(pid)[: len(wanted)] == wanted]


def status(pid: int, name: str) -> str:
    """What the kernel says of a process under this name; empty if it has ended."""
    try:
        return re.search(rf"^{name}:\t(.*)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)[1]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def stop(pid: int) -> None:
    """Holds a process until it gets SIGCONT."""
    os.kill(pid, signal.SIGSTOP)
    wait_for("a process to stop", lambda: not status(pid, "State").startswith(("R", "S", "D")))


def has_pending(pid: int, number: signal.Signals) -> bool:
    """Whether a signal waits for a process that is held."""
    return bool(int(status(pid, "ShdPnd"), 16) & 1 << number - 1)


def die_with_parent() -> None:
    """Ends this process with the one that started it, however that ends; to be called between fork and exec."""
    PRCTL(PR_SET_PDEATHSIG, signal.SIGTERM)


def owner(port: int) -> int:
    """The process at the other end of a connection on loopback, by its port."""
    rows = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    inodes = {f"socket:[{row[9]}]" for row in rows if int(row[1].split(":")[1], 16) == port}
    for folder in Path("/proc").glob("[0-9]*/fd"):
        with suppress(FileNotFoundError, PermissionError):
            if any(os.readlink(file) in inodes for file in folder.iterdir()):
                return int(folder.parent.name)
    sys.exit(f"failed: no process has the port {port}")
