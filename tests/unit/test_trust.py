"""A signature holds for exactly these bytes, said for exactly this purpose, by exactly these keys."""

import json

import pytest

from common.errors import IntegrityFailure
from common.trust import Signer, is_newer, verify

TYPE = "application/vnd.edgeferry.desired+json"


def test_what_was_signed_comes_back() -> None:
    signer = Signer.generate()
    assert verify(signer.sign(TYPE, b"{}"), TYPE, (signer.public_key,)) == b"{}"


def test_a_key_survives_its_file() -> None:
    signer = Signer.generate()
    again = Signer.from_pem(signer.to_pem())
    assert again.public_key == signer.public_key
    assert again.sign(TYPE, b"x") == signer.sign(TYPE, b"x"), "Ed25519 is deterministic, so ETags are stable"


def test_another_key_is_not_trusted() -> None:
    with pytest.raises(IntegrityFailure, match="trusted key"):
        verify(Signer.generate().sign(TYPE, b"{}"), TYPE, (Signer.generate().public_key,))


def test_a_manifest_cannot_pass_for_an_order() -> None:
    signer = Signer.generate()
    envelope = signer.sign("application/vnd.edgeferry.release+json", b"{}")
    with pytest.raises(IntegrityFailure, match="signed as"):
        verify(envelope, TYPE, (signer.public_key,))
    relabelled = json.loads(envelope) | {"payloadType": TYPE}
    with pytest.raises(IntegrityFailure, match="trusted key"):
        verify(json.dumps(relabelled).encode(), TYPE, (signer.public_key,))


def test_one_signature_repeated_does_not_reach_a_threshold_of_two() -> None:
    signer, other = Signer.generate(), Signer.generate()
    with pytest.raises(IntegrityFailure):
        verify(signer.sign(TYPE, b"{}"), TYPE, (signer.public_key, other.public_key), threshold=2)


BAD_SIGNATURES: list[object] = [None, 1, [1], [{}]]
NOT_ENVELOPES = [b"", b"{", b"[]", b"null", b"{}", b'{"payload":"%","payloadType":"a","signatures":[]}', b"[" * 100_000]
NOT_ENVELOPES += [
    json.dumps({"payload": "", "payloadType": TYPE, "signatures": bad}).encode() for bad in BAD_SIGNATURES
]


@pytest.mark.parametrize("data", NOT_ENVELOPES)
def test_anything_else_is_a_named_error(data: bytes) -> None:
    with pytest.raises(IntegrityFailure):
        verify(data, TYPE, (Signer.generate().public_key,))


def test_every_flipped_bit_of_an_envelope_is_noticed() -> None:
    signer = Signer.generate()
    envelope = signer.sign(TYPE, b'{"generation":1}')
    for position in range(len(envelope)):
        changed = bytearray(envelope)
        changed[position] ^= 1
        try:
            payload = verify(bytes(changed), TYPE, (signer.public_key,))
        except IntegrityFailure:
            continue
        assert payload == b'{"generation":1}', f"byte {position}"


def test_generations_never_go_back() -> None:
    assert is_newer(2, 1)
    assert not is_newer(1, 1)
    assert not is_newer(0, 1)


@pytest.mark.parametrize("pem", [b"", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"])
def test_a_damaged_key_file_is_a_named_error(pem: bytes) -> None:
    with pytest.raises(IntegrityFailure):
        Signer.from_pem(pem)
