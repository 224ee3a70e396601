"""Tokens to text as they come: whole characters only, and nothing that may be a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from flashattn_lite.serving.tokenizer import Tokenizer

__all__ = ["Detokenizer", "StopStrings"]

_CONTEXT = 6  # prompt tokens decoded in front, for decoders that treat a text's start specially
_UNFINISHED = 3  # U+FFFD at the end that may yet become a character: UTF-8 has at most 4 bytes
_WINDOW = 16  # tokens decoded at once; more while they end inside a character


class Detokenizer:
    """The text of a growing list of tokens, in pieces that are final.

    A character may need several tokens, and a decoder may put a space before a token or not
    depending on the one in front, so a window of recent tokens is decoded each time and what is new
    at its end is the piece.

    Args:
        tokenizer: decodes.
        prompt: the tokens in front.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window = list(prompt[-_CONTEXT:])
        self._given = _certain(self._decode())

    def add(self, token_id: int) -> str:
        """One more token; the text that is certain now."""
        self._window.append(token_id)
        text = self._decode()
        certain = _certain(text)
        piece = certain[len(self._given) :]
        if piece:
            self._given = certain
        if len(self._window) > _WINDOW and (certain == text or len(self._window) > 4 * _WINDOW):
            piece += text[len(self._given) :]
            self._window = self._window[-_CONTEXT:]
            self._given = self._decode()
        return piece

    def finish(self) -> str:
        """What was held back: a character that did not become whole."""
        text = self._decode()
        piece, self._given = text[len(self._given) :], text
        return piece

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window)


def _certain(text: str) -> str:
    """Without what may yet become a character at its end."""
    return text[: max(len(text.rstrip("\ufffd")), len(text) - _UNFINISHED)]


class StopStrings:
    """Cuts a stream of text at the first stop string, of those that end earliest.

    >>> stops = StopStrings(["END"])
    >>> stops.add("a E"), stops.add("N"), stops.add("TER E"), stops.add("ND b")
    (('a ', None), ('', None), ('ENTER ', None), ('', 'END'))
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def add(self, piece: str) -> tuple[str, str | None]:
        """More text; what of it can be given out, and the stop string that ends it, if one does."""
        if not self._stops:
            return piece, None
        text = self._held + piece
        found = [
            (text.find(stop) + len(stop), -len(stop), stop) for stop in self._stops if stop in text
        ]
        if found:
            end, _, stop = min(found)
            self._held = ""
            return text[: end - len(stop)], stop
        keep = max(self._overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def finish(self) -> str:
        """What was held back: it did not become a stop string."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """The longest end of the text that begins the stop string."""
        for count in range(min(len(text), len(stop) - 1), 0, -1):
            if text.endswith(stop[:count]):
                return count
        return 0
