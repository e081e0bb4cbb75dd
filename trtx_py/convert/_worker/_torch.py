"""PyTorch to ONNX: modules, pickles, weights with a module, TorchScript and programs of torch.export."""

from __future__ import annotations

import importlib
import pickle
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ._task import RefusedError, Spec, Task, need, random_samples


def convert(task: Task) -> None:
    """Write ``task.output``, and samples of what the source computes."""
    with task.step("load", f"loading {task.label}"):
        torch = need("torch", "torch", f"converting {task.format}")
        need("onnx", "torch", "torch.onnx.export")
        need("onnxscript", "torch", "torch.onnx.export")
        torch.set_grad_enabled(False)
        source = _LOADERS[task.format](torch, task)
    if task.format == "torch-export":
        specs = _specs_of_program(torch, source, task)
        run: Callable[..., Any] = source.module()
    else:
        specs, run = _required_specs(task), source
    with task.step("export", "exporting with torch.onnx.export"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        call = _Call(torch, specs, source)
        if task.format == "torchscript":
            _export_torchscript(torch, source, call, task)
        elif task.format == "torch-export":
            _export(torch, source, None, task)
        else:
            _export(torch, source, call, task)
    with task.step("reference", "running the source on random inputs"):
        task.reference_all(random_samples(specs), lambda sample: _run(torch, run, call, sample))


def _required_specs(task: Task) -> list[Spec]:
    specs = task.specs()
    if not specs:
        raise RefusedError(
            "a PyTorch module does not say what its inputs are; give them in order, for example "
            "inputs={'x': (1, 3, 224, 224)}"
        )
    return specs


class _Call:
    """How the module is called: by name where the names are its parameters, else by position."""

    def __init__(self, torch: Any, specs: Sequence[Spec], source: Any) -> None:
        self._torch = torch
        self.specs = specs
        parameters = _parameters(source)
        self.by_name = parameters is not None and {spec.name for spec in specs} <= parameters

    def arguments(self, values: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        tensors = {spec.name: self._tensor(values[spec.name], spec) for spec in self.specs}
        return ((), tensors) if self.by_name else (tuple(tensors.values()), {})

    def _tensor(self, value: Any, spec: Spec) -> Any:
        if spec.dtype == "bfloat16":
            return self._torch.from_numpy(np.asarray(value, dtype=np.float32)).to(self._torch.bfloat16)
        return self._torch.from_numpy(np.array(value))

    def examples(self) -> dict[str, Any]:
        """For tracing: a dynamic axis must not be 1 there, which torch takes for a constant."""
        random = np.random.default_rng(0)
        return {
            spec.name: spec.array(
                [2 if axis in spec.axes and n < 2 else n for axis, n in enumerate(spec.shape)], random
            )
            for spec in self.specs
        }

    def dynamic_shapes(self) -> Any:
        labels = dict.fromkeys(label for spec in self.specs for label in spec.axes.values())
        if not labels:
            return None
        dims = {label: self._torch.export.Dim(label, min=1) for label in labels}
        shapes = {spec.name: {axis: dims[label] for axis, label in spec.axes.items()} for spec in self.specs}
        return shapes if self.by_name else tuple(shapes.values())


def _parameters(source: Any) -> set[str] | None:
    import inspect

    try:
        parameters = inspect.signature(source.forward).parameters.values()
    except (AttributeError, TypeError, ValueError):
        return None
    return {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def _export(torch: Any, source: Any, call: _Call | None, task: Task) -> None:
    options: dict[str, Any] = {"dynamo": True, "verbose": False, "opset_version": task.opset}
    if call is not None:
        arguments, named = call.arguments(call.examples())
        options |= {"kwargs": named or None, "dynamic_shapes": call.dynamic_shapes()}
        if not call.by_name:
            options["input_names"] = [spec.name for spec in call.specs]
        program = torch.onnx.export(source, arguments, **options)
    else:
        program = torch.onnx.export(source, (), **options)
    program.save(task.output)
    task.producer = f"torch {torch.__version__} (torch.onnx.export, dynamo)"


def _export_torchscript(torch: Any, source: Any, call: _Call, task: Task) -> None:
    # The exporter for torch.export's programs cannot take one: there is no Python left to trace.
    call.by_name = False
    arguments, _ = call.arguments(call.examples())
    torch.onnx.export(
        source, arguments, task.output, dynamo=False, opset_version=task.opset or 17,
        input_names=[spec.name for spec in call.specs],
        dynamic_axes={spec.name: dict(spec.axes) for spec in call.specs if spec.axes},
    )  # fmt: skip
    task.producer = f"torch {torch.__version__} (torch.onnx.export, TorchScript)"


def _run(torch: Any, run: Any, call: _Call, sample: Mapping[str, Any]) -> list[Any]:
    arguments, named = call.arguments(sample)
    result = run(*arguments, **named)
    leaves = torch.utils._pytree.tree_leaves(result)
    return [leaf.detach().float().numpy() if leaf.dtype == torch.bfloat16 else leaf.detach().numpy() for leaf in leaves]


def _specs_of_program(torch: Any, program: Any, task: Task) -> list[Spec]:
    """Inputs of an exported program, by the example that it was exported with."""
    if task.dynamic_axes:
        raise RefusedError("a program of torch.export has its dynamic axes already; leave out dynamic_axes=")
    arguments, named = program.example_inputs or ((), {})
    names = [name for name in program.graph_signature.user_inputs if isinstance(name, str)]
    leaves = torch.utils._pytree.tree_leaves((arguments, named))
    nodes = {node.name: node for node in program.graph.nodes}
    if len(leaves) != len(names) or not all(isinstance(leaf, torch.Tensor) for leaf in leaves):
        given = task.specs()
        if len(given) != len(names):
            raise RefusedError(
                f"the program keeps no example of its {len(names)} inputs ({', '.join(names)}); give inputs="
            )
        return given
    declared = []
    for name, leaf in zip(names, leaves, strict=True):
        shape = nodes[name].meta["val"].shape
        axes = {axis: str(size) for axis, size in enumerate(shape) if not isinstance(size, int)}
        dtype = str(leaf.dtype).removeprefix("torch.")
        low, high = (None, None) if leaf.dtype.is_floating_point or not leaf.numel() else (0, int(leaf.max()) + 1)
        declared.append(Spec(name, tuple(leaf.shape), dtype, low, high, axes))
    return task.specs_of(declared)


def _load_program(torch: Any, task: Task) -> Any:
    _require_trust(task, "a .pt2 file contains pickles and expressions that torch.export.load runs")
    return torch.export.load(task.source)


def _load_torchscript(torch: Any, task: Task) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.load(task.source, map_location="cpu").eval()


def _load_module(torch: Any, task: Task) -> Any:
    return _made(torch, task.source)


def _load_safetensors(torch: Any, task: Task) -> Any:
    safetensors = need("safetensors.torch", "torch", "reading weights in safetensors")
    try:
        weights = safetensors.load_file(task.source)
    except Exception as error:
        raise RefusedError(f"these are no whole safetensors: {error}; copy the file again", "damaged") from error
    return _with_weights(torch, weights, task)


def _load_pickle(torch: Any, task: Task) -> Any:
    try:
        found = torch.load(task.source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        _require_trust(task, f"the file pickles more than weights ({_first_line(error)}), and pickles are code")
        found = torch.load(task.source, map_location="cpu", weights_only=False)
    except (RuntimeError, EOFError, OSError) as error:
        raise RefusedError(
            f"torch.load cannot read it: {_first_line(error)}; copy the file again", "damaged"
        ) from error
    if isinstance(found, torch.nn.Module):
        return found.eval()
    if isinstance(found, Mapping):
        nested: Any = next((found[key] for key in ("state_dict", "model_state_dict", "model") if key in found), found)
        if isinstance(nested, torch.nn.Module):
            return nested.eval()
        if isinstance(nested, Mapping):
            return _with_weights(torch, nested, task)
    raise RefusedError(f"it pickles a {type(found).__name__}; expected a torch.nn.Module or its state_dict")


def _first_line(error: BaseException) -> str:
    text = str(error)
    at = text.find("Unsupported global")
    return (text[at:] if at >= 0 else text).strip().partition("\n")[0][:300]


def _require_trust(task: Task, why: str) -> None:
    if not task.trust:
        raise RefusedError(
            f"{why}: it can do whatever this user can. Pass trust=True if you know where it comes from; or save "
            "model.state_dict() and give module='package.module:factory'"
        )


def _with_weights(torch: Any, weights: Mapping[str, Any], task: Task) -> Any:
    if task.module is None:
        raise RefusedError(
            f"the file holds {len(weights)} weights and no module; give module='package.module:factory', a function "
            "that makes the torch.nn.Module they belong to"
        )
    module = _made(torch, task.module)
    try:
        module.load_state_dict(dict(weights), strict=True)
    except RuntimeError as error:
        raise RefusedError(f"the weights are not those of {task.module}: {error}", "damaged") from error
    return module


def _made(torch: Any, name: str) -> Any:
    module, _, attribute = name.partition(":")
    try:
        factory: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there, and imports something that is not
        raise RefusedError(
            f"there is no module {module!r} ({error}); give its folder with import_path=", "missing"
        ) from error
    for part in attribute.split("."):
        if not hasattr(factory, part):
            raise RefusedError(f"{name!r}: {module} has no {attribute!r}")
        factory = getattr(factory, part)
    made = factory if isinstance(factory, torch.nn.Module) else factory()
    if not isinstance(made, torch.nn.Module):
        raise RefusedError(f"{name!r} makes a {type(made).__name__}; expected a torch.nn.Module")
    return made.eval()


_LOADERS: dict[str, Callable[[Any, Task], Any]] = {
    "torch-module": _load_module,
    "torch-pickle": _load_pickle,
    "safetensors": _load_safetensors,
    "torchscript": _load_torchscript,
    "torch-export": _load_program,
}
