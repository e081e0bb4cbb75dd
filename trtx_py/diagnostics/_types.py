"""What a diagnosis consists of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

#: "problem": something that was meant to work does not; "note": worth knowing.
Severity = Literal["problem", "note"]


@dataclass(frozen=True)
class Finding:
    """Something that does not work here, and what to do about it."""

    severity: Severity
    subject: str
    text: str
    cure: str


@dataclass(frozen=True)
class Gpu:
    """One GPU, as the driver describes it; see DeviceProperties."""

    ordinal: int
    name: str
    compute_capability: str
    total_bytes: int
    uuid: str


@dataclass(frozen=True)
class FlavourStatus:
    """One member of the TensorRT family, as found here.

    Attributes:
        name: its import name, which ``backend=`` takes.
        installed: its module is here; that does not say that it can be loaded.
        version: None where it could not be asked.
        parses, builds, runs: what it can do on this machine.
        builds_for_others: it builds for GPU architectures that are named, also without a GPU.
        gpus: for each GPU, whether this flavour supports its architecture; None where TensorRT alone knows.
        problems: why it cannot do what it cannot.
        ended: how the process that looked at it ended, if not as it should: "crashed", "hung"; empty otherwise.
        install: the command that installs it.
    """

    name: str
    installed: bool
    version: str | None
    parses: bool
    builds: bool
    runs: bool
    builds_for_others: bool
    gpus: Mapping[int, bool | None]
    problems: tuple[str, ...]
    ended: str
    install: str


@dataclass(frozen=True)
class Extra:
    """An optional part of this package: which of its packages are installed, by name."""

    name: str
    installed: bool
    versions: Mapping[str, str | None]
    gives: str


@dataclass(frozen=True)
class PlanVerdict:
    """Whether a plan runs on this machine.

    Attributes:
        path: of the file.
        built_with: flavour and version; empty if it is no plan.
        compute_capabilities: that it was built for.
        runs_on: backends here that can run it.
        problems: why others, or all, cannot.
    """

    path: str
    built_with: str
    compute_capabilities: tuple[str, ...]
    runs_on: tuple[str, ...]
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Diagnosis:
    """What was found on a machine.

    Attributes:
        summary: three lines at most: the main problem and its cure, and what works; or that all is well.
        findings: what does not work, the most important first.
        driver: "CUDA version of the driver", None without a usable one; ``driver_problem`` says why.
        gpus, flavours: what was found; flavours that are not installed are there too.
        mock: what the mock computes with; ``mock_problem`` says why it cannot.
        cache: path, whether it exists, plans, bytes, and what is wrong with it.
        c_library: path of libtrtxpy, None if it is not built.
        plan: of the plan that was asked about.
        next_steps: commands, in the order in which they help.
        versions: of this package, Python and the operating system.
    """

    summary: tuple[str, ...]
    findings: tuple[Finding, ...]
    driver: str | None
    driver_problem: str
    gpus: tuple[Gpu, ...]
    flavours: tuple[FlavourStatus, ...]
    mock: str | None
    mock_problem: str
    extras: tuple[Extra, ...]
    cache: Mapping[str, object]
    c_library: str | None
    plan: PlanVerdict | None
    next_steps: tuple[str, ...]
    versions: Mapping[str, str]
