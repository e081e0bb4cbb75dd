"""What was added to a network so far: names, layers, outputs; and the ONNX model that it amounts to."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from .._arguments import closest
from .._errors import InvalidArgumentError
from ._definition import LayerRequest, TensorFacts
from ._onnx_graph import OnnxGraph, serialized
from ._table import TABLE

_NAME = re.compile(r"[^\x00-\x1f]+")


class Assembly:
    """The record of a network that is built layer by layer.

    Attributes:
        inputs, tensors: by the name that each was made with.
        layers: with their outputs, in order.
        outputs: tensors that are marked, by the name that the engine will have for them.
    """

    def __init__(self) -> None:
        self.inputs: dict[str, TensorFacts] = {}
        self.tensors: dict[str, TensorFacts] = {}
        self.layers: list[tuple[LayerRequest, tuple[TensorFacts, ...]]] = []
        self.outputs: dict[str, TensorFacts] = {}
        self._names: set[str] = set()
        self._counts: Counter[str] = Counter()

    @property
    def empty(self) -> bool:
        return not self.tensors and not self.layers

    def unused_layer(self, name: object, kind: str, count: int) -> tuple[str, tuple[str, ...]]:
        """A name for a layer, as ``unused``, and those of its ``count`` outputs, which nothing has either."""
        while True:
            title = self.unused(name, kind)
            outputs = (title,) if count == 1 else tuple(f"{title}.{index}" for index in range(count))
            taken = [one for one in outputs if one in self._names]
            if not taken:
                return title, outputs
            if name is not None:
                raise InvalidArgumentError(
                    f"name {title!r}: the layer's output would be named {taken[0]!r}, which is taken in this network; "
                    "give the layer another name"
                )

    def unused(self, name: object, kind: str) -> str:
        """``name`` if nothing has it yet; a new one where it is None."""
        if name is None:
            return next(one for one in self._numbered(kind) if one not in self._names)
        if not isinstance(name, str) or not _NAME.fullmatch(name) or "//" in name:
            raise InvalidArgumentError(
                f"name is {name!r}; expected text of one character at least, without control characters and '//'"
            )
        if name in self._names:
            raise InvalidArgumentError(f"name {name!r} is taken in this network; each tensor and layer has its own")
        return name

    def _numbered(self, kind: str) -> Iterator[str]:
        while True:
            self._counts[kind] += 1
            yield f"{kind}_{self._counts[kind]}"

    def keep_input(self, facts: TensorFacts) -> None:
        self.inputs[facts.name] = self.tensors[facts.name] = facts
        self._names.add(facts.name)

    def keep_layer(self, request: LayerRequest, outputs: tuple[TensorFacts, ...]) -> None:
        self.layers.append((request, outputs))
        self.tensors.update((facts.name, facts) for facts in outputs)
        self._names.update((request.name, *request.outputs))

    def mark(self, facts: TensorFacts, name: object) -> str:
        """Record an output; the name that it has then."""
        if facts.name in self.inputs:
            raise InvalidArgumentError(
                f"{facts.name!r} is an input of the network; put add_identity between, whose output can be marked"
            )
        marked = self.public_name(facts)
        if facts in self.outputs.values():
            raise InvalidArgumentError(f"{facts.name!r} is an output already, named {marked!r}")
        chosen = marked if name is None else name
        if chosen != facts.name:
            chosen = self.unused(chosen, "output")
        assert isinstance(chosen, str)
        self.outputs[chosen] = facts
        self._names.add(chosen)
        return chosen

    def unmark(self, facts: TensorFacts) -> None:
        if facts not in self.outputs.values():
            names = ", ".join(map(repr, self.outputs)) or "none"
            raise InvalidArgumentError(f"{facts.name!r} is not marked as an output; marked are {names}")
        name = self.public_name(facts)
        del self.outputs[name]
        if name != facts.name:
            self._names.discard(name)

    def public_name(self, facts: TensorFacts) -> str:
        return next((name for name, one in self.outputs.items() if one == facts), facts.name)

    def find_layer(self, name: str) -> tuple[LayerRequest, tuple[TensorFacts, ...]]:
        found = next((one for one in self.layers if one[0].name == name), None)
        if found is None:
            close = closest(name, [request.name for request, _ in self.layers])
            hint = f"; did you mean {close!r}?" if close else ""
            raise InvalidArgumentError(f"there is no layer {name!r}{hint}")
        return found

    def to_onnx(self, graph_name: str) -> bytes:
        """The network as a serialized ModelProto. Raises InvalidArgumentError for what ONNX does not have."""
        if not self.outputs:
            raise InvalidArgumentError("no tensor is marked as an output; call mark_output first")
        graph = OnnxGraph()
        for facts in self.inputs.values():
            graph.add_input(facts)
        for request, _ in self.layers:
            graph.begin(request)
            TABLE[request.kind].lower(graph, request)
        return serialized(graph.model(self.outputs, graph_name))
