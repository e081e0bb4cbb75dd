"""The TensorRT seam's entry: one object for each member of the family."""

from __future__ import annotations

from ..._errors import BackendUnavailableError, CudaError
from ..._types import BackendInfo
from .._flavours import flavour_named
from ..cuda_driver import shared_driver
from ..protocols import (
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
    CudaDriver,
    LogSink,
)
from ._builder import Builder
from ._runtime import Runtime
from ._vendor import Vendor, load_vendor


class TensorRTFamilyBackend:
    """Implements TensorRTBackend for tensorrt, tensorrt_rtx, tensorrt_lean or tensorrt_dispatch.

    Imports the vendor module when it is first asked for something that needs it.

    Args:
        flavour: which member.
        module: stands in for the vendor's module, in tests.
        driver: stands in for the CUDA driver, in tests.
    Raises:
        InvalidArgumentError: no such flavour.
    """

    def __init__(self, flavour: str, *, module: object | None = None, driver: CudaDriver | None = None) -> None:
        self._flavour = flavour_named(flavour)
        self._vendor: Vendor | None = Vendor(self._flavour, module) if module is not None else None
        self._driver = driver

    def __repr__(self) -> str:
        return f"<TensorRTFamilyBackend {self._flavour.name}>"

    @property
    def info(self) -> BackendInfo:
        """Raises BackendUnavailableError if the vendor module is not installed or cannot be loaded."""
        vendor = self._module()
        return BackendInfo(
            name=self._flavour.name,
            flavour=self._flavour.name,
            version=vendor.version,
            can_build=self._flavour.can_build,
            can_run=self._has_driver(),
            strongly_typed=vendor.facts.typing == "strong",
            needs_compute_capability=self._flavour.can_target,
        )

    def plan_settings(self) -> dict[str, object]:
        """Nothing besides ``info``: see DescribesPlans."""
        return {}

    @property
    def has_timing_cache(self) -> bool:
        """Its builds measure kernels, and take an ITimingCache; the engine cache keeps one for them."""
        return self._flavour.can_build and not self._flavour.can_target

    @property
    def driver(self) -> CudaDriver:
        if self._driver is None:
            self._driver = shared_driver()
        return self._driver

    def create_builder(self, log: LogSink) -> Builder:
        """Source: nvinfer1::createInferBuilder"""
        if not self._flavour.can_build:
            raise BackendUnavailableError(
                f"{self._flavour.name} runs plans and cannot build them; build with tensorrt "
                f"(pip install tensorrt) or tensorrt_rtx (pip install tensorrt-rtx)"
            )
        return Builder(self._module(), log, lambda: self.driver)

    def create_runtime(
        self,
        log: LogSink,
        *,
        device: int,
        lean_library: str | None,
        allow_host_code: bool,
        runtime_cache: bytes | None = None,
    ) -> Runtime:
        """Source: nvinfer1::createInferRuntime"""
        vendor = self._module()
        return Runtime(
            vendor,
            log,
            lean_library=lean_library,
            allow_host_code=allow_host_code,
            device_text=self._checked_device(device),
            runtime_cache=runtime_cache,
        )

    def refusal_to_run(self) -> str | None:
        """Why this backend cannot run plans on any device here, None if nothing speaks against it."""
        reason = None
        try:
            self._module()
            for device in range(max(1, self.driver.cuDeviceGetCount())):
                try:
                    self._checked_device(device)
                except BackendUnavailableError as error:
                    reason = reason or str(error)
                else:
                    return None
        except (BackendUnavailableError, CudaError) as error:
            return str(error)
        return reason

    def _module(self) -> Vendor:
        if self._vendor is None:
            self._vendor = load_vendor(self._flavour.name)
        return self._vendor

    def _has_driver(self) -> bool:
        try:
            return self.driver.cuDeviceGetCount() > 0
        except (BackendUnavailableError, CudaError):
            return False

    def _checked_device(self, device: int) -> str:
        """The GPU in words. Raises BackendUnavailableError for one that this flavour does not run on."""
        driver = self.driver
        count = driver.cuDeviceGetCount()
        if not 0 <= device < count:
            raise BackendUnavailableError(
                f"there is no CUDA device {device}; the driver shows {count}; check the device index and "
                f"CUDA_VISIBLE_DEVICES"
            )
        handle = driver.cuDeviceGet(device)
        major = driver.cuDeviceGetAttribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, handle)
        minor = driver.cuDeviceGetAttribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, handle)
        text = f"{driver.cuDeviceGetName(handle)} (compute capability {major}.{minor})"
        if not self._flavour.runs_on_capability(major, minor):
            raise BackendUnavailableError(
                f"{self._flavour.name} does not run on {text}; it runs on {', '.join(self._flavour.runs_on)}; "
                f"use tensorrt, or tensorrt_dispatch with a lean library (pip install tensorrt-dispatch-cu13)"
            )
        return text
