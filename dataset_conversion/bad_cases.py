"""Cases that cannot be converted: how they are listed, and what a split is without them."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from nnunetv2_mgml.dataset_conversion.splits import Split


def bad_cases_text(bad: Mapping[str, Collection[str]], total: int) -> str:
    """Return all bad cases with what is wrong, a line each.

    Args:
        bad: case -> problems.
        total: how many cases there are; with more than the bad ones, the text says how to convert the others.
    """
    advice = " --skip_bad converts the others." if len(bad) < total else ""
    return "\n".join(
        [f"{len(bad)} of {total} case(s) are bad; nothing has been written.{advice}", *bad_case_lines(bad)]
    )


def bad_case_lines(bad: Mapping[str, Collection[str]]) -> list[str]:
    """Return a line for every bad case: its name and what is wrong."""
    return [f"  {name}: {'; '.join(problems)}" for name, problems in sorted(bad.items())]


def without_bad_cases(split: Split | None, bad: Mapping[str, Collection[str]]) -> Split | None:
    """Return a split without the bad cases.

    Raises:
        ValueError: nothing would be left to train on, or to validate with.
    """
    if split is None or not bad:
        return split
    rest = Split(*(tuple(name for name in part if name not in bad) for part in (split.train, split.val, split.test)))
    if not rest.train or not rest.val:
        raise ValueError(
            f"Without the bad cases the split has {rest}. Repair them, or choose another split.\n"
            f"{bad_cases_text(bad, len(bad))}"
        )
    return rest
