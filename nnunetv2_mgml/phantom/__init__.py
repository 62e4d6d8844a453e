"""Seeded synthetic brains with tumours, in the file layouts of BraTS: for the demo, tests and benchmarks.

They look like skull-stripped glioma MRI and share its difficulty for missing modalities: edema shows in FLAIR and T2,
enhancement only in T1ce, a plain T1 has little more than the mass; white-matter lesions, cavities and vessels make
every single sequence ambiguous. They are no model of anatomy and no evidence about patients.
"""

from nnunetv2_mgml.phantom.case import Phantom, make_case, make_phantom
from nnunetv2_mgml.phantom.difficulty import Difficulty
from nnunetv2_mgml.phantom.files import write_phantoms

__all__ = ["Difficulty", "Phantom", "make_case", "make_phantom", "write_phantoms"]
