"""The text of an answer, token by token, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

INCOMPLETE = "\ufffd"  #: what a tokenizer makes of bytes that do not end a character


class Text:
    """Turns tokens into text that can be sent at once: whole characters, and nothing that may begin a stop string."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()):
        self.tokenizer, self.stop = tokenizer, stop
        self.stopped = False  #: whether a stop string was reached
        self._ids: list[int] = []  # the last tokens of which the text may still change, and some before them
        self._done = 0  # how many of them are in the text
        self._held = ""  # not sent yet: a beginning of a stop string

    def add(self, token: int) -> str:
        """The text that can be sent after one more token."""
        self._ids.append(token)
        return self._sendable(self._new(whole=True))

    def rest(self) -> str:
        """What is left to send at the end of the answer."""
        text = self._sendable(self._new(whole=False))
        held, self._held = self._held, ""
        return text + held

    def _new(self, *, whole: bool) -> str:
        """The text of tokens that are not in it yet; empty if ``whole`` and a character is incomplete.

        A token's text depends on the token before it (spaces), so some are decoded twice.
        """
        before, text = self._decoded(self._ids[: self._done]), self._decoded(self._ids)
        if whole and text.endswith(INCOMPLETE):
            return ""
        self._ids, self._done = self._ids[self._done :], len(self._ids) - self._done
        return text[len(before) :]

    def _decoded(self, ids: list[int]) -> str:
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        assert isinstance(text, str)
        return text

    def _sendable(self, new: str) -> str:
        text = self._held + new
        starts = [at for stop in self.stop if (at := text.find(stop)) >= 0]
        if starts:
            self.stopped, self._held = True, ""
            return text[: min(starts)]
        longest = max((len(stop) for stop in self.stop), default=1) - 1
        held = next(
            (n for n in range(min(longest, len(text)), 0, -1) if any(s.startswith(text[-n:]) for s in self.stop)), 0
        )
        self._held = text[len(text) - held :]
        return text[: len(text) - held]
