"""The diagnosis of a machine."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from typing import Any

from ..backends._flavours import FLAVOURS, Flavour
from ._asking import Probe, ask_all, is_installed, run_probe
from ._extras import extras
from ._findings import findings, next_steps, summary
from ._plan_check import check_plan
from ._types import Diagnosis, FlavourStatus, Gpu


def diagnose(plan: str | os.PathLike[str] | None = None, *, probe: Probe = run_probe) -> Diagnosis:
    """What is on this machine, what works, and what to do about what does not.

    Every library of a vendor is loaded in a process of its own, with a timeout: one that crashes or hangs is a finding.

    Args:
        plan: path of a plan; the diagnosis then says whether it runs here.
        probe: what looks at "driver" and at each flavour, for tests.
    Raises: nothing for what is wrong with the machine or the plan.
    """
    installed = {name: is_installed(flavour.bindings) for name, flavour in FLAVOURS.items()}
    answers = ask_all(["driver", *(name for name, here in installed.items() if here)], probe)
    driver = answers["driver"]
    gpus = tuple(Gpu(**gpu) for gpu in driver.get("gpus", ()))
    flavours = tuple(_status(flavour, installed[name], answers.get(name), gpus) for name, flavour in FLAVOURS.items())
    verdict = None if plan is None else check_plan(os.fspath(plan), flavours, gpus)
    mock, mock_problem = _mock()
    cache = _cache()
    problem = str(driver.get("problem", ""))
    found = findings(problem, gpus, flavours, mock_problem, cache, verdict)
    return Diagnosis(
        summary=summary(found, gpus, flavours, mock, verdict),
        findings=found,
        driver=driver.get("version"),
        driver_problem=problem,
        gpus=gpus,
        flavours=flavours,
        mock=mock,
        mock_problem=mock_problem,
        extras=extras(),
        cache=cache,
        c_library=_c_library(),
        plan=verdict,
        next_steps=next_steps(found),
        versions=_versions(),
    )


def _status(flavour: Flavour, installed: bool, answer: Mapping[str, Any] | None, gpus: Sequence[Gpu]) -> FlavourStatus:
    supported: dict[int, bool | None] = {}
    for gpu in gpus:
        major, minor = (int(part) for part in gpu.compute_capability.split("."))
        # An empty list says that TensorRT decides, not that it takes all.
        supported[gpu.ordinal] = flavour.runs_on_capability(major, minor) if flavour.runs_on else None
    known = answer or {}
    problems = tuple(known.get("problems", ())) or tuple(filter(None, [known.get("problem")]))
    version = known.get("version")
    if known.get("runs") and not flavour.own_runtime and not os.environ.get("TRTX_LEAN_LIBRARY"):
        problems += ("it runs plans that carry their own runtime; others need TRTX_LEAN_LIBRARY",)
    return FlavourStatus(
        name=flavour.name,
        installed=installed,
        version=version,
        parses=version is not None and flavour.can_build,
        builds=bool(known.get("builds", False)),
        runs=bool(known.get("runs", False)),
        builds_for_others=version is not None and flavour.can_target,
        gpus=supported,
        problems=problems,
        ended=str(known.get("ended", "")),
        install=flavour.install_hint,
    )


def _mock() -> tuple[str | None, str]:
    for package in ("mock_backend", "onnx"):
        if not is_installed([package]):
            return None, f"{package} is not installed; reinstall trtx-py, which needs it"
    if is_installed(["onnxruntime"]):
        return "onnxruntime", ""
    return "onnx.reference", ""


def _cache() -> dict[str, object]:
    from .._errors import TrtxError

    try:
        from ..cache._cache import EngineCache

        cache = EngineCache()
        there = os.path.isdir(cache.root)
        entries = cache.list() if there else ()
    except (TrtxError, ImportError) as error:
        return {"path": getattr(error, "path", None), "exists": None, "plans": 0, "bytes": 0, "problem": str(error)}
    writable = os.access(_nearest_folder(cache.root), os.W_OK | os.X_OK)
    problem = "" if writable else f"the engine cache {cache.root!r} cannot be written, so every build starts anew"
    return {
        "path": cache.root, "exists": there, "plans": len(entries), "bytes": sum(each.size_bytes for each in entries),
        "problem": problem,
    }  # fmt: skip


def _nearest_folder(path: str) -> str:
    while not os.path.exists(path) and os.path.dirname(path) != path:
        path = os.path.dirname(path)
    return path


def _c_library() -> str | None:
    from ..capi import _paths

    path = _paths.library()
    return path if os.path.isfile(path) else None


def _versions() -> dict[str, str]:
    from importlib import metadata

    try:
        own = metadata.version("trtx-py")
    except metadata.PackageNotFoundError:
        own = "not installed (a checkout)"
    return {"trtx_py": own, "python": platform.python_version(), "system": platform.platform()}
