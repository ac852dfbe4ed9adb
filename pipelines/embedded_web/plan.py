"""The plan of the embedded web: for every row of its metadata what it claims, what is served, and how it will fall.

Most rows of a web like LAION's fall, and for many reasons. Here each reason has its kind of row in known numbers, so
that what a pipeline counts can be held against what there was to count. Everything follows from (rows, pictures, seed).
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from pipelines.embedded_web.drawings import Drawing, drawings
from pipelines.embedded_web.pictures import FORMATS, LAID, SUBJECTS, UNSTEADY, Picture, by_hexcode
from pipelines.settings import SampleWebConfig

# Invented hosts under a domain that no name service knows (RFC 6761).
SHY_HOST = "gallery.quiet.test"  # its robots.txt forbids /private/, and nothing else
HOSTS = ("cdn.harbour.test", "img.meadow.test", "blog.lantern.test", "static.orchard.test", "www.copper-shop.test",
         SHY_HOST)  # fmt: skip
ENDLESS_BYTES = 64 << 20  # of a body that is too large
FOLDERS = ("images", "uploads/2019", "photos", "wp-content/2021/03", "media/large")


@dataclass(frozen=True)
class Kind:
    """One way in which rows fall, or do not."""

    name: str
    stage: str  # where they fall; "" for the good ones
    reason: str
    share: int  # rows of 1,024; of what the metadata shows, the weight in what all other kinds leave over


KINDS = (
    Kind("no_url", "filter_metadata", "no_url", 6),
    Kind("empty_url", "filter_metadata", "no_url", 4),
    Kind("no_caption", "filter_metadata", "no_caption", 8),
    Kind("blank_caption", "filter_metadata", "no_caption", 6),
    Kind("claims_small", "filter_metadata", "too_small", 120),
    Kind("claims_nothing", "filter_metadata", "too_small", 8),
    Kind("claims_extreme", "filter_metadata", "extreme_shape", 30),
    Kind("unlike_caption", "filter_metadata", "similarity", 290),
    Kind("junk_similarity", "filter_metadata", "similarity", 6),
    Kind("no_similarity", "filter_metadata", "similarity", 4),
    Kind("unsafe", "filter_metadata", "punsafe", 30),
    Kind("watermark", "filter_metadata", "pwatermark", 100),
    Kind("short_caption", "filter_metadata", "short_caption", 24),
    Kind("same_url", "filter_metadata", "duplicate_url", 26),
    Kind("same_url_and_caption", "filter_metadata", "duplicate_url_caption", 18),
    Kind("missing", "download", "http_404", 48),
    Kind("gone", "download", "http_410", 8),
    Kind("failing", "download", "http_500", 8),
    Kind("dripping", "download", "timeout", 4),
    Kind("silent", "download", "timeout", 4),
    Kind("circling", "download", "redirect_loop", 6),
    Kind("inward", "download", "blocked_address", 6),
    Kind("endless", "download", "too_large", 4),
    Kind("opted_out", "download", "opt_out", 8),
    Kind("private", "download", "robots", 12),
    Kind("page", "download", "not_an_image", 16),
    Kind("cut", "download", "truncated", 10),
    Kind("bomb", "download", "too_many_pixels", 4),
    Kind("small", "filter_images", "too_small", 12),
    Kind("extreme", "filter_images", "extreme_shape", 12),
    Kind("copy", "selection", "near_duplicate", 36),
    Kind("good", "", "", 0),  # exactly SampleWebConfig.pictures
)
FATE = {kind.name: (kind.stage, kind.reason) for kind in KINDS}


@dataclass(frozen=True)
class Row:
    """One row of the metadata and what lies behind its URL."""

    number: int  # in the order of planning; rows are shuffled afterwards
    kind: str
    picture: Picture
    url: str | None
    caption: str | None
    width: int  # pixels, as the metadata claims
    height: int
    similarity: float | None
    punsafe: float
    pwatermark: float
    hops: int = 0  # redirects before the picture
    original: int | None = None  # number of the row that this one repeats


def counts(config: SampleWebConfig) -> dict[str, int]:
    """How many rows of each kind a web of this size has. Raises ValueError for sizes that cannot be had."""
    if not 1 <= config.pictures <= len(SUBJECTS):
        raise ValueError(f"dataset.sample_web.pictures={config.pictures}; expected 1 to {len(SUBJECTS)}")
    later = [kind for kind in KINDS if kind.stage not in ("", "filter_metadata")]
    found = {kind.name: max(1, round(kind.share * config.rows / 1024)) for kind in later}
    found["good"] = config.pictures
    first = [kind for kind in KINDS if kind.stage == "filter_metadata"]
    left, weights = config.rows - sum(found.values()), sum(kind.share for kind in first)
    if left < len(first):
        raise ValueError(
            f"dataset.sample_web.rows={config.rows} is too few for pictures={config.pictures}: "
            f"expected at least {config.rows - left + len(first)}, one row of every kind"
        )
    exact = {kind.name: (left - len(first)) * kind.share / weights for kind in first}  # above the one that each has
    found |= {name: 1 + int(share) for name, share in exact.items()}
    unfair = sorted(exact, key=lambda name: int(exact[name]) - exact[name])
    for name in unfair[: config.rows - sum(found.values())]:
        found[name] += 1
    return {kind.name: found[kind.name] for kind in KINDS}


def plan(config: SampleWebConfig) -> list[Row]:
    """All rows in the order of the metadata; a row that repeats another stands after it."""
    rng = random.Random(config.seed)
    rows = list(_rows(counts(config), rng))
    rng.shuffle(rows)
    at = {row.number: i for i, row in enumerate(rows)}
    for row in list(rows):
        if row.original is not None and at[row.number] < at[row.original]:
            i, j = at[row.number], at[row.original]
            rows[i], rows[j] = rows[j], rows[i]
            at[rows[i].number], at[rows[j].number] = i, j
    return rows


def _rows(numbers: dict[str, int], rng: random.Random) -> Iterator[Row]:
    good = []
    for i, hexcode in enumerate(SUBJECTS[: numbers["good"]]):
        form = list(FORMATS)[i] if i < len(FORMATS) else None  # every format, also in the smallest web
        row = _sound(len(good), "good", by_hexcode()[hexcode], _picture(hexcode, rng, form), rng)
        good.append(replace(row, hops={5: 2, 17: 1}.get(i % 24, 0)))
    yield from good
    steady = [row for row in good if row.picture.hexcode not in UNSTEADY]
    others = [drawing for drawing in drawings() if drawing.hexcode not in SUBJECTS and len(drawing.caption) > 2]
    rng.shuffle(others)
    number = len(good)
    for kind in KINDS[:-1]:
        for i in range(numbers[kind.name]):
            drawing = others[number % len(others)]
            row = _sound(number, kind.name, drawing, _picture(drawing.hexcode, rng), rng)
            yield _spoil(row, steady[i * 7 % len(steady)], rng)
            number += 1


def _picture(hexcode: str, rng: random.Random, form: str | None = None, shape: float | None = None) -> Picture:
    """A picture of 130 to 400 pixels (small ones are more frequent), square, 4:3 or 3:4."""
    side, shape = 130 + int(270 * rng.random() ** 2), rng.random() if shape is None else shape
    form = form or rng.choices(list(FORMATS), list(FORMATS.values()))[0]
    width, height = (round(side * 4 / 3) if wide else side for wide in (shape > 0.85, 0.7 < shape <= 0.85))
    return Picture(hexcode, width, height, form, rng.choice(list(LAID)) if form == "turned_jpeg" else 1)


def _sound(number: int, kind: str, drawing: Drawing, picture: Picture, rng: random.Random) -> Row:
    """A row that passes every filter of the metadata."""
    slug = re.sub("[^a-z0-9]+", "-", drawing.caption.lower()).strip("-")
    # A name says little about the content: WebP pictures pretend to be JPEG.
    suffix = {"jpeg": "jpg", "webp": "jpg"}.get(picture.suffix, picture.suffix)
    return Row(
        number=number,
        kind=kind,
        picture=picture,
        url=f"http://{rng.choice(HOSTS)}/{rng.choice(FOLDERS)}/{slug}-{number:04}.{suffix}",
        caption=drawing.caption,
        width=picture.width,
        height=picture.height,
        similarity=round(rng.uniform(0.29, 0.42), 6),
        punsafe=round(rng.uniform(0.0, 0.3), 6),
        pwatermark=round(rng.uniform(0.0, 0.6), 6),
    )


def _spoil(row: Row, good: Row, rng: random.Random) -> Row:
    """What makes a sound row one of its kind; `good` is a row for it to repeat."""
    picture, number = row.picture, row.number
    match row.kind:
        case "no_url" | "empty_url":
            return replace(row, url=None if row.kind == "no_url" else "")
        case "no_caption" | "blank_caption":
            return replace(row, caption=None if row.kind == "no_caption" else "   ")
        case "claims_small":
            return replace(row, width=rng.randint(20, 400), height=rng.randint(16, 64))
        case "claims_nothing":
            return replace(row, width=0, height=0)
        case "claims_extreme":
            return replace(row, width=rng.randint(900, 1400), height=rng.randint(130, 200))
        case "unlike_caption":
            return replace(row, similarity=round(rng.uniform(0.08, 0.27), 6))
        case "junk_similarity":
            return replace(row, similarity=float(rng.randint(2, 6016)))
        case "no_similarity":
            return replace(row, similarity=None)
        case "unsafe":
            return replace(row, punsafe=round(rng.uniform(0.6, 1.0), 6))
        case "watermark":
            return replace(row, pwatermark=round(rng.uniform(0.85, 1.0), 6))
        case "short_caption":
            return replace(row, caption=rng.choice(("ok", "1", ":)", "jp")))
        case "same_url":
            return replace(row, url=good.url, original=good.number)
        case "same_url_and_caption":
            return replace(row, url=good.url, caption=good.caption, original=good.number)
        case "private":
            return replace(row, url=f"http://{SHY_HOST}/private/{number:04}.{picture.suffix}")
        case "cut":
            return replace(row, picture=replace(picture, format="jpeg", orientation=1))
        case "small":  # the metadata still claims what is asked for
            return replace(row, picture=replace(picture, width=rng.randint(40, 64), height=rng.randint(40, 64)))
        case "extreme":
            return replace(row, picture=replace(picture, width=130 * rng.randint(4, 6), height=130))
        case "copy":
            shape = {0: 0.0, 1: 1.0, -1: 0.8}[(good.width > good.height) - (good.width < good.height)]
            again = _picture(good.picture.hexcode, rng, shape=shape)
            return replace(row, picture=again, width=again.width, height=again.height, original=good.number,
                           caption=f"{good.caption} picture")  # fmt: skip
    return row
