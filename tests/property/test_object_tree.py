"""A state machine over the object tree: whatever is made, closed, dropped and broken in any order, against a model.

The model knows only who owns and who borrows whom. It says which close is refused and which object is open; what is
really open, what is allocated and what was destroyed in the wrong order must agree with it after every step.

TRTX_PROPERTY_EXAMPLES sets the number of examples (default 60; a thousand take some minutes).
"""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import trtx_py as trtx
from mock_backend import MockBackend, fail
from tests.unit.ownership import SAMPLE, WEIGHTS, matmul_model, shared_plan

EXAMPLES = int(os.environ.get("TRTX_PROPERTY_EXAMPLES", "60"))
STEPS = 40

#: How each kind is made from its owner, and native calls that take part in it, each of which may fail.
MAKERS: dict[str, tuple[str, Callable[[Any], Any], list[str]]] = {
    "Network": ("Builder", lambda builder: builder.create_network(), ["create_network"]),
    "BuilderConfig": ("Builder", lambda builder: builder.create_config(), []),
    "OptimizationProfile": ("Builder", lambda builder: builder.create_optimization_profile(), []),
    # Without graphs: once its shape is captured, an inference does not meet the fault that run_inference plans.
    "Engine": ("Runtime", lambda runtime: runtime.deserialize_sync(shared_plan(), cuda_graphs=False), ["deserialize"]),
    "ExecutionContext": ("Engine", lambda engine: engine.create_execution_context(),
                         ["create_context", "device_memory_bytes"]),
    "Stream": ("Device", lambda device: device.create_stream(),
               ["cuStreamCreate", "cuCtxPushCurrent", "cuCtxPopCurrent"]),
    "Event": ("Device", lambda device: device.create_event(), ["cuEventCreate"]),
    "DeviceBuffer": ("Device", lambda device: device.allocate(64), ["cuMemAlloc", "cuCtxPopCurrent"]),
    "PinnedBuffer": ("Device", lambda device: device.allocate_pinned(64), ["cuMemHostAlloc"]),
}  # fmt: skip

#: Something that works on an open object and is a ClosedError on a closed one.
USES: dict[str, Callable[[Any], object]] = {
    "Logger": lambda logger: trtx.Device if logger.closed else None,
    "Builder": lambda builder: builder.create_config().close(),
    "Network": lambda network: network.num_layers,
    "BuilderConfig": lambda config: config.set_flag("TF32"),
    "OptimizationProfile": lambda profile: profile.set_shape("x", (1,), (1,), (1,)),
    "Runtime": lambda runtime: runtime.version,
    "Engine": lambda engine: engine.num_layers,
    "ExecutionContext": lambda context: context.get_tensor_shape("x"),
    "Device": lambda device: device.free_bytes(),
    "Stream": lambda stream: stream.synchronize(),
    "Event": lambda event: event.query(),
    "DeviceBuffer": lambda buffer: buffer.address,
    "PinnedBuffer": lambda buffer: buffer.address,
}


@dataclass(eq=False)
class Node:
    """One object as the model sees it. ``item`` is None once it was dropped."""

    kind: str
    label: str
    parent: Node | None
    item: Any
    open: bool = True
    children: list[Node] = field(default_factory=list)
    lent_to: dict[str, Node] = field(default_factory=dict)  # a buffer: which context uses it, by tensor name

    def subtree(self) -> list[Node]:
        return [self] + [node for child in self.children for node in child.subtree()]

    def open_children(self) -> list[Node]:
        return [child for child in self.children if child.open]

    def lent_outside(self, root: Node) -> bool:
        inside = set(map(id, root.subtree()))
        return any(id(context) not in inside for node in self.subtree() for context in node.lent_to.values())


