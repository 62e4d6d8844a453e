"""Lists of names in messages."""

from __future__ import annotations

from pathlib import Path

from nnunetv2_mgml.io.names import some


def test_the_first_ten_and_a_count() -> None:
    assert some([]) == ""
    assert some(range(10)) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9"
    assert some(f"case_{i}" for i in range(366)).endswith("case_8, case_9 and 356 more")
    assert some([Path("a"), Path("b"), Path("c")], shown=1) == "a and 2 more"
