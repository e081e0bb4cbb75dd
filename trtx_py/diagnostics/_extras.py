"""The optional parts of this package, and the packages that each needs."""

from __future__ import annotations

from importlib import metadata

from ._types import Extra

#: By name: distributions, and what they are for. The names are those of pyproject.toml's extras.
EXTRAS: dict[str, tuple[tuple[str, ...], str]] = {
    "mock": (("onnxruntime",), "the mock computes fast"),
    "quantize": (("onnxruntime", "pillow"), "calibration, compare"),
    "convert": (("onnxruntime", "onnxslim"), "conversion of models"),
    "torch": (("torch", "onnxscript", "safetensors"), "conversion from PyTorch"),
    "tensorflow": (("tensorflow", "tf2onnx"), "conversion from TensorFlow"),
    "oip": (("starlette",), "the Open Inference Protocol"),
    "serve": (("starlette", "uvicorn"), "trtx serve"),
    "nvml": (("nvidia-ml-py",), "GPU utilisation, memory, clocks"),
    "prometheus": (("prometheus-client",), "metrics"),
    "opentelemetry": (("opentelemetry-api",), "traces and metrics"),
    "cli": (("click", "rich"), "this command line"),
    "ray": (("ray",), "Ray Serve"),
}


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def extras() -> tuple[Extra, ...]:
    """Each with what is installed of it; nothing is imported."""
    found = []
    for name, (packages, gives) in EXTRAS.items():
        versions = {package: _version(package) for package in packages}
        found.append(Extra(name, all(version is not None for version in versions.values()), versions, gives))
    return tuple(found)
