"""Runs a program and says how much memory it took.

    peak_memory.py PROGRAM [ARGUMENT ...]

The last line of output is its largest resident set, in KiB; the exit code is that of the program.
"""

import resource
import subprocess
import sys

if __name__ == "__main__":
    ran = subprocess.run(sys.argv[1:], check=False)
    print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, flush=True)
    sys.exit(ran.returncode)
