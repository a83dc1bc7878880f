"""Runs a program and says what it took.

    measured.py PROGRAM [ARGUMENT ...]

The last line on standard output is JSON: seconds of wall clock and of processor, the largest resident set in bytes, and the exit
code. This is a process of its own, and a small one, since a program's largest resident set counts that of the process it was
started from.
"""

import json
import resource
import subprocess
import sys
import time

if __name__ == "__main__":
    started = time.perf_counter()
    code = subprocess.call(sys.argv[1:])
    wall_secs = time.perf_counter() - started
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    taken = {"wall_secs": wall_secs, "cpu_secs": usage.ru_utime + usage.ru_stime, "peak_bytes": usage.ru_maxrss * 1024, "code": code}
    print("\n" + json.dumps(taken), flush=True)
