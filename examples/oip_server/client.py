"""Asks server.py, with NVIDIA's client for Triton, which speaks the same protocol."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import tritonclient.http as triton


def main(address: str = "localhost:8000") -> None:
    with triton.InferenceServerClient(address) as client:
        print("ready:", client.is_server_ready())
        print("inputs:", client.get_model_metadata("digits")["inputs"])
        image = triton.InferInput("image", [1, 1, 8, 8], "FP32")
        image.set_data_from_numpy(np.full((1, 1, 8, 8), 8, np.float32))  # binary, unless it is told otherwise
        answer = client.infer("digits", [image], timeout=1_000_000, parameters={"tenant": "example"})
        probabilities: Any = answer.as_numpy("probabilities")
        print("probabilities:", probabilities.round(3))


if __name__ == "__main__":
    main(*sys.argv[1:])
