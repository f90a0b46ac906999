"""FAST: action chunks as few tokens of variable number (Pertsch et al., 2025, arXiv:2501.09747).

A normalised chunk goes through a discrete cosine transform along time, its coefficients are scaled and rounded, and
byte-pair encoding packs those that often stand together, low frequencies of all dimensions first, into one token.

Shapes: N chunks, H actions a chunk, A action dimensions.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.fft import dct, idct
from tokenizers import Tokenizer, decoders, models, trainers

from ..errors import BenchError
from .vocabulary import parse_tokenizer

LONGEST = 10_000  # characters a token, as in the authors' code: no limit in practice
LAST = 0xD7FF
"""The highest character that stands for a coefficient: what follows are no characters of their own, and what a
byte-level tokenizer decodes other bytes to (0xFFFD) lies beyond."""


class FastTokenizer:
    """Chunks to token ids and back. Coefficient c is the character `chr(c - minimum)`."""

    def __init__(self, tokenizer: str, scale: float, minimum: int, maximum: int | None = None) -> None:
        """Takes the text of a tokenizer.json, and the range that coefficients are clipped to: without `maximum` as far
        as the tokenizer can spell them. Raises BenchError if the text is no tokenizer, or one that spells no
        coefficient, or if the scale is no positive number."""
        self._tokenizer = parse_tokenizer(tokenizer)
        if not scale > 0:
            raise BenchError(f"scale: {scale}; it must be above 0")
        self.json, self.scale, self.minimum = tokenizer, scale, minimum
        # Who fits a tokenizer gives every character a token, from 0 to the highest; but the authors' splits them into
        # bytes afterwards, and has no token for a byte that fitting did not see.
        most = LAST if maximum is None else maximum - minimum
        characters = [chr(i) for i in range(1 + min(most, LAST, len(self) - 1))]
        ids = [found.ids for found in self._tokenizer.encode_batch(characters, add_special_tokens=False)]
        spelled = self._tokenizer.decode_batch(ids, skip_special_tokens=False)
        known = [i for i, character in enumerate(characters) if spelled[i] == character]
        if not known:
            raise BenchError(
                f"tokenizer.json: spells none of the characters 0 to {len(characters) - 1} that stand for "
                "coefficients; it must be FAST's"
            )
        self._known = np.array(known) + minimum
        self.maximum = int(self._known[-1])

    @classmethod
    def plain(cls, chunk: int, scale: float) -> FastTokenizer:
        """One token a coefficient, for chunks within -1 and 1: what a policy has before it is fitted."""
        most = int(np.ceil(scale * chunk**0.5))
        return cls(_pack([], 2 * most, 0), scale, -most, most)

    @classmethod
    def fit(cls, chunks: np.ndarray, scale: float, size: int) -> FastTokenizer:
        """Learns at most `size` tokens from normalised chunks [N, H, A]; the same chunks give the same tokens.

        The characters are packed as they are. The authors' code takes them for text, as bytes, and never packs a digit
        with a letter, say; and coefficients that fitting did not see, it may drop. Raises BenchError if the chunks have
        more different coefficients than there are tokens.
        """
        coefficients = _transform(chunks, scale)
        low, high = int(coefficients.min()), int(coefficients.max())
        if high - low >= size:
            raise BenchError(
                f"actions: their coefficients span {low} to {high}, more than {size} tokens can tell apart; "
                "look for outliers, or take a smaller scale"
            )
        texts = ("".join(map(chr, row)) for row in coefficients - low)
        return cls(_pack(texts, high - low, size), scale, low, high)

    @classmethod
    def load(cls, folder: Path | str) -> FastTokenizer:
        """A published tokenizer: `processor_config.json` and `tokenizer.json`; none of the folder's code is run.

        Raises BenchError naming the file or the entry that is missing or wrong.
        """
        try:
            text = (Path(folder) / "tokenizer.json").read_text(encoding="utf-8")
            settings = json.loads((Path(folder) / "processor_config.json").read_bytes())
        except OSError as error:
            raise BenchError(f"tokenizer: cannot read {error.filename}: {error.strerror}") from None
        except ValueError as error:
            raise BenchError(f"tokenizer: {folder}: not JSON: {error}") from None
        found = settings if isinstance(settings, dict) else {}
        for name in ("scale", "min_token"):
            if type(found.get(name)) not in ((int, float) if name == "scale" else (int,)):
                raise BenchError(f"processor_config.json: {name}: {found.get(name)!r}; it must be a number")
        return cls(text, found["scale"], found["min_token"])

    @classmethod
    def restore(cls, config: Mapping[str, Any]) -> FastTokenizer:
        """The tokenizer that `config` describes."""
        return cls(config["tokenizer"], config["scale"], config["minimum"], config["maximum"])

    @property
    def config(self) -> dict[str, Any]:
        """What config.json holds of it."""
        return {"scale": self.scale, "minimum": self.minimum, "maximum": self.maximum, "tokenizer": self.json}

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size()

    @property
    def lengths(self) -> list[int]:
        """Coefficients that each token spells, by itself."""
        return [len(self._tokenizer.decode([i], skip_special_tokens=False)) for i in range(len(self))]

    def encode(self, chunks: np.ndarray) -> list[list[int]]:
        """Token ids of each normalised chunk [N, H, A]. A coefficient outside the range, or for which the tokenizer has
        no token, becomes the nearest that it has; the authors' code drops it, and what is left is no chunk."""
        between = (self._known[1:] + self._known[:-1]) / 2
        nearest = self._known[between.searchsorted(_transform(chunks, self.scale))] - self.minimum
        return [self._tokenizer.encode("".join(map(chr, row)), add_special_tokens=False).ids for row in nearest]

    def decode(self, tokens: Iterable[Sequence[int]], chunk: int, action_dim: int) -> tuple[np.ndarray, np.ndarray]:
        """Normalised chunks [N, H, A], and which are valid [N]: those whose tokens spell exactly H A coefficients.

        The authors' code makes an invalid chunk zeros. Here the coefficients that are missing are zero, those too many
        are dropped, and one outside the range is zero: low frequencies come first, so what was said first still holds.
        """
        rows = [np.array([ord(c) for c in self._tokenizer.decode(ids, skip_special_tokens=False)]) for ids in tokens]
        coefficients = np.zeros((len(rows), chunk * action_dim))
        valid = np.zeros(len(rows), bool)
        for i, row in enumerate(rows):
            known = row <= self.maximum - self.minimum
            valid[i] = len(row) == chunk * action_dim and known.all()
            kept = np.where(known, row + self.minimum, 0)[: chunk * action_dim]
            coefficients[i, : len(kept)] = kept
        return idct(coefficients.reshape(-1, chunk, action_dim) / self.scale, axis=1, norm="ortho"), valid


def _transform(chunks: np.ndarray, scale: float) -> np.ndarray:
    """[N, H A] int64 coefficients of chunks [N, H, A], time-major: all dimensions' lowest frequency first."""
    return np.around(dct(chunks, axis=1, norm="ortho") * scale).astype(np.int64).reshape(len(chunks), -1)


def _pack(texts: Iterable[str], highest: int, size: int) -> str:
    """Text of a tokenizer.json over the characters 0 to `highest`, with at most `size` tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.decoder = decoders.Fuse()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=[chr(i) for i in range(highest + 1)],
        max_token_length=LONGEST,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()
