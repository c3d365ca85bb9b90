"""A release's self-test as it is published: the uploaded samples are read and checked before anybody signs for them.

A device that finds samples of no use rejects the release, so what can be known here is refused here: bytes that are no
samples, tensors that the model does not have, rules for outputs that are not there. Whether the expected outputs are
right is for the publisher's reference run to say; nothing is run in the controller.
"""

from collections.abc import Mapping
from pathlib import Path

from msgspec.structs import replace

from common.artifact import ArtifactRef, Variant
from common.artifact.answers import check_samples
from common.artifact.samples import SAMPLES_BYTES_MAX, decode_samples
from common.artifact.selftest import SAMPLES_FILE, SelfTest
from common.errors import IntegrityFailure, InvalidInput, TooLarge
from controller.resources import GivenSelfTest

SelfTests = Mapping[str, GivenSelfTest]
"""By variant."""


def with_self_test(variant: Variant, given: GivenSelfTest, samples: Path, field: str) -> Variant:
    """The variant with the samples as one file more; `InvalidInput`, below `field`, when they do not fit it."""
    if SAMPLES_FILE in variant.files:
        raise InvalidInput(f"a file is called {SAMPLES_FILE}", field=field, fix="give that file another name")
    reference = ArtifactRef(given.samples, samples.stat().st_size)
    try:
        if reference.size > SAMPLES_BYTES_MAX:
            fix = f"at most {SAMPLES_BYTES_MAX} bytes: give fewer or smaller samples"
            raise TooLarge(f"{reference.size} bytes", field="samples", fix=fix)
        read = decode_samples(samples.read_bytes())
        test = SelfTest(samples=SAMPLES_FILE, count=len(read), rules=given.rules, latency_max_s=given.latency_max_s)
        check_samples(read, test, variant.inputs, variant.outputs)
    except IntegrityFailure as error:
        fix = "make them with `ferry release publish --samples`"
        raise InvalidInput(error.message, field=f"{field}.samples", fix=fix) from error
    except InvalidInput as error:
        raise type(error)(error.message, field=f"{field}.{error.field}", fix=error.fix) from error
    return replace(variant, files={**variant.files, SAMPLES_FILE: reference}, self_test=test)
