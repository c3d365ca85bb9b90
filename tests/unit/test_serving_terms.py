"""How a release wants to be served: what is refused before it is signed, and what a device's owner may change."""

import msgspec
import pytest

from common.artifact import TensorSpec
from common.artifact.padding import check_padding
from common.artifact.serving import GivenServing, Padding, Route, ServingChanges, ServingTerms
from common.errors import InvalidInput
from common.ids import ModelName

INPUTS = (
    TensorSpec("ids", "INT64", (-1, -1)),
    TensorSpec("mask", "INT8", (-1, -1)),
    TensorSpec("image", "FP16", (-1, 3, -1)),
    TensorSpec("flags", "BOOL", (-1, -1)),
    TensorSpec("words", "BYTES", (-1, -1)),
    TensorSpec("one", "FP32", (1, -1)),
)
SMALL = Route("load.waiting > 4", ModelName("small"))


@pytest.mark.parametrize(
    "padding",
    [
        {"ids": Padding(1)},
        {"ids": Padding(1, -100, "mask")},
        {"image": Padding(2, 0.5)},
        {"words": Padding(1, "")},
        {"flags": Padding(1, False)},
    ],
)
def test_a_padding_that_fits_its_model_passes(padding: dict[str, Padding]) -> None:
    check_padding(padding, INPUTS)


@pytest.mark.parametrize(
    ("padding", "said"),
    [
        ({"idz": Padding(1)}, r"padding\.idz: the model has no input"),
        ({"ids": Padding(2)}, r"padding\.ids\.axis: axis 2 is not open in INT64 \[any, any\] \(.*'ids'.*: 1\)"),
        ({"image": Padding(1)}, r"padding\.image\.axis: axis 1 is not open .*: 2\)"),
        ({"one": Padding(1)}, r"padding\.one: the first axis .* is fixed"),
        ({"ids": Padding(1, 0.5)}, r"padding\.ids\.value: cannot pad with 0\.5"),
        ({"ids": Padding(1, "")}, r"padding\.ids\.value"),
        ({"ids": Padding(1, True)}, r"padding\.ids\.value"),
        ({"image": Padding(2, 1e9)}, r"padding\.image\.value: .* FP16 can hold"),
        ({"words": Padding(1)}, r"padding\.words\.value"),
        ({"ids": Padding(1, 0, "musk")}, r"padding\.ids\.mask: the model has no input 'musk'"),
        ({"ids": Padding(1, 0, "words")}, r"padding\.ids\.mask: 'words' holds strings"),
        ({"ids": Padding(1, 0, "mask"), "mask": Padding(1, 1)}, r"padding\.ids\.mask: 'mask' has a padding"),
    ],
)
def test_a_padding_that_does_not_fit_is_named(padding: dict[str, Padding], said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        check_padding(padding, INPUTS)


@pytest.mark.parametrize(
    "document",
    [
        {"cache_bytes": -1},
        {"cache_bytes": 2**40},
        {"routes": [{"when": "", "model": "small"}]},
        {"routes": [{"when": "true", "model": "No Name"}]},
        {"routes": [{"when": "true"}]},
        {"routes": [{"when": "true", "model": "small"}] * 17},
        {"padding": {"ids": {"axis": 0}}},
        {"padding": {"ids": {}}},
    ],
)
def test_terms_outside_their_bounds_are_refused(document: dict[str, object]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(document, ServingTerms)


@pytest.mark.parametrize(
    "document",
    [
        {"cache_byte": 1},
        {"routes": [{"when": "true", "model": "small", "weight": 1}]},
        {"padding": {"ids": {"axis": 1, "maks": "m"}}},
    ],
)
@pytest.mark.parametrize("kind", [GivenServing, ServingChanges])
def test_what_a_person_misspells_is_no_term(kind: type[msgspec.Struct], document: dict[str, object]) -> None:
    with pytest.raises(msgspec.ValidationError, match="unknown field"):
        msgspec.convert(document, kind)


def test_given_terms_become_those_of_a_release() -> None:
    document = {"cache_bytes": 7, "routes": [{"when": "true", "model": "small"}], "padding": {"ids": {"axis": 1}}}
    terms = msgspec.convert(document, GivenServing).terms()
    assert terms == ServingTerms(7, (Route("true", ModelName("small")),), {"ids": Padding(1)})


def test_terms_of_a_later_version_are_read_for_what_is_known_of_them() -> None:
    assert msgspec.json.decode(b'{"cache_bytes": 5, "later": true}', type=ServingTerms) == ServingTerms(5)


def test_the_owner_changes_single_terms_and_the_others_stay() -> None:
    terms = ServingTerms(100, (SMALL,), {"ids": Padding(1)})
    assert ServingChanges().applied(terms) == terms
    assert ServingChanges(cache_bytes=0).applied(terms) == ServingTerms(0, (SMALL,), {"ids": Padding(1)})
    assert ServingChanges(routes=()).applied(terms) == ServingTerms(100, (), {"ids": Padding(1)})
    assert ServingChanges(padding={}).applied(terms) == ServingTerms(100, (SMALL,), {})
