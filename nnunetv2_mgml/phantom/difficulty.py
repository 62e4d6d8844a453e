"""How hard the phantoms are."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Difficulty:
    """Factors on what makes a case hard; the defaults leave room between a good and a bad model.

    Attributes:
        tumor_contrast: 1: tumour tissue as far from healthy tissue as in a textbook case, 0: invisible.
        anatomy: spread of shapes, folds and tissue contrasts between cases; 0: all alike but for the tumour.
        distractors: expected number of lesions, cavities and vessels that are no tumour, against the default.
        noise: noise level against the default.
    """

    tumor_contrast: float = 0.7
    anatomy: float = 1.0
    distractors: float = 1.0
    noise: float = 1.0

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: ``tumor_contrast`` outside 0 to 1, or another factor outside 0 to 5.
        """
        for name, high in (("tumor_contrast", 1), ("anatomy", 5), ("distractors", 5), ("noise", 5)):
            value = getattr(self, name)
            if not 0 <= value <= high:
                raise ValueError(f"Phantom difficulty {name} must be 0 to {high}, got {value}.")
