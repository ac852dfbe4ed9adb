"""The rules by which rows of metadata fall, in their one order, as SQL expressions over our own column names.

A row falls by the first rule that holds for it, so that every dropped row has one reason. Rules about columns that the
data set lacks (null in dataset.source.columns) are left out, and `describe` says so; but a deny-list is there to keep
something out, and without its column it is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from pipelines.metadata.mended_text import NOT_UTF8
from pipelines.settings import FilterMetadataConfig

NEEDED = ("url", "caption")
SHAPE = ("width", "height")
COMPUTED = {"url_md5": "md5(url)", "url_sha256": "sha256(url)"}  # what a deny-list may hold beside mapped columns
DUPLICATES = {"url_caption": "duplicate_url_caption", "url": "duplicate_url"}  # what is equal -> reason
HOST = "lower(regexp_extract(url, '^[A-Za-z][A-Za-z0-9+.-]*://(?:[^/?#@]*@)?([^/:?#]+)', 1))"
CONTROL = r"[\x00-\x08\x0B\x0C\x0E-\x1F\x7F]"  # also NUL, which ends a string for half of all programs


@dataclass(frozen=True)
class Rule:
    """A row falls when `sql` holds; `words` say it to people."""

    reason: str
    words: str
    sql: str
    joins: bool = False  # it looks into a table, after which DuckDB gives rows in any order


def wanted_columns(settings: FilterMetadataConfig) -> list[str]:
    """Our names of the columns that the settings filter on, beside url and caption."""
    denied = [name for name in settings.deny_lists if name not in COMPUTED]
    return list(dict.fromkeys([*denied, *SHAPE, *settings.bounds, *settings.one_of]))


def rules(settings: FilterMetadataConfig, columns: set[str]) -> list[Rule]:
    """All rules on the columns that are there, in the order in which they are asked."""
    return [*_text_rules(), *_source_rules(settings, columns), *_size_rules(settings, columns),
            *_score_rules(settings, columns), *_caption_rules(settings)]  # fmt: skip


def _text_rules() -> Iterator[Rule]:
    yield Rule("not_utf8", "a text of the row is not UTF-8", f"coalesce(url = {quoted(NOT_UTF8)}, false)")
    yield Rule("no_url", "there is no URL", _blank("url"))
    yield Rule("no_caption", "there is no caption", _blank("caption"))


def _source_rules(settings: FilterMetadataConfig, columns: set[str]) -> Iterator[Rule]:
    for name in settings.deny_lists:
        if name in columns or name in COMPUTED:
            value = COMPUTED.get(name, "trim(url)" if name == "url" else f"lower({name}::VARCHAR)")
            listed = f"coalesce({value} IN (SELECT value FROM {deny_table(name)}), false)"
            yield Rule(f"denied_{name}", f"{name} is on a deny-list", listed, joins=True)
    if settings.deny_domains:
        below = f"regexp_matches({HOST}, {_domains(settings.deny_domains)})"
        yield Rule("denied_domain", f"the host belongs to one of {len(settings.deny_domains)} denied domains", below)
    if settings.allow_domains:
        outside = f"NOT regexp_matches({HOST}, {_domains(settings.allow_domains)})"
        yield Rule("other_domain", f"the host belongs to none of {len(settings.allow_domains)} domains", outside)
    if settings.deny_urls:
        yield Rule("denied_url", "the URL matches a denied pattern", f"regexp_matches(url, {_any(settings.deny_urls)})")
    if settings.allow_urls:
        outside = f"NOT regexp_matches(url, {_any(settings.allow_urls)})"
        yield Rule("other_url", "the URL matches none of the allowed patterns", outside)


def _size_rules(settings: FilterMetadataConfig, columns: set[str]) -> Iterator[Rule]:
    if columns.issuperset(SHAPE):
        unknown = " OR ".join(_no_number(side) for side in SHAPE)
        small = f"{unknown} OR least(width, height) < {settings.min_size}"
        yield Rule("too_small", f"the shorter side is under {settings.min_size} pixels, or unknown", small)
        long = f"greatest(width, height) > {settings.max_aspect} * least(width, height)"
        yield Rule("extreme_shape", f"the longer side is over {settings.max_aspect} times the shorter one", long)


def _score_rules(settings: FilterMetadataConfig, columns: set[str]) -> Iterator[Rule]:
    for score, (low, high) in settings.bounds.items():
        if score in columns:
            outside = [_no_number(score)]
            outside += [f"{score} < {low}"] if low is not None else []
            outside += [f"{score} > {high}"] if high is not None else []
            span = f"{'' if low is None else low}..{'' if high is None else high}"
            yield Rule(score, f"{score} lies outside {span}, or is unknown", " OR ".join(outside))
    for name, values in settings.one_of.items():
        if name in columns:
            listed = ", ".join(map(quoted, values))
            known = f"coalesce({name}::VARCHAR IN ({listed}), false)"
            yield Rule(name, f"{name} is none of {', '.join(values)}", f"NOT {known}")


def _caption_rules(settings: FilterMetadataConfig) -> Iterator[Rule]:
    least, most, words = settings.min_caption_chars, settings.max_caption_chars, settings.min_caption_words
    padded = f"(starts_with(caption, ' ') OR ends_with(caption, ' ')) AND length(trim(caption)) < {least}"
    short = f"length(caption) < {least} OR ({padded})"  # to trim every caption would take ten times as long
    yield Rule("short_caption", f"the caption has fewer than {least} characters", short)
    if words > 1:
        enough = rf"regexp_matches(caption, '(\S+\s+){{{words - 1}}}\S')"
        yield Rule("few_words", f"the caption has fewer than {words} words", f"NOT {enough}")
    if most is not None:
        yield Rule("long_caption", f"the caption has more than {most} characters", f"length(caption) > {most}")
    hidden = f"{_holds_control('url')} OR {_holds_control('caption')}"
    yield Rule("control_characters", "the URL or the caption holds NUL or another control character", hidden)


def check(settings: FilterMetadataConfig, columns: dict[str, str | None]) -> None:
    """Raises ValueError for settings that no data set could follow, and for columns that nothing is said of."""
    unsaid = [name for name in [*NEEDED, *wanted_columns(settings)] if name not in columns and name not in SHAPE]
    if unsaid or not all(columns[name] for name in NEEDED):
        raise ValueError(
            f"dataset.source.columns does not say which columns hold {', '.join(unsaid or NEEDED)}; it has "
            f"{', '.join(columns)}. Name them there, or write null for one that the data set lacks"
        )
    idle = [name for name in settings.deny_lists if name not in COMPUTED and columns[name] is None]
    if idle:
        mapped = ", ".join(f"{name}: {column}" for name, column in columns.items() if column is not None)
        raise ValueError(
            f"dataset.filter_metadata.deny_lists.{idle[0]} would deny nothing: dataset.source.columns says null for "
            f"{idle[0]}; it maps {mapped}. Set dataset.source.columns.{idle[0]}=NAME_IN_THE_FILES, or give a list for "
            f"what every data set has: url, {', '.join(COMPUTED)}"
        )
    odd = [name for name in columns if not re.fullmatch(r"[a-z_][a-z0-9_]*", name)]
    if odd:
        raise ValueError(f"dataset.source.columns: our own names are a-z, 0-9 and _ only; found {', '.join(odd)}")
    if unknown := [name for name in settings.deduplicate if name not in DUPLICATES]:
        raise ValueError(f"dataset.filter_metadata.deduplicate: found {unknown}; expected some of {list(DUPLICATES)}")


def describe(settings: FilterMetadataConfig, columns: dict[str, str | None]) -> str:
    """The rules in their order, and what is not filtered on because the data set lacks it."""
    there = {name for name, column in columns.items() if column is not None}
    lines = ["a row falls by the first of these that holds:"]
    lines += [f"  {rule.reason:<22} {rule.words}" for rule in rules(settings, there)]
    lines += [f"  {DUPLICATES[same]:<22} an earlier row that stays has the same {same.replace('_', ' and ')}"
              for same in DUPLICATES if same in settings.deduplicate]
    lacking = [name for name in wanted_columns(settings) if name not in there]
    if lacking:
        lines.append(f"not filtered on, for the data set has no such column: {', '.join(lacking)}")
    return "\n".join(lines)


def deny_table(name: str) -> str:
    return f"deny_{name}"


def quoted(text: str) -> str:
    """A string as SQL writes it."""
    return "'" + text.replace("'", "''") + "'"


def _blank(column: str) -> str:
    """Nothing but blanks; what begins with anything above a space need not be looked through."""
    return rf"NOT coalesce({column} > '!' OR regexp_matches({column}, '\S'), false)"


def _holds_control(column: str) -> str:
    """Only text in which JSON would write something as an escape (or that holds DEL, which it does not) is searched:
    to count bytes takes a fifth of the time of a pattern."""
    suspect = f"strlen(to_json({column})) <> strlen({column}) + 2 OR contains({column}, chr(127))"
    return f"(({suspect}) AND regexp_matches({column}, '{CONTROL}'))"


def _no_number(column: str) -> str:
    return f"NOT coalesce(isfinite({column}::DOUBLE), false)"


def _domains(domains: list[str]) -> str:
    """A pattern for hosts that are one of the domains or lie below one."""
    return quoted(rf"(^|\.)({'|'.join(re.escape(domain.lower()) for domain in domains)})\.?$")


def _any(patterns: list[str]) -> str:
    return quoted("|".join(f"(?:{pattern})" for pattern in patterns))
