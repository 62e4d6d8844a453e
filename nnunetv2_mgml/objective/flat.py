"""`MGMLConfig`: the options under flat names, as version 0.1 had them; kept for one version."""

from __future__ import annotations

import dataclasses
from typing import Any

from nnunetv2_mgml.objective import Options


class MGMLConfig(Options):
    """`Options` that is built from, and answers to, flat names.

    Args:
        options: option name -> value.
    """

    def __init__(self, **options: Any) -> None:
        built = Options().updated(options)
        super().__init__(*(getattr(built, spec.name) for spec in dataclasses.fields(Options)))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self.names():
            raise AttributeError(f"{type(self).__name__} has no option {name}.")
        return self.value(name)

    def updated(self, changes: dict[str, Any]) -> MGMLConfig:
        """Return a copy with some options changed; see `Options.updated`."""
        return type(self)(**{**self.as_dict(), **changes})
