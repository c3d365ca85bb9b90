"""Messages, orders and manifests that were released are read for ever.

Each file in `wire/` was written by the build that introduced its format and is never written again: a new version of a
message gets a new file beside it. `python -m tests.golden.test_wire_golden` writes the files that are missing.
"""

from pathlib import Path

import msgspec
import pytest

from common.artifact.manifest import PAYLOAD_TYPE, decode_manifest, encode_manifest
from common.trust import PublicKey, Signer, verify
from common.wire import DesiredState, JoinString, Message, decode, encode
from common.wire.codec import BYTES_MAX
from common.wire.messages import DESIRED_PAYLOAD_TYPE
from tests.property.test_wire import EXAMPLES, FULL_TELEMETRY, MEASURED, TRAFFIC
from tests.unit.test_manifest import PIPED, SERVED, TESTED, VARIANT, WATCHED, manifest

FOLDER = Path(__file__).parent / "wire"
MESSAGES: dict[str, Message] = {f"v1-{type(one).__name__}": one for one in EXAMPLES}
MESSAGES |= {f"v1-{type(one).__name__}-traffic": one for one in TRAFFIC}
MESSAGES |= {f"v1-{type(one).__name__}-measured": one for one in MEASURED}
MESSAGES["v1-Telemetry-full"] = FULL_TELEMETRY
MANIFEST = manifest(default=VARIANT)
MANIFESTS = {
    "v1-manifest": MANIFEST,
    "v1-manifest-self-test": manifest(default=TESTED, plain=VARIANT),
    "v1-manifest-serving": manifest(default=SERVED, plain=VARIANT),
    "v1-manifest-reference": manifest(default=WATCHED, plain=VARIANT),
    "v1-manifest-pipeline": manifest(default=PIPED),
}
JOIN = JoinString("http://127.0.0.1:8480", "ferryj_token")


@pytest.mark.parametrize("name", MESSAGES)
def test_a_released_message_still_says_what_it_said(name: str) -> None:
    assert decode((FOLDER / f"{name}.bin").read_bytes(), type(MESSAGES[name])) == MESSAGES[name]


def test_every_message_type_has_a_released_file() -> None:
    assert {f"v1-{kind.__name__}" for kind in BYTES_MAX} <= {path.stem for path in FOLDER.glob("*.bin")}
    assert {path.stem for path in FOLDER.glob("*.bin")} == MESSAGES.keys()


@pytest.mark.parametrize("name", ["v1-DesiredState", "v1-Presence", "v1-ReportedState", "v1-Telemetry"])
def test_terms_and_findings_that_are_not_there_leave_no_trace(name: str) -> None:
    assert encode(MESSAGES[name]) == (FOLDER / f"{name}.bin").read_bytes()


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_released_manifest_keeps_its_bytes_and_so_its_digest(name: str) -> None:
    data = (FOLDER / f"{name}.json").read_bytes()
    assert decode_manifest(data) == MANIFESTS[name]
    assert encode_manifest(MANIFESTS[name]) == data


def test_a_released_order_and_a_released_manifest_are_still_believed() -> None:
    key = msgspec.json.decode((FOLDER / "v1-key.json").read_bytes(), type=PublicKey)
    order = verify((FOLDER / "v1-order.dsse.json").read_bytes(), DESIRED_PAYLOAD_TYPE, (key,))
    assert decode(order, DesiredState) == MESSAGES["v1-DesiredState"]
    signed = verify((FOLDER / "v1-manifest.dsse.json").read_bytes(), PAYLOAD_TYPE, (key,))
    assert decode_manifest(signed) == MANIFEST


def test_a_released_join_string_still_leads_to_its_controller() -> None:
    assert JoinString.parse((FOLDER / "v1-join.txt").read_text()) == JOIN


def _write_missing() -> None:
    FOLDER.mkdir(exist_ok=True)
    signer = Signer.generate()
    files = {f"{name}.bin": encode(message) for name, message in MESSAGES.items()}
    files |= {f"{name}.json": encode_manifest(one) for name, one in MANIFESTS.items()}
    files["v1-join.txt"] = str(JOIN).encode()
    if not (FOLDER / "v1-key.json").exists():
        files["v1-key.json"] = msgspec.json.encode(signer.public_key)
        files["v1-order.dsse.json"] = signer.sign(DESIRED_PAYLOAD_TYPE, encode(MESSAGES["v1-DesiredState"]))
        files["v1-manifest.dsse.json"] = signer.sign(PAYLOAD_TYPE, encode_manifest(MANIFEST))
    for name, data in files.items():
        if not (FOLDER / name).exists():
            (FOLDER / name).write_bytes(data)


if __name__ == "__main__":
    _write_missing()
