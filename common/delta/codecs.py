"""The codecs: one set of operations, two ways to write the numbers in them.

`tensor-pco.1` writes them with pcodec. There is no build of it for every machine (musl, 32-bit ARM); one without it
announces only `tensor-zstd.1`, whose patches are larger.
"""

from common.delta.tensors import PCO, ZSTD, Coder
from common.errors import IntegrityFailure, InvalidInput

CODEC_PCO, CODEC_ZSTD = "tensor-pco.1", "tensor-zstd.1"
CODEC_NUMBERS = {CODEC_ZSTD: 1, CODEC_PCO: 2}
"""As the header has them."""
CODEC_NAMES = {number: name for name, number in CODEC_NUMBERS.items()}

CODECS: tuple[str, ...] = (CODEC_PCO, CODEC_ZSTD) if PCO is not None else (CODEC_ZSTD,)
"""The codecs that this machine can make and apply, best first."""


def coder_of(codec: str) -> Coder:
    """How `codec` writes numbers; `InvalidInput` when this machine cannot."""
    coder = {CODEC_PCO: PCO, CODEC_ZSTD: ZSTD}.get(codec)
    if coder is None:
        fix = f"use one of {', '.join(CODECS)}, or install pcodec"
        raise InvalidInput(f"this machine does not speak the codec {codec!r}", field="codec", fix=fix)
    return coder


def coder_for_reading(codec: str) -> Coder:
    """`coder_of` for a codec that a patch names: `IntegrityFailure`, since the patch is not for this machine."""
    try:
        return coder_of(codec)
    except InvalidInput as error:
        raise IntegrityFailure(error.message, fix="ask for a patch in a codec that this machine announces") from error
