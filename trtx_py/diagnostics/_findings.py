"""From facts to what they mean: the main problem, its cure, and what works all the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ._types import Finding, FlavourStatus, Gpu, PlanVerdict

_NO_MOCK_HARM = "or work without a GPU for now: TRTX_BACKEND=mock"


def findings(
    driver_problem: str,
    gpus: Sequence[Gpu],
    flavours: Sequence[FlavourStatus],
    mock_problem: str,
    cache: Mapping[str, object],
    plan: PlanVerdict | None,
) -> tuple[Finding, ...]:
    """What does not work, the most important first."""
    found: list[Finding] = []
    if plan is not None and not plan.runs_on:
        first = plan.problems[0] if plan.problems else "nothing here runs it"
        found.append(Finding("problem", "plan", f"{_name(plan.path)} does not run here: {_head(first)}", _tail(first)))
    installed = [flavour for flavour in flavours if flavour.installed]
    for flavour in installed:
        if flavour.version is None:
            text = _one_line(flavour.problems[0] if flavour.problems else "it cannot be loaded")
            found.append(
                Finding("problem", flavour.name, f"{flavour.name} is installed and cannot be used: {text}",
                        f"reinstall it: {flavour.install}; check that it fits Python, driver and CUDA")
            )  # fmt: skip
    if not gpus:
        found.append(_no_gpu(driver_problem, installed))
    elif not installed:
        names = ", ".join(f"{gpu.name} ({gpu.compute_capability})" for gpu in gpus)
        found.append(
            Finding("problem", "tensorrt", f"no TensorRT is installed, and here is {names}",
                    f"{_install_for(gpus)}; {_NO_MOCK_HARM}")
        )  # fmt: skip
    elif not any(flavour.runs for flavour in installed):
        found += _none_runs(gpus, [flavour for flavour in installed if flavour.version is not None])
    if mock_problem:
        found.append(Finding("problem", "mock", mock_problem, "pip install --force-reinstall trtx-py"))
    if cache.get("problem"):
        found.append(
            Finding("note", "cache", _head(str(cache["problem"])),
                    f"{_tail(str(cache['problem']))}, or name another folder with TRTX_CACHE_DIR")
        )  # fmt: skip
    return tuple(found)


def _no_gpu(problem: str, installed: Sequence[FlavourStatus]) -> Finding:
    if problem:
        text, cure = f"no usable GPU: {_head(problem)}", _tail(problem)
    else:
        text, cure = "the driver shows no GPU", "check nvidia-smi and CUDA_VISIBLE_DEVICES"
    builders = [flavour for flavour in installed if flavour.builds]
    if builders:
        names = " and ".join(f"{flavour.name} {flavour.version}" for flavour in builders)
        return Finding(
            "problem", "driver", f"{text} ({names} builds here, and does not run)", f"{cure}; {_NO_MOCK_HARM}"
        )
    if not installed:
        text += "; and no TensorRT is installed"
        cure += "; then pip install tensorrt-rtx or tensorrt"
    return Finding("problem", "driver", text, f"{cure}; {_NO_MOCK_HARM}")


def _none_runs(gpus: Sequence[Gpu], installed: Sequence[FlavourStatus]) -> list[Finding]:
    found = []
    for flavour in installed:
        reason = _one_line(flavour.problems[-1] if flavour.problems else "it does not say why")
        unsupported = flavour.gpus and all(supported is False for supported in flavour.gpus.values())
        if unsupported:
            names = ", ".join(f"{gpu.name} (compute capability {gpu.compute_capability})" for gpu in gpus)
            text = f"{flavour.name} {flavour.version} does not run on {names}"
            cure = f"{_install_for(gpus)}; {_NO_MOCK_HARM}"
        else:
            text = f"{flavour.name} {flavour.version} cannot run here: {_head(reason)}"
            cure = f"{_tail(reason)}; {_NO_MOCK_HARM}"
        found.append(Finding("problem", flavour.name, text, cure))
    return found


def _install_for(gpus: Sequence[Gpu]) -> str:
    """What runs on these GPUs, where that is known."""
    from ..backends._flavours import FLAVOURS

    rtx = FLAVOURS["tensorrt_rtx"]
    pairs = [tuple(int(part) for part in gpu.compute_capability.split(".")) for gpu in gpus]
    if pairs and all(rtx.runs_on_capability(*pair) for pair in pairs):
        return "pip install tensorrt-rtx, or pip install tensorrt"
    return "pip install tensorrt, or pip install tensorrt-dispatch-cu13 with a lean library for plans of older versions"


def summary(
    found: Sequence[Finding],
    gpus: Sequence[Gpu],
    flavours: Sequence[FlavourStatus],
    mock: str | None,
    plan: PlanVerdict | None,
) -> tuple[str, ...]:
    """Three lines at most."""
    works = [
        f"{flavour.name} {flavour.version} ({' and '.join(_abilities(flavour))})"
        for flavour in flavours
        if flavour.version is not None and _abilities(flavour)
    ]
    if mock is not None:
        works.append("the mock (builds and runs, on the CPU)")
    here = f"works: {', '.join(works) or 'nothing'}"
    problems = [each for each in found if each.severity == "problem"]
    if problems:
        more = f" (and {len(problems) - 1} more below)" if len(problems) > 1 else ""
        return (f"problem: {problems[0].text}{more}", f"cure: {problems[0].cure}", here)
    names = ", ".join(f"{gpu.name} ({gpu.compute_capability})" for gpu in gpus)
    first = f"ok: {names}" if plan is None else f"ok: {_name(plan.path)} runs here with {', '.join(plan.runs_on)}"
    return (first, here)


def _abilities(flavour: FlavourStatus) -> list[str]:
    return [verb for verb, can in (("builds", flavour.builds), ("runs", flavour.runs)) if can]


def next_steps(found: Sequence[Finding]) -> tuple[str, ...]:
    """The cures, in order, each once."""
    return tuple(dict.fromkeys(each.cure for each in found))


def _name(path: str) -> str:
    # The first three lines must be three lines.
    return path if path.isprintable() else repr(path)


def _one_line(text: str) -> str:
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())


def _head(text: str) -> str:
    """What is wrong; this package's messages end with the next step, behind a semicolon or a colon."""
    line = _one_line(text)
    head, mark, _ = line.rpartition("; ")
    if mark:
        return head
    head, mark, _ = line.rpartition(": ")
    return head if mark else line


def _tail(text: str) -> str:
    line = _one_line(text)
    for mark in ("; ", ": "):
        _, found, tail = line.rpartition(mark)
        if found:
            return tail
    return "see the message above"
