"""Captions -> tokens (b, l): WordPiece of BERT, plain bytes, or the byte pairs of CLIP (ldm/models/clip.py).

A tokenizer works from files at hand and never from the network. A vocabulary that is cut or of another model
would train without complaint and draw nonsense, so its hash and its length are checked before the first caption.

WordPiece gives the ids of the `tokenizers` package, whose tables are those of Unicode 8: a caption with marks and
signs of later versions may be cut into more or fewer [UNK].
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.config import TextEncoderConfig

BERT_VOCABULARY = "https://huggingface.co/google-bert/bert-base-uncased/resolve/main/vocab.txt"


class Tokenizer:
    """Captions -> tokens (b, l) int64, each cut or padded to `length`; `null` (l,) is the empty caption."""

    def __init__(
        self, ids: Callable[[str], list[int]], *, start: int, end: int, pad: int, length: int, vocab_size: int
    ) -> None:
        self.ids, self.start, self.end, self.pad = ids, start, end, pad
        self.length, self.vocab_size = length, vocab_size
        self.null = self([""])[0]

    def __call__(self, captions: list[str]) -> Tensor:
        if isinstance(captions, str):
            raise TypeError("a tokenizer takes a list of captions; put the one caption into a list")
        rows = np.full((len(captions), self.length), self.pad, np.int64)
        for row, caption in zip(rows, captions, strict=True):
            ids = self.ids(caption)[: self.length - 2]
            row[: len(ids) + 2] = [self.start, *ids, self.end]  # a caption that is cut keeps its end
        return torch.from_numpy(rows)


def make_tokenizer(config: TextEncoderConfig) -> Tokenizer:
    """The tokenizer of a text encoder; raises when its vocabulary is not the right one."""
    if config.length < 2:
        raise ValueError(f"text_encoder.length is {config.length}; start and end alone take 2")
    if config.tokenizer == "wordpiece":
        return _wordpiece_tokenizer(config)
    if config.tokenizer == "bytes":
        return _bytes_tokenizer(config)
    if config.tokenizer == "words":
        return _words_tokenizer(config)
    if config.tokenizer == "clip":
        from ldm.models.clip import clip_tokenizer

        return clip_tokenizer(config)
    raise ValueError(
        f'text_encoder.tokenizer is {config.tokenizer!r}; captions need "wordpiece", "bytes", "words" or "clip"'
    )


# ---- bytes -------------------------------------------------------------------------------------------------
def _bytes_tokenizer(config: TextEncoderConfig) -> Tokenizer:
    """UTF-8 bytes, 3 and up, after 0 = padding, 1 = start, 2 = end: needs no file and knows every caption."""
    check_size(config, 259)
    return Tokenizer(_byte_ids, start=1, end=2, pad=0, length=config.length, vocab_size=config.vocab_size)


def _byte_ids(caption: str) -> list[int]:
    return [3 + byte for byte in caption.encode()]


class Remembered(dict[str, Any]):
    """What was found out of each word; the web never runs out of new ones, so there is an end to it."""

    most = 100_000

    def __init__(self, find: Callable[[str], Any]) -> None:
        self.find = find

    def __missing__(self, word: str) -> Any:
        if len(self) >= self.most:
            self.clear()
        self[word] = found = self.find(word)
        return found


# ---- hashed words ------------------------------------------------------------------------------------------
def _words_tokenizer(config: TextEncoderConfig) -> Tokenizer:
    """Words by their hash (Weinberger et al. 2009), 3 and up: needs no file; two words may share an id."""
    buckets = config.vocab_size - 3
    if buckets < 1:
        raise ValueError(f"text_encoder.vocab_size is {config.vocab_size}; hashed words need at least 4")
    ids = HashedWords(buckets).ids
    return Tokenizer(ids, start=1, end=2, pad=0, length=config.length, vocab_size=config.vocab_size)


class HashedWords:
    """Words -> one of `buckets` ids each."""

    word = re.compile(r"\w+")

    def __init__(self, buckets: int) -> None:
        self.buckets = buckets
        self._id = Remembered(self._hashed)

    def ids(self, caption: str) -> list[int]:
        """The tokens of a caption without start, end and padding."""
        known = self._id
        return [known[word] for word in self.word.findall(unicodedata.normalize("NFKC", caption).lower())]

    def _hashed(self, word: str) -> int:
        digest = hashlib.blake2b(word.encode(), digest_size=8).digest()
        return 3 + int.from_bytes(digest, "little") % self.buckets


# ---- WordPiece ---------------------------------------------------------------------------------------------
def _wordpiece_tokenizer(config: TextEncoderConfig) -> Tokenizer:
    vocabulary = read_vocabulary(config)
    missing = [piece for piece in ("[PAD]", "[UNK]", "[CLS]", "[SEP]") if piece not in vocabulary]
    if missing:
        raise ValueError(f"{config.vocab_file} has no {', '.join(missing)}: it is no vocabulary of BERT")
    return Tokenizer(
        WordPiece(vocabulary).ids,
        start=vocabulary["[CLS]"], end=vocabulary["[SEP]"], pad=vocabulary["[PAD]"],
        length=config.length, vocab_size=len(vocabulary),
    )  # fmt: skip


def read_vocabulary(config: TextEncoderConfig) -> dict[str, int]:
    """Piece -> id, one piece a line; the file must have the hash and the length that the settings say."""
    where = f"BERT's uncased vocabulary is at {BERT_VOCABULARY}; text_encoder.vocab_file names your copy"
    if config.vocab_file is None or config.vocab_sha256 is None:
        raise ValueError(f"text_encoder.vocab_file and vocab_sha256 must be set for WordPiece. {where}")
    path = Path(config.vocab_file)
    data = read_checked(path, config.vocab_sha256, where)
    lines = data.decode().removesuffix("\n").split("\n")
    vocabulary = {piece: token for token, piece in enumerate(lines)}
    if len(vocabulary) != len(lines):
        raise ValueError(f"{path} has {len(lines)} lines and only {len(vocabulary)} different ones")
    check_size(config, len(vocabulary))
    return vocabulary


def read_checked(path: Path, sha256: str, where: str) -> bytes:
    """A vocabulary file's bytes, if they are those that are expected; `where` tells how to get them."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no vocabulary at {path} (text_encoder.vocab_file). {where}")
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise ValueError(f"{path} has sha256 {found}, not {sha256} (text_encoder.vocab_sha256). {where}")
    return data


