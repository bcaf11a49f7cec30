"""Tokens to text as they come: never half a character, nothing that may yet become a stop text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what tokenizers show for bytes that are no whole character
MOST_UNFINISHED = 3  # bytes that a character can lack its end for


class TextStream:
    """The text of one answer.

    `decode` is the tokenizer's. The texts that `push` and `finish` give, one after another, are what `decode` makes of
    all tokens, up to the first stop text, and without a character at the end that lacks bytes.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        self._decode, self._stops = decode, stops
        self._window: list[int] = []  # tokens whose text the next one may still change, and some before them
        self._known = 0  # of the window, tokens whose text was given out
        self._given = 0  # of the window's text, characters that were given out
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """One more token; the text that is safe now."""
        self._window.append(token)
        now = self._decode(self._window)
        lacking = len(now) - len(now.rstrip(UNFINISHED))
        end = len(now) - min(lacking, MOST_UNFINISHED)  # the last of them may yet become a character
        if end <= self._given:
            return ""
        new, self._given = now[self._given : end], end
        if end == len(now):
            # The window starts at tokens whose text is out: tokenizers treat a text's first token in a way of its own.
            self._window = self._window[self._known :]
            self._known, self._given = len(self._window), len(self._decode(self._window))
        return self._safe(new)

    def finish(self) -> str:
        """The answer is over: the text that was held back."""
        if self.stopped:
            return ""
        text = self._safe(self._decode(self._window).rstrip(UNFINISHED)[self._given :])
        held, self._held = self._held, ""
        return text + ("" if self.stopped else held)

    def _safe(self, new: str) -> str:
        """Of the text that was held back and `new`, what can be given out."""
        text = self._held + new
        found = [place for place in (text.find(stop) for stop in self._stops) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
