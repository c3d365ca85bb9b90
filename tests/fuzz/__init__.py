"""Fuzzing what reads strangers' bytes: `python -m tests.fuzz`, or `make fuzz`.

`targets` has a function per reader that takes any bytes and fails only where the reader breaks its promise, and valid
inputs to start from. `__main__` lets libFuzzer (through atheris) look for bytes that make one fail, in a process per
target, and says what was tried. An input that once failed is kept in `regressions/TARGET-what.bin` when its cause is
mended; tests/integration/test_fuzz_regressions.py replays these and needs no atheris.
"""
