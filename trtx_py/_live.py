"""What is open: a list of the ownership tree."""

from __future__ import annotations

from dataclasses import dataclass

from ._resource import Handle, _process, _reap_now


@dataclass(frozen=True)
class LiveObject:
    """One open object, as ``live_objects()`` lists it.

    Attributes:
        kind: class name.
        label: class name, number and name where there is one.
        owner: label of the object that owns it, None for a root.
        depth: 0 for roots.
        made_at: file, line and function of the caller that made it.
        host_bytes, device_bytes: memory that it holds itself, without its children.
        state: "opening", "open" or "closing".
        internal: made by its owner for itself, not by the caller.
    """

    kind: str
    label: str
    owner: str | None
    depth: int
    made_at: str
    host_bytes: int
    device_bytes: int
    state: str
    internal: bool

    def __str__(self) -> str:
        memory = "".join(
            f", {n:,} bytes {where}" for n, where in ((self.host_bytes, "host"), (self.device_bytes, "device")) if n
        )
        return f"{'  ' * self.depth}{self.label} [{self.state}] made at {self.made_at}{memory}"


def live_objects() -> list[LiveObject]:
    """Everything of this process that is open, owners before what they own; empty when nothing is.

    Objects that were garbage collected without being closed are released first.
    """
    _reap_now()
    found: list[LiveObject] = []

    def visit(handle: Handle, depth: int) -> None:
        owner = None if handle.parent is None else str(handle.parent)
        found.append(
            LiveObject(
                handle.kind, str(handle), owner, depth, handle.made_at,
                handle.host_bytes, handle.device_bytes, handle.state.value, handle.internal,
            )
        )  # fmt: skip
        for child in list(handle.children.values()):
            visit(child, depth + 1)

    with _process.lock:
        for root in list(_process.roots.values()):
            visit(root, 0)
    return found