class ObjectTree(RuleBasedStateMachine):
    nodes = Bundle("nodes")

    def __init__(self) -> None:
        super().__init__()
        self.backend = MockBackend()
        self.made: list[Node] = []
        self.lost = 0  # native objects whose destruction was made to fail

    # Making.

    @rule(target=nodes)
    def make_logger(self) -> Node:
        return self.enter(None, trtx.Logger(handler=lambda *_: None))

    @rule(target=nodes, kind=st.sampled_from([trtx.Builder, trtx.Runtime]))
    def make_without_logger(self, kind: Any) -> Node:
        return self.enter(None, kind(None, self.backend))

    @rule(target=nodes)
    def make_device(self) -> Node:
        return self.enter(None, trtx.Device(0, backend=self.backend))

    @rule(target=nodes, owner=nodes, data=st.data())
    def make(self, owner: Node, data: Any) -> Node:
        """A child of ``owner``, or, where it can have none or is closed, the proof of that."""
        kinds = [kind for kind, (owner_kind, _, _) in MAKERS.items() if owner_kind == owner.kind]
        if owner.item is None or not (kinds or owner.kind == "Logger"):
            return owner
        if owner.kind == "Logger":
            maker: Any = data.draw(st.sampled_from([trtx.Builder, trtx.Runtime]))
            create, calls = (
                (lambda logger: maker(logger, self.backend)),
                ["cuDevicePrimaryCtxRetain", "cuCtxPushCurrent"],
            )
        else:
            _, create, calls = MAKERS[data.draw(st.sampled_from(kinds))]
        if not owner.open:
            event("make below a closed owner")
            with pytest.raises(trtx.ClosedError):
                create(owner.item)
            return owner
        failure = data.draw(st.sampled_from([None, None, *calls]))
        if failure is not None:
            event(f"failure in {failure}")
            self.backend.inject(fail(failure))
            with pytest.raises(trtx.TrtxError, match="fault injected"):
                create(owner.item)
            self.backend.clear_faults()
            return owner
        return self.enter(owner, create(owner.item))

    def enter(self, parent: Node | None, item: Any) -> Node:
        node = Node(type(item).__name__, str(item._handle), parent, item)
        self.made.append(node)
        if parent is not None:
            parent.children.append(node)
        return node

    # Using.

    @rule(node=nodes)
    def use(self, node: Node) -> None:
        if node.item is None:
            return
        if node.open:
            USES[node.kind](node.item)
        elif node.kind != "Logger":
            event("use after close")
            with pytest.raises(trtx.ClosedError, match=node.label.split(" ")[0]):
                USES[node.kind](node.item)
        assert node.item.closed is not node.open

    @rule(node=nodes)
    def parse(self, node: Node) -> None:
        if node.kind == "Network" and node.open and node.item is not None and node.item._source is None:
            node.item.parse_onnx(matmul_model())
            node.label = str(node.item._handle)

    @rule(node=nodes, broken=st.booleans())
    def run_inference(self, node: Node, broken: bool) -> None:
        """On an engine, or on a context, which then forgets the buffers that were lent to it."""
        if node.item is None or not node.open or node.kind not in ("Engine", "ExecutionContext"):
            return
        call = node.item.infer_sync if node.kind == "Engine" else node.item.execute_sync
        if broken:
            self.backend.inject(fail("set_input_shape"))
            with pytest.raises(trtx.TrtxError, match="fault injected"):
                call({"x": SAMPLE})
            self.backend.clear_faults()
        else:
            np.testing.assert_allclose(call({"x": SAMPLE})["y"], SAMPLE @ WEIGHTS, rtol=1e-5)
        self.return_loans(node)

    @rule(context=nodes, buffer=nodes, name=st.sampled_from(["x", "y"]))
    def lend(self, context: Node, buffer: Node, name: str) -> None:
        if context.kind != "ExecutionContext" or buffer.kind != "DeviceBuffer" or not context.open:
            return
        if context.item is None or buffer.item is None:
            return
        if not buffer.open:
            with pytest.raises(trtx.ClosedError):
                context.item.set_tensor_address(name, buffer.item)
            return
        event("lend")
        for other in self.made:
            if other.lent_to.get(f"{name} of {context.label}") is context:
                del other.lent_to[f"{name} of {context.label}"]
        context.item.set_tensor_address(name, buffer.item)
        buffer.lent_to[f"{name} of {context.label}"] = context

    def return_loans(self, context: Node) -> None:
        for other in self.made:
            other.lent_to = {key: who for key, who in other.lent_to.items() if who is not context}

    # Closing.

    @rule(node=nodes, broken=st.booleans())
    def close(self, node: Node, broken: bool) -> None:
        if node.item is None:
            return
        if not node.open:
            node.item.close()
        elif node.open_children() or node.lent_outside(node):
            event("close refused")
            with pytest.raises(trtx.BorrowedError) as caught:
                node.item.close()
            for child in node.open_children():
                assert any(who.startswith(child.label) for who in caught.value.borrowers)
        else:
            self.breaking(broken and node.kind in ("Builder", "Network", "Runtime"), node.item.close)
            self.mark_closed(node)

    @rule(node=nodes, broken=st.booleans())
    def aclose(self, node: Node, broken: bool) -> None:
        if node.item is None:
            return
        if node.open and node.lent_outside(node):
            event("aclose refused")
            with pytest.raises(trtx.BorrowedError, match="lent to"):
                asyncio.run(node.item.aclose())
            return
        native = {"Builder", "Network", "Runtime", "Engine", "ExecutionContext"}
        breaks = broken and any(n.open and n.kind in native for n in node.subtree())
        self.breaking(breaks, lambda: asyncio.run(node.item.aclose()))
        self.mark_closed(node)

    def breaking(self, breaks: bool, close: Callable[[], None]) -> None:
        """Close, perhaps with one native destruction that fails: an error, and closed all the same."""
        if not breaks:
            close()
            return
        event("destroy fails")
        self.backend.inject(fail("destroy"))
        with pytest.raises(trtx.TrtxError, match="fault injected"):
            close()
        self.backend.clear_faults()
        self.lost += 1

    def mark_closed(self, root: Node) -> None:
        for node in root.subtree():
            node.open = False
            node.lent_to.clear()
            if node.kind == "ExecutionContext":
                self.return_loans(node)

    @precondition(lambda self: self.made)
    @rule(node=consumes(nodes))
    def drop(self, node: Node) -> None:
        """Forget an object and all below it: what is open is collected, children first."""
        if node.open and node.lent_outside(node):
            return
        event("drop")
        self.mark_closed(node)
        for part in node.subtree():
            part.item = None
        gc.collect()

    @invariant()
    def model_and_library_agree(self) -> None:
        found = [item for item in trtx.live_objects() if not item.internal]
        owners = {item.label: item.owner for item in found}
        expected = {n.label: None if n.parent is None else n.parent.label for n in self.made if n.open}
        if owners.keys() - expected.keys():
            gc.collect()  # an object that native code referred to until now
            found = [item for item in trtx.live_objects() if not item.internal]
            owners = {item.label: item.owner for item in found}
        assert owners == expected
        assert {item.state for item in found} <= {"open"}
        assert all("test_object_tree.py" in item.made_at for item in found)
        damage = self.backend.damage()
        assert damage == [] or self.lost, damage

    def teardown(self) -> None:
        open_roots = [node for node in self.made if node.parent is None and node.open and node.item is not None]
        while open_roots:
            root = next(node for node in open_roots if not node.lent_outside(node))
            open_roots.remove(root)
            asyncio.run(root.item.aclose())
            self.mark_closed(root)
        assert trtx.live_objects() == []
        # What could not be destroyed is lost, and nothing else; its memory went with the context it lay in.
        leaks = [text for text in self.backend.leaks() if "still there when its context ended" not in text]
        assert len(leaks) == self.lost, leaks
        self.backend.close()


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_object_tree() -> None:
    gc.collect()
    gc.freeze()  # what was there before cannot become garbage here: without this, collecting takes most of the time
    try:
        run_state_machine_as_test(
            ObjectTree,
            settings=settings(
                max_examples=EXAMPLES, stateful_step_count=STEPS, deadline=None,
                suppress_health_check=list(HealthCheck), print_blob=True,
            ),
        )  # fmt: skip
    finally:
        gc.unfreeze()
