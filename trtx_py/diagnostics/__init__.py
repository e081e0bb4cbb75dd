"""What is here and what works: ``diagnose()`` for this machine, ``describe(path)`` for a plan or an ONNX model.

Both need neither a GPU nor TensorRT. ``trtx doctor`` and ``trtx inspect`` print them.
"""

from ._describe import ModelDescription, describe
from ._diagnose import diagnose
from ._types import Diagnosis, Extra, Finding, FlavourStatus, Gpu, PlanVerdict

__all__ = [
    "Diagnosis",
    "Extra",
    "Finding",
    "FlavourStatus",
    "Gpu",
    "ModelDescription",
    "PlanVerdict",
    "describe",
    "diagnose",
]
