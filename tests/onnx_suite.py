"""The onnx package's backend test suite, run through trtx_py: build, infer, compare, and say why not.

A case passes, is refused (build time, with the typed error that the product raised) or fails. No list of names decides
which: a refusal is what TensorRT's parser or builder would say too, anything else that is not the expected answer is a
failure.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

import trtx_py as trtx
from mock_backend import MockBackend

SUMMARY = Path(__file__).with_name("data") / "onnx_suite.json"
KINDS = ("node", "simple", "pytorch-converted", "pytorch-operator", "real")

#: Operators whose values come from a generator that no two runtimes share: shapes and dtypes are compared, values not.
_RANDOM = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)
#: What the messages of ParserError and EngineError say, and the category that it is counted under. First match counts.
_CATEGORIES: tuple[tuple[str, str], ...] = (
    ("which no TensorRT type matches", "a type that TensorRT lacks (string, complex, unsigned and others)"),
    ("TensorRT has only tensors at its border", "a sequence or an optional at the border"),
    ("must resolve to a build-time constant", "an operand that TensorRT's parser wants as a constant"),
    ("is not imported by the ONNX parser", "an operator that TensorRT's parser does not import"),
    ("Plugin not found", "an operator of another domain, without a plugin"),
    ("have no host representation", "4-bit inputs or outputs"),
    ("is a shape tensor and must have type", "a shape tensor of a type that TensorRT does not take"),
    ("it must be a scalar or of fixed length", "a shape tensor of a rank or length that TensorRT does not take"),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One case of the suite; ``load`` reads model and data sets when it is run.

    Attributes:
        needs: what must be downloaded first; None if everything is in the package.
    """

    name: str
    kind: str
    rtol: float
    atol: float
    load: Callable[[], tuple[onnx.ModelProto, list[tuple[list[Any], list[Any]]]]]
    needs: str | None = None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """``status`` is "passed", "skipped" or "failed"; category and reason say why, in the product's own words."""

    name: str
    kind: str
    status: str
    category: str = ""
    reason: str = ""


def collect_cases(kinds: Iterable[str] = KINDS) -> list[Case]:
    """All cases of these kinds, by name. Making the node cases computes them, which takes some seconds."""
    from onnx.backend.test.loader import load_model_tests

    cases: dict[tuple[str, str], Case] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the onnx package's own arithmetic overflows on purpose
        for kind in kinds:
            for found in load_model_tests(kind=kind):
                cases[kind, found.name] = _case(found, kind)
    return [cases[key] for key in sorted(cases)]


def _case(found: Any, kind: str) -> Case:
    needs = None
    if found.model is not None:
        load = _from_memory(found)
    elif found.model_dir is not None:
        load = _from_folder(Path(found.model_dir))
    elif (Path(onnx.__file__).parents[1] / found.url).is_file():
        load = _from_light_zoo(Path(onnx.__file__).parents[1] / found.url)
    else:
        load, needs = _from_folder(Path()), str(found.url)
    return Case(found.name, kind, found.rtol, found.atol, load, needs)


def _from_memory(found: Any) -> Callable[[], tuple[onnx.ModelProto, list[tuple[list[Any], list[Any]]]]]:
    return lambda: (found.model, [(list(inputs), list(outputs)) for inputs, outputs in found.data_sets])


def _from_folder(folder: Path) -> Callable[[], tuple[onnx.ModelProto, list[tuple[list[Any], list[Any]]]]]:
    def load() -> tuple[onnx.ModelProto, list[tuple[list[Any], list[Any]]]]:
        model = onnx.load(folder / "model.onnx")
        sets = []
        for data in sorted(folder.glob("test_data_set_*")):
            inputs = [_read(data / f"input_{i}.pb") for i in range(len(list(data.glob("input_*.pb"))))]
            outputs = [_read(data / f"output_{i}.pb") for i in range(len(list(data.glob("output_*.pb"))))]
            sets.append((inputs, outputs))
        return model, sets

    return load


def _from_light_zoo(path: Path) -> Callable[[], tuple[onnx.ModelProto, list[tuple[list[Any], list[Any]]]]]:
    return lambda: (onnx.load(path), [light_data(path)])


