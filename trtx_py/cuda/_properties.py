"""What devices there are, and what the driver says about each, without opening one."""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass

from .._arguments import checked_int
from .._errors import BackendUnavailableError, CudaError, InvalidArgumentError
from ..backends._flavours import FLAVOURS
from ..backends.protocols import (
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
    CUDA_ERROR_INVALID_VALUE,
    CUDA_ERROR_NO_DEVICE,
    CudaDriver,
    TensorRTBackend,
)
from ..backends.registry import BACKEND_VARIABLE, resolve_backend

_PCI_BUS_ID, _PCI_DEVICE_ID, _PCI_DOMAIN_ID, _HOST_NUMA_ID = 33, 34, 50, 134


@dataclass(frozen=True)
class DeviceProperties:
    """One device as the driver describes it.

    Attributes:
        ordinal: its number here, from 0, in the driver's order; CUDA_VISIBLE_DEVICES changes it.
        name: for people.
        compute_capability: architecture as "major.minor".
        total_bytes: memory of the device.
        pci_bus_id: "domain:bus:device.function" in hexadecimal, as NVML and nvidia-smi name it.
        uuid: "GPU-..." as nvidia-smi prints it; the same in every process.
        numa_node: the node of host memory that is nearest; None where the driver does not know, or the machine has no
            such nodes.
    """

    ordinal: int
    name: str
    compute_capability: str
    total_bytes: int
    pci_bus_id: str
    uuid: str
    numa_node: int | None


def device_count(backend: str | TensorRTBackend | None = None) -> int:
    """How many devices the driver shows. 0, and no error, where there is no usable driver or no GPU.

    Why there are none is what ``device_properties(0)`` raises.

    Args:
        backend: as for Runtime: the mock has devices of its own. TensorRT itself is not loaded.
    Raises:
        InvalidArgumentError: there is no backend of that name.
    Source: cuDeviceGetCount
    """
    try:
        return _counted(_driver_of(backend))
    except BackendUnavailableError:
        return 0
    except CudaError as error:
        if error.code == CUDA_ERROR_NO_DEVICE:
            return 0
        raise


def device_properties(device: int, backend: str | TensorRTBackend | None = None) -> DeviceProperties:
    """What the driver says about one device. Makes no context and takes no memory there.

    Args:
        device: ordinal, from 0.
        backend: as for ``device_count``.
    Raises:
        InvalidArgumentError: there is no such device, or no backend of that name.
        BackendUnavailableError: no usable driver; says why.
        CudaError: the driver could not say.
    Source: cuDeviceGetName, cuDeviceTotalMem, cuDeviceGetUuid, cuDeviceGetAttribute
    """
    ordinal = checked_int(device, "device", minimum=0)
    driver = _driver_of(backend)
    count = _counted(driver)
    if ordinal >= count:
        raise InvalidArgumentError(
            f"device {ordinal} does not exist: the driver sees {count} (0 to {count - 1}); "
            "CUDA_VISIBLE_DEVICES hides devices"
        )
    number = driver.cuDeviceGet(ordinal)
    major = driver.cuDeviceGetAttribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, number)
    minor = driver.cuDeviceGetAttribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, number)
    pci = pci_bus_id(driver, number)
    return DeviceProperties(
        ordinal=ordinal,
        name=driver.cuDeviceGetName(number),
        compute_capability=f"{major}.{minor}",
        total_bytes=driver.cuDeviceTotalMem(number),
        pci_bus_id=pci,
        uuid=f"GPU-{uuid.UUID(bytes=driver.cuDeviceGetUuid(number))}",
        numa_node=_numa_node(driver, number, pci),
    )


def pci_bus_id(driver: CudaDriver, number: int) -> str:
    """Of the CUdevice ``number``."""
    domain, bus, slot = (
        driver.cuDeviceGetAttribute(attribute, number) for attribute in (_PCI_DOMAIN_ID, _PCI_BUS_ID, _PCI_DEVICE_ID)
    )
    return f"{domain:08x}:{bus:02x}:{slot:02x}.0"


def _numa_node(driver: CudaDriver, number: int, pci: str) -> int | None:
    try:
        node = driver.cuDeviceGetAttribute(_HOST_NUMA_ID, number)
    except CudaError as error:
        if error.code != CUDA_ERROR_INVALID_VALUE:
            raise
        node = _numa_node_of_kernel(pci)  # a driver from before it knew
    return node if node >= 0 else None


def _numa_node_of_kernel(pci: str) -> int:
    """As Linux has it, -1 if it does not say."""
    try:
        with open(os.path.join("/sys/bus/pci/devices", pci[4:], "numa_node"), encoding="ascii") as file:
            return int(file.read())
    except (OSError, ValueError):
        return -1


def _counted(driver: CudaDriver) -> int:
    driver.cuInit(0)
    return driver.cuDeviceGetCount()


def _driver_of(backend: str | TensorRTBackend | None) -> CudaDriver:
    name = os.environ.get(BACKEND_VARIABLE, "") if backend is None else backend
    if isinstance(name, str) and (not name or name in FLAVOURS):
        from ..backends.cuda_driver import shared_driver

        return shared_driver()  # they all share it, and counting needs no TensorRT
    return resolve_backend(backend, need="run").driver
