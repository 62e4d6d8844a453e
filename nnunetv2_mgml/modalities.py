"""The one home of modality facts: names, aliases, channel order, subsets, and the mask they become.

A *subset* is a tuple of ``M`` bools in the channel order of the model's ``dataset.json``; True means present. Channel
order is never assumed: every function that needs it takes ``channels``, the names in file order.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any

Subset = tuple[bool, ...]

ALIASES: dict[str, tuple[str, ...]] = {
    "t1": ("t1", "t1n", "t1w"),
    "t1ce": ("t1ce", "t1c", "t1gd", "t1post"),
    "t2": ("t2", "t2w"),
    "flair": ("flair", "t2f", "t2flair"),
}
"""Canonical BraTS name -> every spelling accepted for it (compared in lower case, punctuation dropped)."""

BRATS_CHANNELS: tuple[str, ...] = ("t1", "t1ce", "t2", "flair")
"""Channel order our converter writes: that of nnU-Net's own Dataset137_BraTS21."""

BRATS_FILE_SUFFIXES: dict[str, dict[str, str]] = {
    "brats2021": {name: f"_{name}" for name in BRATS_CHANNELS},
    "brats2023": {"t1": "-t1n", "t1ce": "-t1c", "t2": "-t2w", "flair": "-t2f"},
}
"""File naming of the challenge (``<case><suffix>.nii.gz``): up to 2021 and since 2023 -> modality -> suffix."""

BRATS_OTHER_SUFFIXES: dict[str, dict[str, str]] = {
    naming: {
        f"{separator}{alias}": name
        for name, aliases in ALIASES.items()
        for alias in aliases
        if f"{separator}{alias}" != BRATS_FILE_SUFFIXES[naming][name]
    }
    for naming, separator in (("brats2021", "_"), ("brats2023", "-"))
}
"""What others call them, such as ``_t1Gd`` and ``-t1post``: naming -> suffix in lower case -> modality."""

BRATS_SEGMENTATION_SUFFIX: dict[str, str] = {"brats2021": "_seg", "brats2023": "-seg"}
"""The same for the segmentation."""

PAPER_CHANNELS: tuple[str, ...] = ("flair", "t1ce", "t1", "t2")
"""Row order of the MGML paper's Table 3, used to lay out four-modality tables."""

_CANONICAL = {alias: name for name, aliases in ALIASES.items() for alias in aliases}


def canonical_name(name: str) -> str:
    """Return the canonical spelling of a modality name.

    Args:
        name: any spelling, for example ``"T1Gd"`` or ``"T2-FLAIR"``.

    Returns:
        The BraTS name where the spelling is an alias of one, else letters and digits of the name in lower case.
    """
    bare = re.sub(r"[\W_]", "", name.lower())
    return _CANONICAL.get(bare, bare)


def channel_names(dataset_json: dict[str, Any]) -> tuple[str, ...]:
    """Return the model's modality names in channel order.

    Args:
        dataset_json: content of nnU-Net's ``dataset.json`` (``channel_names``, or the old key ``modality``).

    Returns:
        ``M`` canonical names, ordered by channel index (``"0"``, ``"1"``, ...).

    Raises:
        ValueError: the key is missing, an index is skipped or no number, a name is without letters and digits, or two
            channels have the same canonical name.
    """
    names = dataset_json.get("channel_names", dataset_json.get("modality"))
    if not names:
        raise ValueError(
            "dataset.json has neither 'channel_names' nor 'modality'; add channel_names, for example "
            '{"0": "T1", "1": "FLAIR"}.'
        )
    if not isinstance(names, dict):
        raise ValueError(
            f"channel_names of dataset.json must be an object, found {str(names)[:60]}. "
            f'Write, for example, {{"0": "T1", "1": "FLAIR"}}.'
        )
    wrong = [str(index) for index in names if not str(index).isdecimal()]
    if wrong:
        raise ValueError(
            f"The keys of channel_names in dataset.json are channel numbers, found {', '.join(wrong)}. "
            f'Write, for example, {{"0": "T1", "1": "FLAIR"}}.'
        )
    spelled = {int(index): str(name) for index, name in names.items()}
    by_index = {index: canonical_name(name) for index, name in spelled.items()}
    if sorted(by_index) != list(range(len(by_index))):
        raise ValueError(
            f"channel_names of dataset.json must be numbered 0 to {len(by_index) - 1}, found {sorted(by_index)}."
        )
    ordered = tuple(by_index[i] for i in range(len(by_index)))
    _check_distinct(ordered, spelled)
    return ordered


def _check_distinct(channels: Sequence[str], spelled: dict[int, str]) -> None:
    nameless = [f"{i} {spelled[i]!r}" for i, name in enumerate(channels) if not name]
    if nameless:
        raise ValueError(
            f"channel_names of dataset.json need at least one letter or digit each: {', '.join(nameless)} has none."
        )
    doubles = [
        f"{name} ({', '.join(repr(spelled[i]) for i, other in enumerate(channels) if other == name)})"
        for name in sorted(set(channels))
        if channels.count(name) > 1
    ]
    if doubles:
        raise ValueError(
            f"channel_names of dataset.json name the same modality twice: {', '.join(doubles)}. "
            f"Every channel needs a name of its own."
        )


