"""A release's reference as it is published: read and checked before anybody signs for it.

Devices count by it and the controller judges by it, so what neither could use is refused here.
"""

from collections.abc import Mapping
from pathlib import Path

from msgspec.structs import replace

from common.artifact import ArtifactRef, Variant
from common.errors import IntegrityFailure, InvalidInput, TooLarge
from common.ids import Digest
from common.monitoring.reference import REFERENCE_BYTES_MAX, REFERENCE_FILE, check_reference, decode_reference

References = Mapping[str, Digest]
"""The file of the reference, by variant."""


def with_reference(variant: Variant, digest: Digest, path: Path, field: str) -> Variant:
    """The variant with the reference as one file more; `InvalidInput`, at `field`, when it does not fit it."""
    fix = "make it with `ferry release publish --reference`"
    if REFERENCE_FILE in variant.files:
        raise InvalidInput(f"a file is called {REFERENCE_FILE}", field=field, fix="give that file another name")
    size = path.stat().st_size
    if size > REFERENCE_BYTES_MAX:
        raise TooLarge(f"{size} bytes, at most {REFERENCE_BYTES_MAX}", field=field, fix=fix)
    try:
        check_reference(decode_reference(path.read_bytes()), variant.inputs, variant.outputs)
    except (IntegrityFailure, InvalidInput) as error:
        raise InvalidInput(str(error), field=field, fix=fix) from error
    files = {**variant.files, REFERENCE_FILE: ArtifactRef(digest, size)}
    return replace(variant, files=files, reference=REFERENCE_FILE)
