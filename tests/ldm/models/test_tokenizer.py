"""Tokens: exact ids, null captions, and no vocabulary but the right one."""

import hashlib
import os
import pickle
import random
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ldm.config import TextEncoderConfig
from ldm.models.tokenizer import WordPiece, _clean, _is_punctuation, make_tokenizer, words
from tests.ldm.models import settings

SEED = int(os.environ.get("LDM_TEST_SEED", 0))


def conf(name: str, **changes) -> TextEncoderConfig:
    config = settings.read(TextEncoderConfig, "text_encoder", name)
    return replace(config, **changes)


@pytest.fixture
def small(tmp_path: Path) -> TextEncoderConfig:
    """A vocabulary of our own, small enough to check by eye."""
    pieces = "[PAD] [UNK] [CLS] [SEP] [MASK] un ##aff ##able a cat ! $ ##s 猫".split()
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(pieces) + "\n", encoding="utf-8")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return conf("bert_1p45b", vocab_file=str(path), vocab_sha256=digest, vocab_size=len(pieces), length=8)


@pytest.mark.parametrize(
    "caption, ids",
    [
        ("", [2, 3, 0, 0, 0, 0, 0, 0]),
        ("Unaffable CATS!", [2, 5, 6, 7, 9, 12, 10, 3]),
        ("ünaffáble", [2, 5, 6, 7, 3, 0, 0, 0]),
        ("a\t\x00cat\u200b$$", [2, 8, 9, 11, 11, 3, 0, 0]),
        ("a猫猫s", [2, 8, 13, 13, 1, 3, 0, 0]),
        ("cat [MASK][SEP]", [2, 9, 4, 3, 3, 0, 0, 0]),
        ("dog", [2, 1, 3, 0, 0, 0, 0, 0]),
        ("a a a a a a a a", [2, 8, 8, 8, 8, 8, 8, 3]),
    ],
)
def test_wordpiece_by_hand(small: TextEncoderConfig, caption: str, ids: list[int]) -> None:
    assert make_tokenizer(small)([caption]).tolist() == [ids]


def test_words_are_cut_as_bert_cuts_them() -> None:
    assert words("Don't  stop—¡Él $5~ naïve\u00a0Straße\x85x") == [
        "don", "'", "t", "stop", "—", "¡", "el", "$", "5", "~", "naive", "straßex"
    ]  # fmt: skip
    assert words(" \n\t") == []
    assert words("ΑΣ") == ["ας".replace("ς", "σ")]


def test_a_word_of_more_than_a_hundred_letters_is_unknown(small: TextEncoderConfig) -> None:
    tokenizer = make_tokenizer(replace(small, length=300))
    pieces = WordPiece({"[UNK]": 0, "a": 1, "##a": 2})
    assert pieces.ids("a" * 100) == [1] + [2] * 99
    assert pieces.ids("a" * 101) == [0]
    assert tokenizer(["a " * 400])[0, -1] == tokenizer.end


def test_null_is_the_empty_caption_and_batches_have_a_shape(small: TextEncoderConfig) -> None:
    for tokenizer in (make_tokenizer(small), make_tokenizer(conf("bytes_tiny"))):
        assert torch.equal(tokenizer.null, tokenizer([""])[0])
        assert tokenizer.null.dtype == torch.int64 and tokenizer.null.shape == (tokenizer.length,)
        assert tokenizer([]).shape == (0, tokenizer.length)
        assert tokenizer(["a", "a cat"]).shape == (2, tokenizer.length)
        with pytest.raises(TypeError, match="list of captions"):
            tokenizer("a cat")


def test_tokenizers_travel_to_worker_processes(small: TextEncoderConfig) -> None:
    for config in (small, conf("bytes_tiny"), conf("clip_vit_l_14")):
        tokenizer = make_tokenizer(config)
        again = pickle.loads(pickle.dumps(tokenizer))
        assert torch.equal(again(["a cat", "🐈"]), tokenizer(["a cat", "🐈"]))


def test_caches_stay_small(small: TextEncoderConfig) -> None:
    pieces = WordPiece({"[UNK]": 0, **{str(i): i + 1 for i in range(10)}, **{f"##{i}": i + 11 for i in range(10)}})
    pieces._pieces.most = 20
    captions = [f"{i} {i * 7} {i}" for i in range(100)]
    fresh = [WordPiece(pieces.vocabulary).ids(caption) for caption in captions]
    assert [pieces.ids(caption) for caption in captions] == fresh
    assert len(pieces._pieces) <= 20


def slow_words(text: str) -> list[str]:
    """BERT's rules letter by letter, without the tables that make them quick."""
    text = "".join(map(_clean, text))
    text = "".join(c for c in unicodedata.normalize("NFD", text) if unicodedata.category(c) != "Mn")
    text = "".join(c.lower() for c in text)
    return "".join(f" {c} " if _is_punctuation(c) else c for c in text).split()


def test_words_are_those_of_the_rules_for_every_character_and_mixtures_of_them() -> None:
    rng = random.Random(SEED)
    assert not [code for code in range(0x30000) if words(f"a{chr(code)}b") != slow_words(f"a{chr(code)}b")]
    for _ in range(5000):
        some = rng.choices("abCD  .,!'\t\n\x0b\x1c\x7féßΣςİıﬁ猫\u200b\u0301\u0345\ufffd½", k=rng.randrange(12))
        text = "".join(some) + chr(rng.randrange(0x110000))
        assert words(text) == slow_words(text), text


