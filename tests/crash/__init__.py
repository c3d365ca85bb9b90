"""Crashes at every operation on the disk, over the agent's real shells.

`recording` is a FUSE file system that writes down every change in the order in which programs made it. `disk` builds
from such a record what a disk may hold after a crash: everything, when the process was killed; less, out of order and
torn, when the power was cut. `stories` are updates, `device` carries them out with the agent's own executor, journal,
slots and fetcher, `survey` crashes a story everywhere and starts a device on what is left, `invariants` says what must
hold there, and `mutants` are wrong agents that the invariants catch.
"""