def check_size(config: TextEncoderConfig, found: int) -> None:
    if config.vocab_size != found:
        raise ValueError(f"the vocabulary has {found} tokens; text_encoder.vocab_size is {config.vocab_size}")


class WordPiece:
    """BERT's uncased tokenization (Devlin et al. 2019): words, then their longest pieces first."""

    # These are found in a caption as they stand, before it is put into lower case.
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    longest_word = 100  # characters; a longer word is [UNK]

    def __init__(self, vocabulary: dict[str, int]) -> None:
        self.vocabulary = vocabulary
        self.unknown = vocabulary["[UNK]"]
        known = [re.escape(piece) for piece in self.special if piece in vocabulary]
        self._special = re.compile(f"({'|'.join(known)})")
        self._pieces = Remembered(self.pieces)

    def ids(self, caption: str) -> list[int]:
        """The tokens of a caption without start, end and padding."""
        ids: list[int] = []
        for i, part in enumerate(self._special.split(caption)):
            if i % 2:
                ids.append(self.vocabulary[part])
            else:
                for word in words(part):
                    ids += self._pieces[word]
        return ids

    def pieces(self, word: str) -> list[int]:
        """The longest piece that a word begins with, then that of the rest; [UNK] when there is none."""
        if len(word) > self.longest_word:
            return [self.unknown]
        ids, start = [], 0
        while start < len(word):
            for end in range(len(word), start, -1):
                piece = self.vocabulary.get(("##" if start else "") + word[start:end])
                if piece is not None:
                    break
            else:
                return [self.unknown]
            ids.append(piece)
            start = end
        return ids


def words(text: str) -> list[str]:
    """Lower case without accents, cut at white space, around punctuation and around Chinese characters."""
    return unicodedata.normalize("NFD", text.translate(_CLEAN)).translate(_FOLD).split()


class _Table(dict[int, str]):
    """For str.translate: what becomes of each character, found out when it comes for the first time."""

    def __init__(self, change: Callable[[str], str]) -> None:
        self.change = change

    def __missing__(self, code: int) -> str:
        self[code] = changed = self.change(chr(code))
        return changed


def _clean(c: str) -> str:
    category = unicodedata.category(c)
    if c in "\t\n\r" or category in ("Zs", "Zl", "Zp"):
        return " "
    if c == "\ufffd" or category in ("Cc", "Cf", "Co", "Cs"):
        return ""
    return f" {c} " if _is_chinese(ord(c)) else c


# The CJK ideograph blocks; the fifth begins at 2B920, not 2B820, in the package whose ids are to be met.
_CHINESE = (
    (0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F),
    (0x2B920, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F),
)  # fmt: skip


def _is_chinese(code: int) -> bool:
    return code >= 0x3400 and any(low <= code <= high for low, high in _CHINESE)


def _fold(c: str) -> str:
    if unicodedata.category(c) == "Mn":
        return ""
    # Each letter alone: a final sigma stays a sigma.
    return "".join(f" {small} " if _is_punctuation(small) else small for small in c.lower())


def _is_punctuation(c: str) -> bool:
    # BERT counts every printable ASCII sign that is no letter and no digit, $ and ~ among them.
    return ("!" <= c <= "~" and not c.isalnum()) or unicodedata.category(c).startswith("P")


_CLEAN, _FOLD = _Table(_clean), _Table(_fold)
