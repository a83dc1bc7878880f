"""How the scripts beside this one fail: with a message, and exit code 1."""

import sys


def check(is_true: bool, message: str) -> None:
    if not is_true:
        sys.exit(f"failed: {message}")
