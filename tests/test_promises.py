"""What is promised is proven, by a test that is there and is named in the documentation."""

from __future__ import annotations

import re

from tests.promises import PAGE, PENDING, PROMISES, page, proofs


def test_every_promise_has_a_test() -> None:
    proven = {name for name, found in proofs().items() if any(one.holds for one in found)}
    assert [name for name in PROMISES if name not in proven] == sorted(PENDING)


def test_every_test_proves_something_that_is_promised() -> None:
    assert {name: found for name, found in proofs().items() if name not in PROMISES} == {}


def test_promises_are_in_order_and_none_is_left_out() -> None:
    numbers = [re.fullmatch(r"([A-G])(\d+)([a-z]?)", name) for name in PROMISES]
    keys = [(match[1], int(match[2]), match[3]) for match in numbers if match]
    assert len(keys) == len(PROMISES)
    assert keys == sorted(keys)
    assert sorted({number for _, number, _ in keys}) == list(range(1, 23))
    assert {(section, number) for section, number, letter in keys if not letter} == {key[:2] for key in keys}


def test_the_table_in_the_documentation_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "make docs writes it anew"
