"""Names, checked once at the edge and typed from there on.

A device id and a model name travel in MQTT topics, file names and URLs, so their grammar is the intersection of what
all three allow: lower-case letters, digits and inner hyphens, dots or underscores (models), at most 63 characters. A
release is `model@version`; a digest is `sha256:` and 64 hex digits, as in the OCI image specification.

    >>> str(ReleaseRef.parse("detector@1.4.0"))
    'detector@1.4.0'
"""

import re
from typing import NewType

import msgspec

from common.errors import InvalidInput

DeviceId = NewType("DeviceId", str)
ModelName = NewType("ModelName", str)
Version = NewType("Version", str)
Digest = NewType("Digest", str)

DEVICE_ID_CHARS_MAX = 63
DEVICE_ID = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
MODEL_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,61}[a-z0-9])?")
VERSION = re.compile(r"[0-9A-Za-z](?:[0-9A-Za-z.+_-]{0,62}[0-9A-Za-z])?")
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
LABEL_KEY = re.compile(r"[a-z_][a-z0-9_]{0,62}")
LABEL_VALUE_CHARS_MAX = 128
LABELS_MAX = 64


def parse_device_id(text: str, field: str = "device") -> DeviceId:
    """`text` as a device id, or `InvalidInput`."""
    return DeviceId(
        _matched(DEVICE_ID, text, field, "lower-case letters, digits and inner hyphens, 1 to 63 characters")
    )


def parse_model_name(text: str, field: str = "model") -> ModelName:
    """`text` as a model name, or `InvalidInput`."""
    grammar = "lower-case letters, digits and inner '.', '_' or '-', 1 to 63 characters"
    return ModelName(_matched(MODEL_NAME, text, field, grammar))


def parse_version(text: str, field: str = "version") -> Version:
    """`text` as a release version (any scheme, not only semver), or `InvalidInput`."""
    return Version(_matched(VERSION, text, field, "letters, digits and inner '.', '+', '_' or '-', 1 to 64 characters"))


def parse_digest(text: str, field: str = "digest") -> Digest:
    """`text` as a digest, or `InvalidInput`."""
    return Digest(_matched(DIGEST, text, field, "'sha256:' and 64 lower-case hex digits"))


def check_labels(labels: dict[str, str], field: str = "labels") -> dict[str, str]:
    """The labels unchanged, or `InvalidInput`. Keys are identifiers, so that selectors can say `labels.site`."""
    if len(labels) > LABELS_MAX:
        raise InvalidInput(f"{len(labels)} labels", field=field, fix=f"at most {LABELS_MAX}")
    for key, value in labels.items():
        _matched(
            LABEL_KEY, key, f"{field} key", "a lower-case identifier such as 'site' or 'hw_rev', 1 to 63 characters"
        )
        if len(value) > LABEL_VALUE_CHARS_MAX or not value.isprintable():
            fix = f"printable text of at most {LABEL_VALUE_CHARS_MAX} characters"
            raise InvalidInput("value is too long or not printable", field=f"{field}.{key}", fix=fix)
    return labels


class ReleaseRef(msgspec.Struct, frozen=True, order=True):
    """One immutable version of a model; its text form is `model@version`."""

    model: ModelName
    version: Version

    @classmethod
    def parse(cls, text: str, field: str = "release") -> "ReleaseRef":
        """The release that `model@version` names, or `InvalidInput`."""
        model, at, version = text.partition("@")
        if not at:
            raise InvalidInput(f"{text[:80]!r} has no '@'", field=field, fix="write MODEL@VERSION, e.g. detector@1.4.0")
        return cls(parse_model_name(model, field), parse_version(version, field))

    def __str__(self) -> str:
        return f"{self.model}@{self.version}"


def _matched(grammar: re.Pattern[str], text: str, field: str, words: str) -> str:
    if not grammar.fullmatch(text):
        raise InvalidInput(f"{text[:80]!r} is not allowed", field=field, fix=f"use {words}")
    return text
