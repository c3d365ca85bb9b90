"""Names are checked once, and a refusal says what would have been allowed."""

import pytest

from common.errors import InvalidInput
from common.ids import (
    ReleaseRef,
    check_labels,
    parse_device_id,
    parse_digest,
    parse_model_name,
    parse_version,
)


@pytest.mark.parametrize("text", ["a", "dev-1", "0" * 63])
def test_device_ids_that_fit_a_topic_a_file_name_and_a_url(text: str) -> None:
    assert parse_device_id(text) == text


@pytest.mark.parametrize("text", ["", "-a", "a-", "A", "a/b", "a+b", "#", "..", "a" * 64, "a\n", "é", "a b", "a.b"])
def test_device_ids_that_would_escape_their_topic_are_refused(text: str) -> None:
    with pytest.raises(InvalidInput) as refusal:
        parse_device_id(text)
    assert refusal.value.field == "device"
    assert "lower-case" in str(refusal.value.fix)


@pytest.mark.parametrize("text", ["..", ".a", "a/", "a\\b", "", "a" * 64])
def test_model_names_cannot_climb_out_of_a_folder(text: str) -> None:
    with pytest.raises(InvalidInput):
        parse_model_name(text)


def test_a_release_reads_back_as_it_is_written() -> None:
    assert str(ReleaseRef.parse("detector@1.4.0+cpu")) == "detector@1.4.0+cpu"


@pytest.mark.parametrize("text", ["detector", "@1", "detector@", "a@b@c", "detector@1 0"])
def test_a_release_that_is_not_model_at_version_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput):
        ReleaseRef.parse(text)


def test_versions_and_digests_have_a_grammar() -> None:
    assert parse_version("2026.11.22-rc1") == "2026.11.22-rc1"
    with pytest.raises(InvalidInput):
        parse_version("../1")
    with pytest.raises(InvalidInput):
        parse_digest("sha256:" + "A" * 64)


def test_labels_are_identifiers_with_short_printable_values() -> None:
    assert check_labels({"site": "lab 1"}) == {"site": "lab 1"}
    for bad in ({"Site": "x"}, {"a-b": "x"}, {"a": "x" * 129}, {"a": "\x00"}, {f"k{n}": "" for n in range(65)}):
        with pytest.raises(InvalidInput):
            check_labels(bad)
