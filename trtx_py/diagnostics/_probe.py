"""Looks at one thing in a process of its own: ``driver``, or a flavour of TensorRT. Prints one line of JSON.

Vendors' libraries end the process, or hang in it, when they meet a driver that they do not expect; here that ends the
look and nothing else.
"""

from __future__ import annotations

import json
import sys
from typing import Any

#: In front of the answer: vendors print lines of their own.
MARK = "trtx-probe:"


def driver() -> dict[str, Any]:
    """Version and GPUs, or why there are none."""
    from .._errors import TrtxError

    try:
        from ..backends.cuda_driver import shared_driver
        from ..cuda._properties import device_properties

        found = shared_driver()
        version = found.cuDriverGetVersion()
        gpus = []
        for ordinal in range(found.cuDeviceGetCount()):
            gpu = device_properties(ordinal, "tensorrt")
            gpus.append(
                {"ordinal": ordinal, "name": gpu.name, "compute_capability": gpu.compute_capability,
                 "total_bytes": gpu.total_bytes, "uuid": gpu.uuid}
            )  # fmt: skip
    except (TrtxError, ImportError) as error:
        return {"version": None, "gpus": [], "problem": str(error)}
    return {"version": f"{version // 1000}.{version % 1000 // 10}", "gpus": gpus, "problem": ""}


def flavour(name: str) -> dict[str, Any]:
    """What one flavour can do here."""
    from ..backends.registry import backend_status

    status = backend_status(name)
    return {
        "version": None if status.info is None else status.info.version,
        "builds": status.builds,
        "runs": status.runs,
        "problems": list(status.reasons),
    }


def main(subject: str) -> None:
    """Print what there is to say about ``subject``."""
    answer = driver() if subject == "driver" else flavour(subject)
    sys.stdout.write(f"\n{MARK}{json.dumps(answer)}\n")
    sys.stdout.flush()
    # Libraries that were loaded into a strange environment must not get the chance to fail in their destructors.
    import os

    os._exit(0)