def channel_index(name: str, channels: Sequence[str], owner: str = "This model") -> int:
    """Return the channel index of a modality name (aliases accepted).

    Args:
        name: of a modality.
        channels: modality names in channel order.
        owner: what has these channels, as messages call it.

    Raises:
        ValueError: there is no such modality; the message lists those there are and their aliases.
    """
    wanted = canonical_name(name)
    canonical = [canonical_name(c) for c in channels]
    if wanted in canonical:
        return canonical.index(wanted)
    allowed = ", ".join(_with_aliases(c) for c in canonical)
    raise ValueError(f"Unknown modality '{name}'. {owner} has: {allowed}.")


def _with_aliases(name: str) -> str:
    others = [a for a in ALIASES.get(name, ()) if a != name]
    return f"{name} (also {'/'.join(others)})" if others else name


def subset_from_present(present: Iterable[str], channels: Sequence[str], owner: str = "This model") -> Subset:
    """Return the subset in which exactly the named modalities are present; ``owner`` as in `channel_index`.

    Raises:
        ValueError: an unknown name, or no modality at all.
    """
    indices = {channel_index(name, channels, owner) for name in present}
    if not indices:
        raise ValueError(f"No modality is present. At least one of {', '.join(channels)} is needed.")
    return tuple(i in indices for i in range(len(channels)))


def subset_from_missing(missing: Iterable[str], channels: Sequence[str]) -> Subset:
    """Return the subset in which the named modalities are absent and all others present.

    Raises:
        ValueError: an unknown name, or every modality named as missing.
    """
    missing = list(missing)
    indices = {channel_index(name, channels) for name in missing}
    if len(indices) == len(channels):
        raise ValueError(
            f"All modalities are named as missing ({', '.join(missing)}); at least one of "
            f"{', '.join(channels)} must be present."
        )
    return tuple(i not in indices for i in range(len(channels)))


def parse_subset(text: str, channels: Sequence[str]) -> Subset:
    """Parse ``"t1+flair"`` (or ``"all"``) into a subset. Raises ValueError as `subset_from_present` does."""
    if text.strip().lower() == "all":
        return (True,) * len(channels)
    return subset_from_present(split_names(text, channels), channels)


def split_names(text: str, channels: Sequence[str]) -> list[str]:
    """Return the modality names of a text in which plus or comma stand between them; blanks around them are dropped.

    A name that holds one of these itself (``T1+C``) is kept whole where the channel is called so, or where it is
    another name of a channel and its parts are not all channels.
    """
    pieces = re.split(r"([+,])", text)
    names, start = [], 0
    while start < len(pieces):
        ends = range(len(pieces), start, -2)
        end = next(e for e in ends if e == start + 1 or _is_one_name(pieces[start:e], channels))
        names.append("".join(pieces[start:end]).strip())
        start = end + 1
    return [name for name in names if name]


def _is_one_name(pieces: Sequence[str], channels: Sequence[str]) -> bool:
    name = "".join(pieces).strip().lower()
    if name in (channel.strip().lower() for channel in channels):
        return True
    known = {canonical_name(channel) for channel in channels}
    return canonical_name(name) in known and not all(canonical_name(part) in known for part in pieces[::2])


def subset_name(subset: Sequence[bool], channels: Sequence[str]) -> str:
    """Return the inverse of `parse_subset`: the present names joined by ``+``, in channel order."""
    return "+".join(name for name, present in zip(channels, subset, strict=True) if present)


def all_subsets(num_modalities: int) -> list[Subset]:
    """Return the ``2^M - 1`` non-empty subsets, by size and then in lexicographic order of the channel indices."""
    if num_modalities < 1:
        raise ValueError(f"num_modalities must be at least 1, got {num_modalities}.")
    return [
        tuple(i in chosen for i in range(num_modalities))
        for size in range(1, num_modalities + 1)
        for chosen in itertools.combinations(range(num_modalities), size)
    ]


def table_order(channels: Sequence[str]) -> list[Subset]:
    """Return all subsets in table order: that of the paper's Table 3 for the BraTS four, else `all_subsets`.

    Returns:
        ``2^M - 1`` subsets in the channel order of ``channels``.
    """
    rows = table_rows(channels)
    position = [list(rows).index(canonical_name(c)) for c in channels]
    return [tuple(subset[p] for p in position) for subset in all_subsets(len(rows))]


def table_rows(channels: Sequence[str]) -> tuple[str, ...]:
    """Return the modality names in the row order of a table (the paper's for the BraTS four, else channel order)."""
    canonical = tuple(canonical_name(c) for c in channels)
    return PAPER_CHANNELS if set(canonical) == set(PAPER_CHANNELS) else canonical
