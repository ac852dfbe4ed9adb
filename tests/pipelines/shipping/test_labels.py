"""Names, values and tables as MLflow takes them."""

from __future__ import annotations

import pytest

from pipelines.shipping.labels import safe_name, shorten, to_csv


@pytest.mark.parametrize(
    ("name", "safe"),
    [("loss", "loss"), ("../../etc/x", "etc/x"), ("a//./c", "a/c"), ("loss (%)", "loss ___"), ("ö:1", "_:1")],
)
def test_safe_name(name: str, safe: str) -> None:
    assert safe_name(name) == safe


def test_long_values_are_cut_with_their_length_and_hash() -> None:
    assert shorten("x" * 6000, 6000) == "x" * 6000
    cut = shorten("x" * 6001, 6000)
    assert len(cut) == 6000 and "6001 characters, sha256 " in cut


def test_table_has_every_column() -> None:
    assert to_csv([{"stage": "download", "in": 4}, {"stage": "train", "out": 3}]) == (
        "stage,in,out\r\ndownload,4,\r\ntrain,,3\r\n"
    )
