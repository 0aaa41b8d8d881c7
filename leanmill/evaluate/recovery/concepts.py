"""What a text is about, and whether a set of texts speaks of the same things in the same company."""

from __future__ import annotations

import re
from collections.abc import Iterable


_NO_CONCEPTS = """
a about above after again against all also am an and any are as at be because been before being below between both but
by can cannot could did do does doing down during each few for from further had has have having he her here hers him his
how i if in into is it its itself just me more most my no nor not now of off on once only or other our out over own same
she should so some such than that the their them then there these they this those through to too under until up us very
was we were what when where which while who whom why will with would you your
"""
_STOPWORDS = frozenset(_NO_CONCEPTS.split())
_WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*")


def concepts_of(text: str) -> frozenset[str]:
    """Return the phrases between stop words and punctuation, in lower case: RAKE's candidates (Rose et al. 2010)."""
    found: set[str] = set()
    phrase: list[str] = []
    end = 0
    for match in _WORD.finditer(text):
        word, between = match.group().lower(), text[end : match.start()]
        end = match.end()
        if between.strip() or word in _STOPWORDS:
            found |= _closed(phrase)
        if word not in _STOPWORDS:
            phrase.append(word)
    return frozenset(found | _closed(phrase))


def _closed(phrase: list[str]) -> set[str]:
    whole = {" ".join(phrase)} if phrase else set()
    phrase.clear()
    return whole


class ConceptGraph:
    """Concepts, an edge between each two of the same text that was taken."""

    def __init__(self) -> None:
        self._company: dict[str, set[str]] = {}

    def is_consistent(self, concepts: Iterable[str]) -> bool:
        """Whether no two of these are known of texts that were taken, and never of the same one."""
        known = [one for one in concepts if one in self._company]
        return all(b in self._company[a] for index, a in enumerate(known) for b in known[index + 1 :])

    def add(self, concepts: Iterable[str]) -> None:
        """Take a text. A concept that stands alone in its text is not known by it."""
        every = set(concepts)
        for one in every:
            if others := every - {one}:
                self._company.setdefault(one, set()).update(others)