def light_data(path: Path) -> tuple[list[Any], list[Any]]:
    """Inputs and outputs of a network of the light zoo: a ramp, and the outputs that the package carries."""
    model = onnx.load(path)
    weights = {tensor.name for tensor in model.graph.initializer}
    ramps = []
    for value in model.graph.input:
        if value.name not in weights:
            shape = [dim.dim_value or 1 for dim in value.type.tensor_type.shape.dim]
            count = int(np.prod(shape))
            ramps.append((np.arange(count).reshape(shape) / count).astype(np.float32))
    outputs = [_read(path.with_name(f"{path.stem}_output_{i}.pb")) for i in range(len(model.graph.output))]
    return ramps, outputs


def _read(path: Path) -> Any:
    """An array, or None for what is no tensor (sequences and optionals, which TensorRT has not)."""
    tensor = onnx.TensorProto()
    try:
        tensor.ParseFromString(path.read_bytes())
        return numpy_helper.to_array(tensor)
    except Exception:  # protobuf's and onnx's exceptions share no base; the product refuses such a model anyway
        return None


class Suite:
    """Runs cases one after another; made for thousands of them, so backend, builder and runtime are shared.

    A kernel that fails takes its device with it, as on a GPU: the next case then gets a new backend.
    """

    def __init__(self) -> None:
        self._open()

    def _open(self) -> None:
        self._backend = MockBackend()
        self._builder = trtx.Builder(backend=self._backend)
        self._runtime = trtx.Runtime(backend=self._backend)

    def close(self) -> None:
        """Raises AssertionError if a case left anything behind in the mock."""
        self._runtime.close()
        self._builder.close()
        self._backend.assert_clean()
        self._backend.close()

    def _renew(self) -> None:
        with contextlib.suppress(trtx.CudaError):
            self._runtime.close()
        with contextlib.suppress(trtx.CudaError):
            self._builder.close()
        self._backend.close()
        self._open()

    async def run(self, case: Case) -> Outcome:
        """Never raises for what a case does."""
        if case.needs is not None:
            return Outcome(case.name, case.kind, "skipped", "needs a download", case.needs)
        try:
            model, data_sets = case.load()
            engine = await self._build(model, data_sets)
        except trtx.TrtxError as error:
            category = category_of(error)
            text = f"{type(error).__name__}: {_first_reason(error)}"
            return Outcome(case.name, case.kind, "skipped" if category else "failed", category, text)
        except Exception as error:  # a crash of the product or of this file: a failure either way
            return Outcome(case.name, case.kind, "failed", reason=f"{type(error).__name__}: {error}")
        outcome = Outcome(case.name, case.kind, "passed")
        try:
            async with engine:
                for inputs, expected in data_sets:
                    outputs = await engine.infer(_feeds(engine, model, inputs))
                    compare(model, outputs, expected, rtol=case.rtol, atol=case.atol)
        except (trtx.TrtxError, AssertionError) as error:
            text = " ".join(str(error).split())
            outcome = Outcome(case.name, case.kind, "failed", reason=f"{type(error).__name__}: {text}")
            if isinstance(error, trtx.CudaError):
                self._renew()
        return outcome

    async def _build(self, model: onnx.ModelProto, data_sets: Sequence[tuple[list[Any], list[Any]]]) -> trtx.Engine:
        with self._builder.create_network() as network, self._builder.create_config() as config:
            network.parse_onnx(model.SerializeToString())
            with self._builder.create_optimization_profile() as profile:
                rows = [dict(zip(_input_names(model), inputs, strict=False)) for inputs, _ in data_sets]
                for tensor in network.inputs:
                    if not tensor.is_shape_tensor and -1 not in tensor.shape:
                        continue
                    arrays = [np.asarray(row[tensor.name]) for row in rows]
                    limits = np.array([a.reshape(-1) if tensor.is_shape_tensor else a.shape for a in arrays], np.int64)
                    low, best, high = (tuple(row.tolist()) for row in (limits.min(0), limits[0], limits.max(0)))
                    profile.set_shape(tensor.name, low, best, high)
                if profile.ranges:
                    config.add_optimization_profile(profile)
            plan = self._builder.build_serialized_network_sync(network, config)
        return await self._runtime.deserialize(plan)


