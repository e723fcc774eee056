"""Random sequences from texts too long to be tokenised as a whole: places are drawn, not tokens.

Where reading can begin anywhere, only what follows the places is read. Elsewhere (compressed files, arrays, tables) the
text passes once, and each window is a reservoir of one: after c characters it begins anew at the next with probability
1/(c + 1), so that in the end every character has been as likely a beginning as any other.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterable, Iterator

from torch import Tensor

from streamprune.texts.documents import Beginning, Documents, from_word, whole_words

Encode = Callable[[str], Tensor]
CHARACTERS = 8  # of text that are read for a token, at first; of English a token has four
MOST_CHARACTERS = 64 * CHARACTERS  # beyond, a place is given up
TRIES = 100  # places drawn for each sequence, of which some lie too near to the end of the text
PASSES = 4  # through a text in which reading cannot begin anywhere, where tokens are longer than expected


class Windows:
    """Collection of windows, the first `length` tokens of texts that have as many.

    Attributes:
        found: the windows. passed: characters of the text, where all of it has passed.
    """

    def __init__(self, encode: Encode, length: int) -> None:
        self._encode, self.length = encode, length
        self.found: list[Tensor] = []
        self.passed = 0
        self._characters = 0.0

    def add(self, text: str) -> bool:
        """Take a window from the start of a text, and tell whether the text has tokens enough for it."""
        tokens = self._encode(text)
        if len(tokens) < self.length:
            return False
        self.found.append(tokens[: self.length])
        self._characters += len(text) * self.length / len(tokens)
        return True

    @property
    def characters_per_token(self) -> float:
        """Mean number of characters for a token in the windows so far."""
        return self._characters / max(1, len(self.found) * self.length)


def at_places(documents: Documents, windows: Windows, samples: int, draw: random.Random) -> None:
    """Find windows of a text in which reading can begin anywhere; fewer than `samples` where there are not as many."""
    assert documents.places is not None
    for _, place in zip(range(TRIES * samples), documents.places(draw), strict=False):
        # Each time twice as much, until it is enough.
        any(map(windows.add, _growing(place, documents.separator, windows.length)))
        if len(windows.found) == samples:
            return


def _growing(place: Beginning, separator: str, length: int) -> Iterator[str]:
    """Yield the text from a place on, each time twice as much of it, as long as there is more."""
    share, rest = place
    text = next(rest, "")
    text = from_word(text[int(share * len(text)) :]) or next(rest, "")
    wanted = CHARACTERS * length
    while wanted <= MOST_CHARACTERS * length:
        while len(text) < wanted:
            more = next(rest, None)
            if more is None:
                yield text
                return
            text += separator + more
        yield whole_words(text, wanted)
        wanted *= 2


class _Slot:
    """Text that a window will be made of: that of the last beginning, and the last one that was long enough."""

    def __init__(self) -> None:
        self.text, self.complete = "", ""

    def begin(self, text: str, wanted: int) -> bool:
        """Begin anew with this text, and tell whether it is still to grow."""
        if len(self.text) >= wanted:
            self.complete = self.text
        self.text = text[:wanted]
        return len(self.text) < wanted

    def grow(self, text: str, wanted: int) -> bool:
        """Go on with this text, and tell whether it is still to grow."""
        text = text if self.text else text.lstrip()
        self.text += text[: wanted - len(self.text)]
        return len(self.text) < wanted


def of_stream(pieces: Callable[[], Iterable[str]], windows: Windows, samples: int, draw: random.Random) -> None:
    """Find windows of a text that passes from its start, in pieces; fewer than `samples` where it is too short."""
    wanted = CHARACTERS * windows.length
    for _ in range(PASSES):
        slots, windows.passed = _one_pass(pieces(), samples - len(windows.found), wanted, draw)
        for slot in slots:
            any(windows.add(whole_words(text, wanted - 1)) for text in (slot.text, slot.complete))
        if len(windows.found) == samples:
            return
        wanted = min(4 * wanted, MOST_CHARACTERS * windows.length)


def _one_pass(pieces: Iterable[str], count: int, wanted: int, draw: random.Random) -> tuple[list[_Slot], int]:
    """Fill slots in one pass through a text; return them and the number of its characters."""
    slots, growing, passed = [_Slot() for _ in range(count)], set[int](), 0
    upcoming = [(0, number) for number in range(count)]  # at which character each begins anew
    for piece in pieces:
        growing = {number for number in growing if slots[number].grow(piece, wanted)}
        while upcoming[0][0] < passed + len(piece):
            at, number = heapq.heappop(upcoming)
            text = from_word(piece[at - passed : at - passed + 2 * wanted])
            if slots[number].begin(text, wanted):
                growing.add(number)
            else:
                growing.discard(number)
            # Of c characters the last begins it; it is still so after c' with the probability c/c'.
            heapq.heappush(upcoming, (int((at + 1) / (1 - draw.random())), number))
        passed += len(piece)
    return slots, passed


def starts_of_records(
    records: Iterable[str], encode: Encode, samples: int, length: int, draw: random.Random
) -> list[Tensor]:
    """Take the starts [length] of `samples` of the records that have as many tokens, each as likely as any other.

    Each record draws a key, and those with the largest stay; only records whose key is large enough are tokenised.
    """
    best: list[tuple[float, int, Tensor]] = []
    for number, text in enumerate(records):
        key = draw.random()
        if len(best) < samples or key > best[0][0]:
            tokens = encode(whole_words(text, MOST_CHARACTERS * length))
            if len(tokens) >= length:
                (heapq.heappush if len(best) < samples else heapq.heapreplace)(best, (key, number, tokens[:length]))
    return [window for _, _, window in sorted(best, key=lambda each: each[:2])]
