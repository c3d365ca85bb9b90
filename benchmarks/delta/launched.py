"""Runs one command and tells what it cost: `python -S -E launched.py CPU_S_MAX COMMAND...`, JSON on standard output.

A program of its own, and a small one, because Linux counts the parent's memory into a child's peak over fork and exec:
started from here, that floor is about 9 MB. The kernel ends a command that uses more than CPU_S_MAX seconds of CPU.
Imports nothing that is not in Python.
"""

import json
import os
import resource
import sys

FAILED_TO_START = 127


def main() -> None:
    limit_s, command = int(sys.argv[1]), sys.argv[2:]
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_CPU, (limit_s, limit_s))
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        try:
            os.execvp(command[0], command)
        except OSError:
            os._exit(FAILED_TO_START)
    _, status, used = os.wait4(child, 0)
    if status:
        sys.exit(f"{command[0]} ended with {os.waitstatus_to_exitcode(status)}")
    print(json.dumps({"cpu_s": used.ru_utime + used.ru_stime, "peak_mb": used.ru_maxrss / 1024}))


if __name__ == "__main__":
    main()
