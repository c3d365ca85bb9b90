"""The outline of an expression's text: what can be seen of it without parsing, enough to bound its cost beforehand.

Strings and comments are blanked first (same length, so that positions stay true); what is left is brackets, names
and macro calls. Source of the lexical rules: CEL language definition, "Syntax".
"""

import re

_BLANKED = re.compile(
    r"""
      [bB]?[rR][bB]? (?: \"{3}.*?\"{3} | '{3}.*?'{3} | "[^"\n]*" | '[^'\n]*' )
    | \"{3} (?: \\. | [^\\] )*? \"{3} | '{3} (?: \\. | [^\\] )*? '{3}
    | " (?: \\. | [^"\\\n] )* " | ' (?: \\. | [^'\\\n] )* '
    | // [^\n]*
    """,
    re.VERBOSE | re.DOTALL,
)
_COMPREHENSION = re.compile(r"\.\s*(?:all|exists|exists_one|existsOne|map|filter)\s*\(\s*([A-Za-z_]\w*)?")
_OPENING, _CLOSING = frozenset("([{"), frozenset(")]}")


class Outline:
    """What `text` looks like from afar. Unbalanced brackets are the parser's to refuse."""

    def __init__(self, text: str) -> None:
        self._text = _BLANKED.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)
        calls = list(_COMPREHENSION.finditer(self._text))
        self.nesting = self._deepest()
        self.comprehensions = len(calls)
        self.bound_names = frozenset(call[1] for call in calls if call[1])
        """Names that a comprehension gives to its elements."""
        self.nested_comprehension = self._first_nested([call.start() for call in calls])
        """Index of the first comprehension that lies in the brackets of another, or None."""

    def position(self, index: int) -> str:
        """The line and column of a character, counted from 1."""
        before = self._text[:index]
        return f"line {before.count(chr(10)) + 1}, column {index - before.rfind(chr(10))}"

    def position_of(self, name: str) -> str:
        """Where `name` stands first, not as a field of something else if that can be told."""
        found = re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", self._text)
        return self.position(found.start() if found else max(0, self._text.find(name)))

    def _deepest(self) -> int:
        depth = deepest = 0
        for character in self._text:
            depth += (character in _OPENING) - (character in _CLOSING)
            deepest = max(deepest, depth)
        return deepest

    def _first_nested(self, starts: list[int]) -> int | None:
        open_until = 0
        for start in starts:
            if start < open_until:
                return start
            open_until = self._end_of_call(self._text.index("(", start))
        return None

    def _end_of_call(self, opening: int) -> int:
        depth = 0
        for index in range(opening, len(self._text)):
            depth += (self._text[index] in _OPENING) - (self._text[index] in _CLOSING)
            if depth == 0:
                return index
        return len(self._text)
