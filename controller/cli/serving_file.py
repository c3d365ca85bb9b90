"""`--serving`: how a release is served, read from TOML files (docs/reference/serving-file.md)."""

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from common.artifact.serving import GivenServing
from common.errors import InvalidInput, TooLarge

SERVING_FILE_BYTES_MAX = 64 * 1024
FIX = "see docs/reference/serving-file.md"


def parse_serving(texts: Iterable[str], variants: Iterable[str]) -> dict[str, GivenServing]:
    """Each `--serving`, which is `FILE` (for all variants) or `VARIANT=FILE`, read, by variant. `InvalidInput`."""
    known = list(variants)
    general: Mapping[str, GivenServing] = {}
    named: dict[str, GivenServing] = {}
    for text in texts:
        variant, equals, file = text.partition("=")
        if equals and variant in known:
            named[variant] = read_serving(Path(file))
        else:
            general = dict.fromkeys(known, read_serving(Path(text)))
    return {**general, **named}


def read_serving(path: Path) -> GivenServing:
    """The terms in the file. Raises `InvalidInput` that names the key."""
    try:
        with path.open("rb") as file:
            data = file.read(SERVING_FILE_BYTES_MAX + 1)
    except OSError as error:
        raise InvalidInput(f"cannot read {path}: {error.strerror}", field="serving", fix=FIX) from error
    if len(data) > SERVING_FILE_BYTES_MAX:
        raise TooLarge(f"{path} is too large", field="serving", fix=f"at most {SERVING_FILE_BYTES_MAX} bytes")
    try:
        return msgspec.convert(tomllib.loads(data.decode()), GivenServing)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path} is not TOML: {error}", field="serving", fix=FIX) from error
    except msgspec.ValidationError as error:
        raise InvalidInput(f"{path}: {error}", field="serving", fix=FIX) from error
