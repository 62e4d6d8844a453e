"""The terms as published, for reproduction: ``reading=paper`` the text, ``reading=reference`` its code.

Importing this package registers them. A reading replaces the terms it has a form of; the others stay as they are.
"""

from nnunetv2_mgml.objective.published import paper, reference

__all__ = ["paper", "reference"]