def test_bytes_come_back() -> None:
    tokenizer = make_tokenizer(conf("bytes_tiny"))
    rng = random.Random(SEED)
    captions = ["".join(rng.choices("abc éß猫🐈", k=rng.randrange(19))) for _ in range(200)]
    for caption, row in zip(captions, tokenizer(captions).tolist(), strict=True):
        end = row.index(tokenizer.end)
        assert row[0] == tokenizer.start and set(row[end + 1 :]) <= {tokenizer.pad}
        assert bytes(token - 3 for token in row[1:end]).decode() == caption
    long = tokenizer(["x" * 1000])[0].tolist()
    assert len(long) == 78 and long[-1] == tokenizer.end and max(long) < tokenizer.vocab_size


# ---- never a silently wrong vocabulary ---------------------------------------------------------------------
def test_a_missing_vocabulary_says_where_to_get_it(small: TextEncoderConfig) -> None:
    with pytest.raises(FileNotFoundError, match="no vocabulary at .*nowhere.txt.*https://.*vocab.txt"):
        make_tokenizer(replace(small, vocab_file="nowhere.txt"))
    with pytest.raises(ValueError, match="vocab_file and vocab_sha256 must be set.*https://"):
        make_tokenizer(conf("bert_1p45b"))


def test_a_changed_vocabulary_is_refused(small: TextEncoderConfig) -> None:
    path = Path(small.vocab_file)
    whole = path.read_bytes()
    for wrong in (whole[:-1], whole.replace(b"cat", b"cot"), b""):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match="has sha256 .* not .*vocab_sha256"):
            make_tokenizer(small)
    path.write_bytes(whole)
    make_tokenizer(small)


def test_a_vocabulary_of_another_length_is_refused(small: TextEncoderConfig) -> None:
    with pytest.raises(ValueError, match="has 14 tokens; text_encoder.vocab_size is 30522"):
        make_tokenizer(replace(small, vocab_size=30522))
    with pytest.raises(ValueError, match="has 259 tokens; text_encoder.vocab_size is 256"):
        make_tokenizer(conf("bytes_tiny", vocab_size=256))


def test_a_file_that_is_no_vocabulary_is_refused(tmp_path: Path, small: TextEncoderConfig) -> None:
    for text, complaint in (("a\nb\n", r"has no \[PAD\]"), ("[PAD]\nb\nb\n", "3 lines and only 2 different")):
        path = tmp_path / "other.txt"
        path.write_text(text)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        config = replace(small, vocab_file=str(path), vocab_sha256=digest, vocab_size=2)
        with pytest.raises(ValueError, match=complaint):
            make_tokenizer(config)


def test_layouts_have_no_tokenizer() -> None:
    with pytest.raises(ValueError, match="tokenizer is None"):
        make_tokenizer(conf("layout"))


# ---- BERT's own vocabulary ---------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def extra() -> Path:
    folder = os.environ.get("LDM_EXTRA_DATA")
    if not folder or not (Path(folder) / "bert_base_uncased_vocab.txt").is_file():
        pytest.skip("LDM_EXTRA_DATA does not hold bert_base_uncased_vocab.txt")
    return Path(folder)


@pytest.fixture(scope="module")
def bert(extra: Path):
    return make_tokenizer(conf("bert_1p45b", vocab_file=str(extra / "bert_base_uncased_vocab.txt")))


def test_the_empty_caption_of_bert(bert) -> None:
    assert bert.null.tolist() == [101, 102] + [0] * 75
    assert bert.vocab_size == 30522


def test_ids_equal_those_of_transformers(extra: Path, bert) -> None:
    from pyarrow import parquet
    from transformers import BertTokenizer

    reference = BertTokenizer(str(extra / "bert_base_uncased_vocab.txt"))
    assert len(reference) == 30522
    captions = parquet.read_table(extra / "url_text_10000.parquet")["TEXT"].to_pylist()
    assert len(captions) == 10_000
    captions = [caption or "" for caption in captions] + odd_captions(2000)
    expected = reference(captions, padding="max_length", truncation=True, max_length=77)["input_ids"]
    pairs = zip(bert(captions).tolist(), expected, strict=True)
    assert [caption for caption, (ours, theirs) in zip(captions, pairs, strict=True) if ours != theirs] == []


def odd_captions(count: int) -> list[str]:
    """Letters, marks, signs and special tokens of many scripts, all older than Unicode 8."""
    rng = random.Random(SEED)
    ranges = ((1, 0x300), (0x300, 0x370), (0x400, 0x530), (0x5D0, 0x5EB), (0x2000, 0x2400), (0x3041, 0x3097),
              (0x4E00, 0x4F00), (0xAC00, 0xAC80), (0xFF00, 0xFFF0), (0x1F300, 0x1F580))  # fmt: skip
    pool = [chr(code) for low, high in ranges for code in range(low, high)]
    common = ["[SEP]", "[MASK]", *"   ", *"[X] the cats Über İ ΑΣ $5 's".split(), "x" * 101]
    lengths = (rng.randrange(40) for _ in range(count))
    return ["".join(rng.choice(pool if rng.random() < 0.4 else common) for _ in range(n)) for n in lengths]
