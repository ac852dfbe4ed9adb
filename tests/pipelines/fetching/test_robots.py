"""robots.txt as RFC 9309 has it: groups, the longest rule, wildcards; and files that mean no good."""

from __future__ import annotations

import time

import pytest

from pipelines.fetching.robots import Robots, matches, parse_robots

AGENT = "latent-diffusion-pipelines/1.0 (+https://example.org)"


@pytest.mark.parametrize("pattern, path, expected", [
    ("/", "/any", True), ("/a", "/abc", True), ("/a", "/b", False), ("/a$", "/a", True), ("/a$", "/ab", False),
    ("/*.jpg", "/x/y.jpg?z", True), ("/*.jpg$", "/x/y.jpg", True), ("/*.jpg$", "/x/y.jpg?z", False),
    ("/*.jpg$", "/x.jpg/y.jpg", True), ("/a*b*c", "/a--b--c--", True), ("/a*b*c", "/a--c--b--", False),
    ("*/private", "/x/private/y", True), ("/ab*b$", "/ab", False), ("/ab*b$", "/abb", True), ("/a*$", "/a", True),
    ("/a**b", "/aXb", True),
])  # fmt: skip
def test_patterns(pattern: str, path: str, expected: bool) -> None:
    assert matches(pattern, path) is expected


def allowed(text: str, path: str, agent: str = AGENT) -> bool:
    return parse_robots(text, agent).allows(path)


def test_the_longest_rule_decides_and_of_equal_ones_the_one_that_allows() -> None:
    text = "User-agent: *\nDisallow: /\nAllow: /pictures/\nDisallow: /pictures/private\nAllow: /x\nDisallow: /x"
    assert [allowed(text, path) for path in ("/", "/pictures/a", "/pictures/private/a", "/x")] == [
        False, True, False, True,
    ]  # fmt: skip


def test_our_own_groups_stand_in_for_those_for_everybody() -> None:
    text = """# rules
user-agent: other
User-Agent: Latent-Diffusion-Pipelines/2   # any version of us
disallow: /ours

User-agent: *
Disallow: /all
user-agent: latent-diffusion-pipelines
Disallow: /more
"""
    assert [allowed(text, path) for path in ("/ours", "/more", "/all")] == [False, False, True]
    assert [allowed(text, path, "somebody") for path in ("/ours", "/more", "/all")] == [True, True, False]


@pytest.mark.parametrize("text", [
    "", "User-agent: *\nDisallow:", "Disallow: /\n", "\0\xff garbage", "User-agent: x\nDisallow: /",
])  # fmt: skip
def test_what_forbids_nothing_allows_everything(text: str) -> None:
    assert allowed(text, "/anything")


def test_escapes_do_not_hide_a_path() -> None:
    assert not allowed("User-agent: *\nDisallow: /k%C3%A4se", "/käse/bild")
    assert not allowed("User-agent: *\nDisallow: /käse", "/k%c3%a4se/bild")


def test_hostile_patterns_cost_little() -> None:
    rules = Robots((("/" + "a*" * 2000 + "b$", False),))
    started = time.process_time()
    assert rules.allows("/" + "a" * 8000)
    assert time.process_time() - started < 2  # a backtracking matcher would take years