def _input_names(model: onnx.ModelProto) -> list[str]:
    weights = {tensor.name for tensor in model.graph.initializer}
    return [value.name for value in model.graph.input if value.name not in weights]


def _feeds(engine: trtx.Engine, model: onnx.ModelProto, inputs: Sequence[Any]) -> dict[str, Any]:
    given = dict(zip(_input_names(model), map(to_array, inputs), strict=True))
    dtypes = {tensor.name: tensor.dtype.numpy for tensor in engine.io_tensors}
    # TensorRT reads DOUBLE as FLOAT; every other dtype must be right as it is
    return {name: array.astype(dtypes[name]) if array.dtype == np.float64 else array for name, array in given.items()}


def to_array(value: Any) -> np.ndarray[Any, Any]:
    """Newer cases hold TensorProtos where numpy has no type."""
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value)


def compare(
    model: onnx.ModelProto, outputs: dict[str, Any], expected: Sequence[Any], *, rtol: float, atol: float
) -> None:
    """Raises AssertionError, naming the output, unless all is as the case expects."""
    names = [value.name for value in model.graph.output]
    assert len(outputs) == len(names) == len(expected), f"{len(outputs)} outputs, {len(expected)} expected"
    random = any(node.op_type in _RANDOM for node in model.graph.node) or _trains_dropout(model)
    for name, value in zip(names, expected, strict=True):
        want, have = to_array(value), outputs[name]
        dtype = np.dtype(np.float32) if want.dtype == np.float64 else want.dtype
        assert have.dtype == dtype, f"output {name!r} has dtype {have.dtype}, expected {dtype}"
        assert have.shape == want.shape, f"output {name!r} has shape {have.shape}, expected {want.shape}"
        if random:
            continue
        # onnx's own runner allows bfloat16 two units in the last place; float16 gets as many.
        tolerance = max(rtol, {"bfloat16": 2**-6, "float16": 2**-9}.get(dtype.name, 0.0))
        wide = np.dtype(np.float32) if dtype.kind == "V" or dtype.name.startswith("float8") else dtype
        np.testing.assert_allclose(
            have.astype(wide), want.astype(wide), rtol=tolerance, atol=atol, err_msg=f"output {name!r}"
        )


def _trains_dropout(model: onnx.ModelProto) -> bool:
    return any(node.op_type == "Dropout" and len(node.input) > 2 for node in model.graph.node)


def _first_reason(error: trtx.TrtxError) -> str:
    if isinstance(error, trtx.ParserError) and error.issues:
        return str(error.issues[0])
    return " ".join(error.message.split())


def category_of(error: trtx.TrtxError) -> str:
    """What a refusal is counted under; empty for one that says nothing TensorRT would say, which is a failure."""
    if not isinstance(error, (trtx.ParserError, trtx.BuilderError, trtx.EngineError)):
        return ""
    text = str(error)
    return next((category for words, category in _CATEGORIES if words in text), "")


def run_suite(cases: Sequence[Case]) -> list[Outcome]:
    """Every case, in order, on the mock; what a case leaves behind is an error at the end."""

    async def run() -> list[Outcome]:
        suite = Suite()
        try:
            return [await suite.run(case) for case in cases]
        finally:
            suite.close()

    with warnings.catch_warnings():
        # Overflow, division by zero and NaN are what many cases are about; numpy tells of them in the reference
        # evaluator, where ONNX Runtime says nothing.
        warnings.simplefilter("ignore", RuntimeWarning)
        return asyncio.run(run())


def summarize(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What the committed summary holds."""
    return {
        "onnx": onnx.__version__,
        "passed": sum(o.status == "passed" for o in outcomes),
        "skipped": sum(o.status == "skipped" for o in outcomes),
        "failed": sum(o.status == "failed" for o in outcomes),
        "by_kind": {
            kind: dict(sorted(Counter(o.status for o in outcomes if o.kind == kind).items())) for kind in KINDS
        },
        "skipped_because": dict(sorted(Counter(o.category for o in outcomes if o.status == "skipped").items())),
        "failures": {f"{o.kind}/{o.name}": o.reason[:300] for o in outcomes if o.status == "failed"},
    }


if __name__ == "__main__":
    found = summarize(run_suite(collect_cases()))
    SUMMARY.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
