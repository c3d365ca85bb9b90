"""The model's own preprocessing: how a file becomes the 2048 tokens that magika's content-type models take.

Follows `Magika._extract_features_from_seekable` of the `magika` package (features v2): the first 1024 bytes after
leading white space and the last 1024 before trailing white space, both cut from blocks of at most 4096 bytes; 256 pads.
A test compares it with that package's code.
"""

import struct

BEGIN_TOKENS = 1024
END_TOKENS = 1024
TOKENS = BEGIN_TOKENS + END_TOKENS
BLOCK_BYTES = 4096
PADDING_TOKEN = 256


def tokens(content: bytes) -> list[int]:
    """The 2048 tokens (0 to 255 for a byte, 256 for padding) of a file's content."""
    begin = content[:BLOCK_BYTES].lstrip()[:BEGIN_TOKENS]
    end = content[-BLOCK_BYTES:].rstrip()[-END_TOKENS:]
    padded_begin = [*begin, *[PADDING_TOKEN] * (BEGIN_TOKENS - len(begin))]
    padded_end = [*[PADDING_TOKEN] * (END_TOKENS - len(end)), *end]
    return padded_begin + padded_end


def tensor(content: bytes) -> bytes:
    """The tokens as a little-endian INT32 tensor of shape [1, 2048]."""
    return struct.pack(f"<{TOKENS}i", *tokens(content))
