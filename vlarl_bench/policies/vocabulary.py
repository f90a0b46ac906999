"""What turns instructions and object names into ids: a word-level vocabulary, or a published tokenizer."""

import re
from collections.abc import Iterable

from tokenizers import Tokenizer

from ..errors import BenchError

PAD, UNKNOWN = "<pad>", "<unk>"


def words(text: str) -> list[str]:
    """`"alphabet_soup_1"` -> `["alphabet", "soup", "1"]`: runs of letters or of digits, in lower case."""
    return re.findall(r"[a-z]+|[0-9]+", text.lower())


class Vocabulary:
    """Words with ids; 0 is padding, 1 stands for every unknown word."""

    def __init__(self, entries: Iterable[str]) -> None:
        """Takes the stored list, as `entries` gives it back."""
        self.entries = tuple(entries)
        self._ids = {word: i for i, word in enumerate(self.entries)}
        self._encoded: dict[str, list[int]] = {}

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Vocabulary":
        """Every word of the given instructions and object names, sorted."""
        return cls([PAD, UNKNOWN, *sorted({word for text in texts for word in words(text)})])

    def __len__(self) -> int:
        return len(self.entries)

    def encode(self, text: str) -> list[int]:
        """Ids of the words of a text."""
        if text not in self._encoded:  # the same few instructions and names, at every step of every episode
            self._encoded[text] = [self._ids.get(word, 1) for word in words(text)]
        return list(self._encoded[text])


def parse_tokenizer(text: str) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`, without padding and truncation. Raises BenchError if it is none."""
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises bare Exception
        raise BenchError(f"tokenizer.json: not a tokenizer: {error}") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
