"""What a plan depends on, as one hash. Whatever is not known to be the same must give another one."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .._build import DEFAULT_AXIS_RANGE, DEFAULT_BATCH_RANGE, BuildRequest
from .._errors import BackendUnavailableError, CudaError, InvalidArgumentError
from .._onnx_source import onnx_sha256
from ..backends.protocols import TensorRTBackend
from ..cuda._properties import device_properties
from ._content import UncacheableError, builder_options, calibration, fields_of, flags, plain, texts

#: Raised by one whenever this file changes what a key is made of, or this package builds other plans of the same.
_GENERATION = 1
_KERNEL_DRIVER = "/proc/driver/nvidia/version"
#: What TensorRT and CUDA read when they build.
_ENVIRONMENT = ("NVIDIA_TF32_OVERRIDE",)


@dataclass(frozen=True)
class PlanKey:
    """Names a plan before it is built.

    Attributes:
        digest: 64 hexadecimal digits.
        model_sha256: of the model and all its weights, a part of the key that the build can be compared with.
        model: what to call the model.
    """

    digest: str
    model_sha256: str
    model: str


def plan_key(request: BuildRequest, given_up: Callable[[], bool] = lambda: False) -> PlanKey:
    """The key of what ``request`` would build.

    Reads the whole model, in pieces.

    Raises:
        GivenUpError: ``given_up`` was True before it was read.
        UncacheableError: an option or a backend of which it is not known what it stands for.
        ParserError, InvalidArgumentError: as the build would.
    """
    options = dict(request.options)
    weights = options.pop("weights", None)
    unknown = options.keys() - _OPTIONS.keys()
    if unknown:
        raise UncacheableError(f"no rule says what the options {', '.join(sorted(unknown))} stand for")
    given = {name: _OPTIONS[name](value) for name, value in sorted(options.items()) if value is not None}
    precision = None if request.precision is None else plain(request.precision)
    profiles = None if request.profiles is None else plain(request.profiles)
    grouped = given.get("builder_options", {})
    capabilities = given.get("compute_capabilities") or grouped.get("compute_capabilities")
    here = _environment(request.backend, request.device, capabilities)
    model = onnx_sha256(request.model, weights, given_up)
    parts = {
        "model": model,
        "profiles": [DEFAULT_BATCH_RANGE, DEFAULT_AXIS_RANGE] if profiles is None else {"given": profiles},
        "precision": [precision, _libraries()] if precision or grouped.get("precision") else None,
        "options": given,
        **here,
    }
    name = os.path.basename(request.model) if isinstance(request.model, str) else "ONNX model (bytes)"
    return PlanKey(_hashed(parts), model, name)


def kernels_key(plan_sha256: str, backend: TensorRTBackend, device: int) -> str:
    """The key of what a runtime compiles for one plan on one device. Raises UncacheableError."""
    return _hashed({"kernels of": plan_sha256, **_environment(backend, device, None)})


def timings_key(backend: TensorRTBackend, device: int) -> str:
    """The key of the times that a TensorRT has measured on one device. Raises UncacheableError."""
    here = _environment(backend, device, None)
    return _hashed({"timings": [here["backend"], here["device"], here["driver"]]})


def _environment(backend: TensorRTBackend, device: int, capabilities: Any) -> dict[str, Any]:
    """The TensorRT, the driver and the GPU that there are, or the architectures that were asked for."""
    from .. import __version__

    describe: Callable[[], Mapping[str, Any] | None] | None = getattr(backend, "plan_settings", None)
    settings = describe() if describe is not None else None
    if settings is None:
        raise UncacheableError(f"the backend {backend.info.name} does not say what its plans depend on (plan_settings)")
    try:
        driver: int | None = backend.driver.cuDriverGetVersion()
        where = capabilities or _gpu(backend, device)
    except BackendUnavailableError:
        if not capabilities:
            raise UncacheableError("there is no GPU to build for") from None
        driver, where = None, capabilities
    except CudaError as error:
        raise UncacheableError(f"the driver does not say what it is: {error.message}") from error
    info = backend.info
    return {
        "generation": _GENERATION,
        "trtx_py": __version__,
        "backend": [info.name, info.flavour, info.version],
        "settings": plain(settings),
        "device": where,
        "driver": [driver, _kernel_driver()],
        "environment": {name: os.environ.get(name) for name in _ENVIRONMENT},
    }


def _gpu(backend: TensorRTBackend, device: int) -> dict[str, str]:
    try:
        found = device_properties(device, backend)
    except InvalidArgumentError as error:
        raise UncacheableError(error.message) from error
    # Tactics are timed on this very model: TensorRT warns of plans from another of the same architecture.
    return {"name": found.name, "compute_capability": found.compute_capability}


def _kernel_driver() -> str | None:
    """The driver's full version, which the CUDA version that it implements does not tell."""
    try:
        with open(_KERNEL_DRIVER, encoding="utf-8", errors="replace") as file:
            return file.readline()
    except OSError:
        return None


def _hashed(parts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _libraries() -> dict[str, str | None]:
    """What converts a model to another precision."""
    from importlib import metadata  # slow to import

    found: dict[str, str | None] = {}
    for name in ("numpy", "onnx", "onnxruntime"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


#: The options of a build, each with what makes it comparable. What is not here is not cached.
_OPTIONS: dict[str, Callable[[Any], Any]] = {
    "workspace_bytes": plain,
    "optimization_level": plain,
    "max_aux_streams": plain,
    "profile_sharing": plain,
    "compute_capabilities": texts,
    "flags": flags,
    "calibration": calibration,
    "precision_policy": fields_of,
    "require_precision": plain,
    "builder_options": builder_options,
}
