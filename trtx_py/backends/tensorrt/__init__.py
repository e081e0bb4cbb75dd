"""The TensorRT family behind the TensorRT seam: the only package that imports tensorrt and its siblings, lazily."""

from ._backend import TensorRTFamilyBackend

__all__ = ["TensorRTFamilyBackend"]
