"""For which machine a shared library was built, from the first bytes of the file.

Source: System V Application Binary Interface, "ELF Header" (e_ident, e_type, e_machine).
"""

import struct
from typing import NamedTuple

from common.errors import InvalidInput

HEADER_BYTES = 20
MAGIC = b"\x7fELF"
SHARED = 3
"""e_type of a shared library, and of a program that may be loaded anywhere."""
MACHINES = {
    3: "i386",
    21: "ppc64",
    22: "s390x",
    40: "arm",
    62: "x86-64",
    183: "aarch64",
    243: "riscv",
    258: "loongarch",
}


class Machine(NamedTuple):
    """What machine code is for: word length in bits, byte order, and e_machine."""

    bits: int
    order: str
    number: int

    def __str__(self) -> str:
        return f"{MACHINES.get(self.number, f'machine {self.number}')} ({self.bits} bits, {self.order} endian)"


def machine_of(header: bytes) -> Machine:
    """The machine of a shared library that begins with `header`; `InvalidInput` when it is none for Linux."""
    fix = "give a shared library for Linux, as a compiler wrote it (.so)"
    if len(header) < HEADER_BYTES or not header.startswith(MAGIC) or header[4] not in {1, 2} or header[5] not in {1, 2}:
        raise InvalidInput("it is no ELF file", fix=fix)
    order = "little" if header[5] == 1 else "big"
    kind, number = struct.unpack_from("<HH" if order == "little" else ">HH", header, 16)
    if kind != SHARED:
        raise InvalidInput("it is an ELF file, but no shared library", fix=fix)
    return Machine(32 * header[4], order, number)
