"""Runs a server of the tests until standard input closes, so that none outlives the tests, however they end.

    serve.py LOG PROGRAM [ARGUMENT...]

The server's output goes to the file LOG. `{folder}` in an argument stands for a fresh folder, which is removed at the end.
"""

import subprocess
import sys
import tempfile


def main(log: str, command: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder, open(log, "w") as output:
        command = [part.replace("{folder}", folder) for part in command]
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            sys.stdin.buffer.read()
        finally:
            server.kill()
            server.wait()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
