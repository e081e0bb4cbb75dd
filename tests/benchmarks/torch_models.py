"""PyTorch: ResNet-50 in half precision, channels last, eager and in its own CUDA graph, beside C0 and ours; and the
kit's networks as modules, for the runner."""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx

from .bare_contenders import Bench, C0Event
from .checks import Contender, relative_error
from .ours import OursSlot
from .rig import Rig, SetupError, interleave
from .samples import CpuMeter, Round, compare
from .workloads import Arrays, Inputs, Workload


def torch_module(model: bytes, precision: str) -> Any:
    """An ONNX model as a module with the same weights, by onnx2torch; None where that, torch or torchvision is missing.

    Args:
        precision: "float32"; "float16", weights and all that is computed, images in channels-last order; or "autocast",
            where PyTorch chooses between them. Inputs and outputs stay as they are.
    """
    try:
        torch: Any = importlib.import_module("torch")
        importlib.import_module("torchvision")
        onnx2torch: Any = importlib.import_module("onnx2torch")
    except ImportError:
        return None
    loaded = onnx2torch.convert(onnx.load_from_string(model)).eval()
    if precision == "float16":
        loaded = loaded.half().to(memory_format=torch.channels_last)

    def halved(tensor: Any) -> Any:
        if precision != "float16" or not tensor.is_floating_point():
            return tensor
        return tensor.half().contiguous(
            memory_format=torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
        )

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = loaded

        def forward(self, *given: Any) -> Any:
            with torch.autocast("cuda", torch.float16, enabled=precision == "autocast"):
                return self.inner(*map(halved, given)).float()

    return Model().eval()


class TorchModel:
    """torchvision's ResNet-50 with random weights: the network of the kit, not its numbers, so it is checked against
    itself in float32."""

    def __init__(self, batch: int) -> None:
        try:
            self.torch: Any = importlib.import_module("torch")
            models: Any = importlib.import_module("torchvision.models")
        except ImportError as error:
            raise SetupError(f"torch and torchvision are not both installed: {error}") from error
        torch = self.torch
        torch.manual_seed(0)
        self.exact = models.resnet50(weights=None).eval()
        self.model = models.resnet50(weights=None).eval()
        self.model.load_state_dict(self.exact.state_dict())
        self.exact = self.exact.cuda()
        self.model = self.model.half().cuda().to(memory_format=torch.channels_last)
        self.given = torch.empty((batch, 3, 224, 224), dtype=torch.float32).pin_memory()
        self.found = torch.empty((batch, 1000), dtype=torch.float32).pin_memory()
        self.device = torch.empty_like(self.given, device="cuda")
        self._graph: Any = None

    def _step(self) -> None:
        torch = self.torch
        self.device.copy_(self.given, non_blocking=True)
        halves = self.device.half().contiguous(memory_format=torch.channels_last)
        self.found.copy_(self.model(halves).float(), non_blocking=True)

    def run_eager(self) -> None:
        """Copies, kernels and the wait."""
        with self.torch.inference_mode():
            self._step()
            self.torch.cuda.synchronize()

    def capture(self) -> None:
        """As PyTorch's documentation tells: warm up on a side stream, then capture."""
        torch = self.torch
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.inference_mode(), torch.cuda.stream(side):
            for _ in range(3):
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._step()

    def run_graph(self) -> None:
        self._graph.replay()
        self.torch.cuda.synchronize()

    def expected(self, image: np.ndarray) -> np.ndarray:
        """In float32, of the same weights."""
        with self.torch.inference_mode():
            found = self.exact(self.torch.from_numpy(image).cuda()).cpu().numpy()
        return np.asarray(found)


class TorchContender:
    def __init__(self, name: str, model: TorchModel, run: Callable[[], None]) -> None:
        self.name, self._model, self._run = name, model, run

    def round(self, count: int) -> Round:
        run, clock, times = self._run, time.perf_counter_ns, [0] * count
        meter = CpuMeter()
        for i in range(count):
            begun = clock()
            run()
            times[i] = clock() - begun
        return meter.round(times)

    def outputs(self, inputs: Arrays) -> Arrays:
        (image,) = inputs.values()
        self._model.given.numpy()[...] = image
        self._model.found.fill_(float("nan"))
        self._run()
        return {"logits": self._model.found.numpy().copy()}

    def error(self, image: np.ndarray) -> float:
        """To the float32 model; raises if it is not the same network."""
        found = relative_error(self.outputs({"image": image}), {"logits": self._model.expected(image)})
        if not found <= 0.03:
            raise AssertionError(f"{self.name} is off from the float32 model by {found:.2e}")
        return found


def run_torch(rig: Rig, workload: Workload) -> dict[str, Any]:
    inputs = Inputs(rig.kit, workload)
    (first,), (second,) = inputs.first.values(), inputs.second.values()
    with contextlib.ExitStack() as undo:
        model = TorchModel(workload.sizes[0])
        torch = [TorchContender("torch eager", model, model.run_eager)]
        model.run_eager()
        model.capture()
        torch.append(TorchContender("torch CUDA graph", model, model.run_graph))
        errors = {each.name: each.error(first) for each in torch}
        if rig.settings.check_only:
            return {"errors_to_float32": errors}
        engine = rig.bare.deserialize(rig.plan_bytes(workload.engine))
        bench = Bench(rig.bare, rig.floor, engine, inputs.shapes, inputs.first)
        undo.callback(bench.close)
        engines = undo.enter_context(rig.engines(workload.engine))
        ours = OursSlot(
            "latency", engines.get(completion="latency"), rig.loops, rig.loops.names[-1], inputs.shapes, inputs.first
        )
        ours.settle()
        contenders: list[Contender] = [C0Event(bench), ours, *torch]
        rounds, count = rig.settings.rounds(workload)
        samples = interleave(contenders, rounds, count)
        for each in torch:
            each.error(second)
        result: dict[str, Any] = {"errors_to_float32": errors, "c0": "c0_event"}
        result["contenders"] = {
            name: each.summary() | {"over_c0": compare(each, samples["c0_event"])} for name, each in samples.items()
        }
        return result
