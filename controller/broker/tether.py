"""Run a program that cannot outlive the process that asked for it (Linux).

Started as a script, `tether.py PARENT_PID PROGRAM ARGS...`: it asks the kernel for SIGTERM when its parent dies
(prctl(2), PR_SET_PDEATHSIG, which survives execve), then becomes PROGRAM. A parent that was killed before the request
was made is noticed by its pid. This is a program of its own because the same call between fork and exec of a threaded
process (`preexec_fn`) can deadlock.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    """Become `arguments[1:]`, tied to the parent whose pid is `arguments[0]`."""
    parent, program = int(arguments[0]), arguments[1:]
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() == parent:
        os.execv(program[0], program)  # noqa: S606  a program of ours, never a shell


if __name__ == "__main__":
    main(sys.argv[1:])
