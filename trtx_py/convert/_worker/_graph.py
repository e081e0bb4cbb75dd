"""What is wrong with a graph, said by name, and what can be put right: order of nodes, names of axes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from ._task import RefusedError


def check_opset(model: Any) -> int:
    """The version of the default operator set. Raises RefusedError if the installed onnx does not know it."""
    from onnx import __version__, defs

    versions = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    known = defs.onnx_opset_version()
    if len(versions) > 1 or (versions and not 1 <= versions[0] <= known):
        raise RefusedError(
            f"the model wants opset {', '.join(map(str, versions))}; onnx {__version__} knows 1 to {known}: export the "
            "model with a lower opset, or install a newer onnx", "damaged",
        )  # fmt: skip
    return int(versions[0]) if versions else 0


def put_in_order(graph: Any, outer: frozenset[str] = frozenset()) -> bool:
    """Put nodes behind what they read; True if they were not.

    Raises RefusedError for a cycle, and for a name that nothing produces.
    """
    given = outer | {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    given |= {sparse.values.name for sparse in graph.sparse_initializer}
    producers: dict[str, int] = {}
    for index, node in enumerate(graph.node):
        for name in filter(None, node.output):
            if name in producers:
                other = graph.node[producers[name]]
                raise RefusedError(
                    f"{name!r} is an output of two nodes, {other.name!r} ({other.op_type}) and {node.name!r} "
                    f"({node.op_type}); which of them is meant cannot be told: export the model again", "damaged",
                )  # fmt: skip
            producers[name] = index
    wanted = [sorted({name for name in reads(node) if name and name not in given}) for node in graph.node]
    for node, names in zip(graph.node, wanted, strict=True):
        for name in names:
            if name not in producers:
                raise RefusedError(
                    f"node {node.name!r} ({node.op_type}) reads {name!r}, which is no input, no weight and no output "
                    "of a node: a weight is missing, or the model was cut; export it again", "damaged",
                )  # fmt: skip
    order = _order(graph, wanted, producers)
    everything = given | producers.keys()
    for node in graph.node:
        for inner in _subgraphs(node):
            put_in_order(inner, frozenset(everything))
    if order == list(range(len(order))):
        return False
    nodes = [_copy(graph.node[index]) for index in order]
    del graph.node[:]
    graph.node.extend(nodes)
    return True


def _order(graph: Any, wanted: list[list[str]], producers: dict[str, int]) -> list[int]:
    """Depth first without recursion: graphs have thousands of nodes in a row."""
    state = [0] * len(wanted)  # 0 not seen, 1 on the way, 2 done
    order: list[int] = []
    for root in range(len(wanted)):
        path: list[tuple[int, Iterator[str]]] = []
        if not state[root]:
            state[root] = 1
            path.append((root, iter(wanted[root])))
        while path:
            index, names = path[-1]
            before = next((producers[name] for name in names if state[producers[name]] != 2), None)
            if before is None:
                state[index] = 2
                order.append(index)
                path.pop()
            elif state[before] == 1:
                at = [entry for entry, _ in path].index(before)
                circle = [graph.node[entry] for entry, _ in path[at:]]
                text = " <- ".join(f"{node.name or node.output[0]!r} ({node.op_type})" for node in [*circle, circle[0]])
                raise RefusedError(f"the graph has a cycle: {text}; a model computes in one direction: export it again",
                              "damaged")  # fmt: skip
            else:
                state[before] = 1
                path.append((before, iter(wanted[before])))
    return order


def reads(node: Any) -> Iterator[str]:
    """What a node reads, also inside its subgraphs, of what lies outside them."""
    yield from node.input
    for graph in _subgraphs(node):
        own = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
        own |= {name for inner in graph.node for name in inner.output}
        for inner in graph.node:
            yield from (name for name in reads(inner) if name not in own)
        yield from (value.name for value in graph.output if value.name not in own)


def _subgraphs(node: Any) -> Iterator[Any]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _copy(message: Any) -> Any:
    copied = type(message)()
    copied.CopyFrom(message)
    return copied


def name_axes_apart(model: Any) -> dict[str, str]:
    """Give dynamic axes of inputs that share a name by accident names of their own; returns what was renamed.

    A name that is none ("?", "-1", "None", an empty one) says nothing and is replaced everywhere. A real name that one
    input has twice keeps its first axis; the same name on several inputs means the same size and stays. TensorRT takes
    axes of one name for equal, and 8.6's parser refuses such a model.
    """
    graph = model.graph
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in weights and value.type.HasField("tensor_type")]
    taken = Counter(dim.dim_param for value in inputs for dim in _dims(value))
    renamed: dict[str, str] = {}
    for value in inputs:
        seen: set[str] = set()
        for axis, dim in enumerate(_dims(value)):
            if dim.HasField("dim_value") and dim.dim_value >= 0:
                continue
            name = dim.dim_param
            if is_name(name) and name not in seen:
                seen.add(name)
                continue
            fresh = _fresh(value.name, axis, taken)
            dim.dim_param = fresh
            seen.add(fresh)
            renamed[f"{value.name}, axis {axis}"] = fresh
    if renamed:
        # What they were called elsewhere says nothing any more; it is inferred again.
        del graph.value_info[:]
        repeated = {name for name, count in taken.items() if count > 1}
        for value in graph.output:
            for dim in _dims(value):
                if dim.HasField("dim_param") and (not is_name(dim.dim_param) or dim.dim_param in repeated):
                    dim.ClearField("dim_param")
    return renamed


def is_name(text: str) -> bool:
    """True for what an exporter or a person would call an axis; exporters write expressions such as ``2*seq`` too."""
    return (
        bool(text) and (text[0].isalpha() or text[0] == "_") and text.lower() not in ("none", "null", "unknown", "nan")
    )


def _fresh(value: str, axis: int, taken: Counter[str]) -> str:
    base = "".join(letter if letter.isalnum() else "_" for letter in value)
    name = base = f"{base if base[:1].isalpha() else f'input_{base}'}_axis{axis}"
    number = 2
    while name in taken:
        name = f"{base}_{number}"
        number += 1
    taken[name] = 1
    return name


def _dims(value: Any) -> Any:
    return value.type.tensor_type.shape.dim


def drop_traces(model: Any) -> None:
    """PyTorch notes for each node the lines of source that made it, with paths of the machine: none of the engine's."""
    for nodes in (model.graph.node, *(function.node for function in model.functions)):
        for node in nodes:
            if not hasattr(node, "metadata_props"):  # onnx before 1.16
                continue
            kept = [_copy(entry) for entry in node.metadata_props if not entry.key.startswith("pkg.torch.onnx.")]
            del node.metadata_props[:]
            node.metadata_props.extend(kept)
