"""What a trainer fixes, its bases included."""

from __future__ import annotations

from typing import Any


def merged_overrides(trainer: type) -> dict[str, Any]:
    """Return the ``config_overrides`` of a trainer's bases, and over them those of its own.

    ``fusion_options`` are merged as well, unless the trainer fixes another design than its base: then they go with it.
    """
    merged: dict[str, Any] = {}
    for base in reversed(trainer.__mro__):
        own = vars(base).get("config_overrides", {})
        inherited = merged.pop("fusion_options", {})
        if own.get("fusion", merged.get("fusion")) == merged.get("fusion"):
            own = {**own, "fusion_options": {**inherited, **own.get("fusion_options", {})}}
        merged.update(own)
    return {name: value for name, value in merged.items() if name != "fusion_options" or value}
