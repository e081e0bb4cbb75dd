"""Chooses a backend by name, by environment, or by what is installed and can serve. Imports vendors only when asked."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from typing import Any, Literal

from .._arguments import checked_path, closest
from .._errors import BackendUnavailableError, EngineError, InvalidArgumentError
from .._types import BackendInfo
from ._flavours import FLAVOURS, Flavour, lean_library_refusal, plan_fits
from .protocols import TensorRTBackend

Need = Literal["build", "run", "both"]

#: Names of the members of the family, best first: the order in which the default is chosen.
REAL_BACKENDS = tuple(FLAVOURS)
_JOINED_SUFFIX = "+mock"
BACKEND_VARIABLE = "TRTX_BACKEND"
LEAN_LIBRARY_VARIABLE = "TRTX_LEAN_LIBRARY"

_lock = threading.RLock()
_instances: dict[str, TensorRTBackend] = {}


@dataclass(frozen=True)
class BackendStatus:
    """One backend as found on this machine.

    Attributes:
        name: what it is chosen by.
        info: None if it cannot be loaded.
        builds: it can build here.
        runs: it can run plans here.
        reasons: why it cannot do what it cannot.
        install: the command that installs it.
    """

    name: str
    info: BackendInfo | None
    builds: bool
    runs: bool
    reasons: tuple[str, ...]
    install: str


def backend_names() -> tuple[str, ...]:
    """Every name that ``resolve_backend`` takes."""
    builders = (name + _JOINED_SUFFIX for name, flavour in FLAVOURS.items() if flavour.can_build)
    return ("mock", *REAL_BACKENDS, *builders)


def check_backend_name(name: str, source: str = "") -> None:
    """Raises InvalidArgumentError, which names what there is: there is no backend ``name``, which ``source`` gave."""
    names = backend_names()
    if name not in names:
        close = closest(name, names)
        hint = f"; did you mean {close!r}?" if close else ""
        raise InvalidArgumentError(f"there is no backend {name!r}{source}; there are {', '.join(names)}{hint}")


def resolve_backend(
    backend: str | TensorRTBackend | None,
    *,
    need: Need,
    plan_flavour: str | None = None,
    plan_version: str | None = None,
    lean_library: str | None = None,
) -> TensorRTBackend:
    """The backend to work with; one instance per name and process.

    Args:
        backend: a name; an object, which is passed through; None for the one that TRTX_BACKEND names or, if that is
            unset or empty, the best installed TensorRT that can serve the need. The mock is never chosen by default.
        need: what it will be used for.
        plan_flavour, plan_version: of the plan that is to run, where it is known.
        lean_library: path of the lean library that is to run it; None takes TRTX_LEAN_LIBRARY where it is of use.
    Raises:
        InvalidArgumentError: there is no backend of that name, or the object is none.
        BackendUnavailableError: the named one, or every one, cannot serve; says why and what to install.
    """
    if need not in ("build", "run", "both"):
        raise InvalidArgumentError(f"need is {need!r}; expected 'build', 'run' or 'both'")
    if backend is not None and not isinstance(backend, str):
        return _checked_object(backend)
    name = backend if backend is not None else os.environ.get(BACKEND_VARIABLE, "")
    request = _Request(need, plan_flavour, plan_version, lean_library)
    if backend is None and not name:
        return _best_installed(request)
    source = "" if backend is not None else f" ({BACKEND_VARIABLE})"
    check_backend_name(name, source)
    if name == "mock" or name.endswith(_JOINED_SUFFIX):
        return _instance(name)
    refusal = request.refusal(name)
    if refusal is not None:
        raise BackendUnavailableError(f"the backend {name!r}{source} cannot {_VERBS[need]} here: {refusal}")
    return _instance(name)


def _checked_object(backend: Any) -> TensorRTBackend:
    hint = f"expected None, one of {', '.join(backend_names())}, or a backend object such as MockBackend()"
    if isinstance(backend, type):
        raise InvalidArgumentError(f"backend is the class {backend.__name__}; {hint}: call it to make one")
    if not isinstance(getattr(backend, "info", None), BackendInfo):
        raise InvalidArgumentError(f"backend is {backend!r}, which has no BackendInfo in .info; {hint}")
    checked: TensorRTBackend = backend
    return checked


def lean_library_for(flavour: str, given: str | os.PathLike[str] | None) -> str | None:
    """The lean library that a runtime of this flavour is to load.

    What the caller gives is handed on, also to a flavour that will refuse it. TRTX_LEAN_LIBRARY is for those that can
    load one: the others, the mock among them, do not see it.
    """
    if given is not None:
        return checked_path(given, "lean_library")
    if flavour in FLAVOURS and FLAVOURS[flavour].loads_lean_library:
        return os.environ.get(LEAN_LIBRARY_VARIABLE) or None
    return None


def backend_status(name: str) -> BackendStatus:
    """What one real backend can do here, and why not what it cannot; imports it if it is installed.

    Raises InvalidArgumentError if there is no real backend of that name.
    """
    if name not in FLAVOURS:
        raise InvalidArgumentError(f"there is no real backend {name!r}; there are {', '.join(REAL_BACKENDS)}")
    build = _Request("build").refusal(name)
    run = _Request("run").refusal(name)
    try:
        info = _instance(name).info
    except BackendUnavailableError:
        info = None
    return BackendStatus(
        name=name,
        info=info,
        builds=build is None,
        runs=run is None,
        reasons=tuple(dict.fromkeys(reason for reason in (build, run) if reason is not None)),
        install=FLAVOURS[name].install_hint,
    )


def installed_backends() -> list[BackendStatus]:
    """Every real backend with what it can do here, and why not what it cannot; imports all that are installed."""
    return [backend_status(name) for name in REAL_BACKENDS]


_VERBS: dict[Need, str] = {"build": "build", "run": "run", "both": "build and run"}


@dataclass(frozen=True)
class _Request:
    need: Need
    plan_flavour: str | None = None
    plan_version: str | None = None
    lean_library: str | None = None

    def refusal(self, name: str) -> str | None:
        """Why the backend of that name cannot serve, None if it can. The cheapest reasons come first."""
        flavour = FLAVOURS[name]
        if self.need != "run" and not flavour.can_build:
            return f"{name} has no builder; install tensorrt or tensorrt-rtx to build"
        if self.need != "build" and self.plan_flavour is not None and self.plan_version is not None:
            # Flavours can be compared before anything is imported.
            reason = plan_fits(self.plan_flavour, self.plan_version, name, self.plan_version, True, None)
            if reason is not None:
                return reason
        try:
            info = _instance(name).info
            if self.need == "build" and not flavour.can_target and not info.can_run:
                return f"{name} {info.version} builds on a GPU only, and there is none: {_no_driver(name)}"
            if self.need != "build":
                return self._refusal_to_run(flavour, info)
        except BackendUnavailableError as error:
            return str(error)
        return None

    def _refusal_to_run(self, flavour: Flavour, info: BackendInfo) -> str | None:
        from .tensorrt import TensorRTFamilyBackend

        backend = _instance(flavour.name)
        if isinstance(backend, TensorRTFamilyBackend):
            reason = backend.refusal_to_run()
            if reason is not None:
                return reason
        lean_version = None
        lean_library = lean_library_for(flavour.name, self.lean_library)
        if lean_library is not None:
            if not flavour.loads_lean_library:
                return lean_library_refusal(flavour.name, info.version, "8.6")
            from .tensorrt._lean import lean_library_version

            try:
                lean_version = lean_library_version(lean_library)
            except EngineError as error:
                return str(error)
            refusal = lean_library_refusal(flavour.name, info.version, lean_version)
            if refusal is not None:
                return refusal
        if self.plan_flavour is None or self.plan_version is None:
            return None
        # Whether the plan is version-compatible is not known here; the runtime looks at the plan itself.
        return plan_fits(self.plan_flavour, self.plan_version, flavour.name, info.version, True, lean_version)


def _best_installed(request: _Request) -> TensorRTBackend:
    reasons = []
    for name in REAL_BACKENDS:
        refusal = request.refusal(name)
        if refusal is None:
            return _instance(name)
        reasons.append(f"  {name}: {refusal}")
    raise BackendUnavailableError(
        "\n".join(
            [
                f"no TensorRT here can {_VERBS[request.need]}{_plan_text(request)}; looked for:",
                *reasons,
                f"install one of them, or choose the mock with backend='mock' or {BACKEND_VARIABLE}=mock",
            ]
        )
    )


def _plan_text(request: _Request) -> str:
    if request.plan_flavour is None:
        return ""
    return f" a plan of {request.plan_flavour} {request.plan_version or '(version unknown)'}"


def _no_driver(name: str) -> str:
    try:
        count = _instance(name).driver.cuDeviceGetCount()
    except BackendUnavailableError as error:
        return str(error)
    return f"the driver shows {count} devices"


def _instance(name: str) -> TensorRTBackend:
    with _lock:
        if name not in _instances:
            _instances[name] = _make(name)
        return _instances[name]


def _make(name: str) -> TensorRTBackend:
    if name in FLAVOURS:
        from .tensorrt import TensorRTFamilyBackend

        return TensorRTFamilyBackend(name)
    try:
        from mock_backend import JoinedBackend, MockBackend
    except ImportError as error:
        raise BackendUnavailableError(
            f"the mock cannot be imported: {error}; reinstall trtx-py, which contains it"
        ) from error
    if name == "mock":
        return MockBackend()
    return JoinedBackend(_instance(name.removesuffix(_JOINED_SUFFIX)))
