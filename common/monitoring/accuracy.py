"""What labelled answers say of a release: the share of right ones, and how sure that is.

Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", Journal of the American
Statistical Association 22 (1927). His interval keeps to 0 and 1 and holds for few labels too.

    >>> accuracy(correct=9, labelled=10)
    Accuracy(correct=9, labelled=10, share=0.9, low=0.5958499732047615, high=0.9821237869049271)
"""

import math

import msgspec

Z = 1.959963984540054
"""Two-sided 95 % of the normal distribution."""


class Accuracy(msgspec.Struct, frozen=True):
    """`correct` of `labelled` answers were right. `low` to `high` holds the release's true share in 95 of 100 cases, if
    what gets labelled is picked by chance. All three are None without labels: no data is no verdict.
    """

    correct: int
    labelled: int
    share: float | None
    low: float | None
    high: float | None


def accuracy(correct: int, labelled: int) -> Accuracy:
    """The accuracy with its interval."""
    if not labelled:
        return Accuracy(0, 0, None, None, None)
    share, weight = correct / labelled, Z * Z / labelled
    centre = (share + weight / 2) / (1 + weight)
    half = Z * math.sqrt(share * (1 - share) / labelled + weight / (4 * labelled)) / (1 + weight)
    return Accuracy(correct, labelled, share, max(0.0, centre - half), min(1.0, centre + half))
