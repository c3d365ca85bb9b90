"""Answers that were given before, for equal requests: what makes two requests equal, and which answers are kept. Pure.

`Question` is a request as bytes, `Answers` keeps as many as fit. What is kept for whom, and the locks, are
`edge_agent.inference.recall`'s.
"""

from edge_agent.inference.caching.answers import ENTRY_BYTES, SHARE_MAX, Answers
from edge_agent.inference.caching.question import Question, frozen

__all__ = ["ENTRY_BYTES", "SHARE_MAX", "Answers", "Question", "frozen"]
