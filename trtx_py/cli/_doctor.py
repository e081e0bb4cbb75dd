"""``trtx doctor``: what works on this machine, and what to do about what does not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ._app import command as make_command
from ._session import Session, console, one_line_name, size_text, table
from ._values import FILE

if TYPE_CHECKING:
    from rich.console import Console

    from ..diagnostics import Diagnosis

_plan = click.option("--plan", type=FILE, metavar="FILE",
                     help="Say whether this plan runs here.")  # fmt: skip


@make_command("doctor", _plan)
def command(session: Session, plan: str | None) -> None:
    """Say what works on this machine, what does not, and what to do about it.

    The exit code is 0 also when problems are found. Drivers and libraries are tried in processes of their own.
    """
    from ..diagnostics import diagnose

    found = diagnose(plan)
    session.answer(found, lambda: _show(found, console()))


def _show(found: Diagnosis, out: Console) -> None:
    for line in found.summary:
        click.echo(line)
    click.echo()
    versions = found.versions
    click.echo(f"trtx_py {versions['trtx_py']}, Python {versions['python']}, {versions['system']}")
    click.echo(f"driver: CUDA {found.driver}" if found.driver else f"driver: {found.driver_problem or 'none'}")
    for gpu in found.gpus:
        click.echo(
            f"GPU {gpu.ordinal}: {gpu.name}, compute capability {gpu.compute_capability}, {size_text(gpu.total_bytes)}"
        )
    click.echo()
    _show_flavours(found, out)
    if found.plan is not None:
        _show_plan(found)
    click.echo(f"mock: computes with {found.mock}" if found.mock else f"mock: {found.mock_problem}")
    if found.cache.get("problem"):
        click.echo(f"engine cache: {found.cache['problem']}")
    else:
        size = found.cache["bytes"]
        assert isinstance(size, int)
        click.echo(f"engine cache: {found.cache['path']}, {found.cache['plans']} plans, {size_text(size)}")
    click.echo(f"C library: {found.c_library or 'not built; bash scripts/build-native'}")
    click.echo()
    extras = table("extra", "", "packages", "for")
    for extra in found.extras:
        packages = ", ".join(f"{name} {version or '-'}" for name, version in extra.versions.items())
        extras.add_row(extra.name, "yes" if extra.installed else "no", packages, extra.gives)
    out.print(extras)
    if found.findings:
        click.echo("\nnext steps:")
        for number, finding in enumerate(found.findings, 1):
            click.echo(f"  {number}. {finding.text}\n     {finding.cure}")


def _show_flavours(found: Diagnosis, out: Console) -> None:
    rows = table("TensorRT", "version", "parses", "builds", "runs", "GPUs supported")
    remarks: list[str] = []
    for flavour in found.flavours:
        if not flavour.installed:
            rows.add_row(flavour.name, "-", "-", "-", "-", "-")
            remarks.append(f"{flavour.name} is not installed: {flavour.install}")
            continue
        words = {True: "yes", False: "no", None: "TensorRT decides"}
        gpus = ", ".join(f"{ordinal}: {words[supported]}" for ordinal, supported in flavour.gpus.items())
        remarks += [f"{flavour.name}: {' '.join(problem.split())}" for problem in flavour.problems]
        builds = "yes" if flavour.builds else "no"
        if flavour.builds and flavour.builds_for_others:
            builds = "yes, for named GPUs too"
        rows.add_row(
            flavour.name, flavour.version or flavour.ended or "?", "yes" if flavour.parses else "no", builds,
            "yes" if flavour.runs else "no", gpus or "-",
        )  # fmt: skip
    out.print(rows)
    for remark in remarks:  # in a column of a table they would be a dozen lines of one word
        click.echo(f"  {remark}")
    click.echo()


def _show_plan(found: Diagnosis) -> None:
    plan = found.plan
    assert plan is not None
    built = f", built with {plan.built_with}" if plan.built_with else ""
    targets = f" for {', '.join(plan.compute_capabilities)}" if plan.compute_capabilities else ""
    click.echo(
        f"plan: {one_line_name(plan.path)}{built}{targets}: "
        + (f"runs with {', '.join(plan.runs_on)}" if plan.runs_on else "does not run here")
    )
    for problem in plan.problems:
        click.echo(f"  {' '.join(problem.split())}")
    click.echo()
