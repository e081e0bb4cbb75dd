"""The Open Inference Protocol server of the examples, asked over loopback by NVIDIA's client for Triton."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests

import trtx_py as trtx
from tests.ports import free_port

pytest.importorskip("uvicorn", reason="the server of the example")
triton: Any = pytest.importorskip("tritonclient.http", reason="the client of the tests")

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "oip_server"
MODEL = ROOT / "examples" / "digits" / "digits.onnx"
PATIENCE_S = 60.0


@dataclass
class Served:
    """A server in a process of its own."""

    process: subprocess.Popen[str]
    port: int

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def terminate(self) -> str:
        """SIGTERM; what it printed until its end, which must be a good one."""
        self.process.send_signal(signal.SIGTERM)
        output, errors = self.process.communicate(timeout=PATIENCE_S)
        assert self.process.returncode == 0, f"{output}\n{errors}"
        assert errors == ""
        return output


@contextlib.contextmanager
def serving(*more: str) -> Iterator[Served]:
    """The example, ready."""
    with free_port() as port, serving_on(port, *more) as served:
        yield served


@contextlib.contextmanager
def serving_on(port: int, *more: str) -> Iterator[Served]:
    """The same on this port."""
    process = subprocess.Popen(
        [sys.executable, "-W", "error", str(EXAMPLE / "server.py"), "--port", str(port), "--backend", "mock", *more],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        ready = threading.Event()
        deadline = threading.Timer(PATIENCE_S, process.kill)
        deadline.start()
        while not ready.is_set():
            if process.poll() is not None:
                raise AssertionError(f"the server ended: {process.communicate()}")
            with contextlib.suppress(requests.ConnectionError):
                if requests.get(f"http://127.0.0.1:{port}/v2/health/ready", timeout=PATIENCE_S).status_code == 200:
                    ready.set()
            ready.wait(0.05)
        deadline.cancel()
        yield Served(process, port)
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with serving() as served:
        yield served


@pytest.fixture(scope="module")
def expected() -> tuple[np.ndarray, np.ndarray]:
    """Images, and what the engine itself answers."""
    images = np.random.default_rng(3).uniform(0, 16, (32, 1, 8, 8)).astype(np.float32)
    with trtx.Runtime(None, "mock") as runtime, trtx.Builder(None, "mock") as builder:
        network, config = builder.create_network(), builder.create_config()
        network.parse_onnx(MODEL)
        with builder.create_optimization_profile() as profile:
            profile.set_shape("image", (1, 1, 8, 8), (16, 1, 8, 8), (32, 1, 8, 8))
            config.add_optimization_profile(profile)
        plan = builder.build_serialized_network_sync(network, config)
        network.close()
        config.close()
        with runtime.deserialize_sync(plan) as engine:
            return images, engine.infer_sync({"image": images})["probabilities"]


def image_input(images: np.ndarray, *, binary: bool = True) -> Any:
    tensor = triton.InferInput("image", list(images.shape), "FP32")
    tensor.set_data_from_numpy(images, binary_data=binary)
    return tensor


def test_health_and_metadata(server: Served) -> None:
    with triton.InferenceServerClient(server.address) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("digits")
        assert client.is_model_ready("digits", "1")
        assert not client.is_model_ready("letters")
        assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
        metadata = client.get_model_metadata("digits")
        assert metadata["inputs"] == [{"name": "image", "datatype": "FP32", "shape": [-1, 1, 8, 8]}]
        assert metadata["outputs"] == [{"name": "probabilities", "datatype": "FP32", "shape": [-1, 10]}]


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False, None])
def test_inference(server: Served, expected: Any, binary_in: bool, binary_out: bool | None) -> None:
    images, answers = expected
    outputs = None if binary_out is None else [triton.InferRequestedOutput("probabilities", binary_data=binary_out)]
    with triton.InferenceServerClient(server.address) as client:
        for first, last in ((0, 1), (1, 6), (0, 32)):
            answer = client.infer(
                "digits",
                [image_input(images[first:last], binary=binary_in)],
                outputs=outputs,
                request_id="r7",
                priority=2,
                timeout=30_000_000,
                parameters={"tenant": "t"},
            )
            assert answer.get_response()["id"] == "r7"
            assert "parameters" in answer.get_output("probabilities") or binary_out is False
            np.testing.assert_allclose(answer.as_numpy("probabilities"), answers[first:last], rtol=1e-5)


def test_errors_are_those_of_the_protocol(server: Served, expected: Any) -> None:
    images, _ = expected
    with triton.InferenceServerClient(server.address) as client:

        def refused(model: str, tensor: Any, **options: Any) -> tuple[str, str]:
            with pytest.raises(triton.InferenceServerException) as caught:
                client.infer(model, [tensor], **options)
            return caught.value.status(), caught.value.message()

        good = image_input(images[:1])
        status, message = refused("letters", good)
        assert (status, "there is no model 'letters'" in message) == ("404", True)
        status, message = refused("digits", good, model_version="2")
        assert (status, "no version '2'" in message) == ("404", True)
        status, message = refused("digits", image_input(np.ones((1, 1, 9, 9), np.float32)))
        assert (status, "'image' has shape (1, 1, 9, 9)" in message) == ("400", True)
        assert refused("digits", good, outputs=[triton.InferRequestedOutput("nothing")])[0] == "400"
        assert refused("digits", good, sequence_id=5)[0] == "400"
        status, message = refused("digits", good, request_compression_algorithm="gzip")
        assert (status, "gzip" in message) == ("415", True)
        strings = triton.InferInput("image", [1], "BYTES")
        strings.set_data_from_numpy(np.array(["a"], np.object_))
        status, message = refused("digits", strings)
        assert (status, "BYTES is not supported" in message) == ("400", True)
        assert client.infer("digits", [good]).as_numpy("probabilities").shape == (1, 10)


def test_a_body_beyond_the_limit_is_refused_and_the_server_goes_on(server: Served) -> None:
    url = f"http://{server.address}/v2/models/digits/infer"
    answer = requests.post(url, data=b" " * (65 << 20), timeout=PATIENCE_S)
    assert answer.status_code == 413
    assert "at most" in answer.json()["error"]
    assert requests.get(f"http://{server.address}/v2/health/ready", timeout=PATIENCE_S).status_code == 200


def test_two_hundred_at_once_each_get_their_own_answer(server: Served, expected: Any) -> None:
    images, answers = expected
    with triton.InferenceServerClient(server.address, concurrency=200) as client:
        numbers = [number % 32 for number in range(200)]
        asked = [client.async_infer("digits", [image_input(images[n : n + 1])]) for n in numbers]
        for number, pending in zip(numbers, asked, strict=True):
            found = pending.get_result(timeout=PATIENCE_S).as_numpy("probabilities")
            np.testing.assert_allclose(found, answers[number : number + 1], rtol=1e-5)


def test_the_example_s_client_gets_its_answer(server: Served) -> None:
    result = subprocess.run(
        [sys.executable, str(EXAMPLE / "client.py"), server.address],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "ready: True" in result.stdout
    assert "probabilities: [[" in result.stdout


def test_a_body_that_never_comes_keeps_no_server_from_ending() -> None:
    with serving("--drain-s", "0.5") as served, socket.create_connection(("127.0.0.1", served.port)) as connection:
        head = (
            "POST /v2/models/digits/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\nExpect: 100-continue\r\n\r\n"
        )
        connection.sendall(head.encode() + b"{")
        connection.settimeout(PATIENCE_S)
        assert connection.recv(1000).startswith(b"HTTP/1.1 100 ")  # the application waits for the body
        served.process.send_signal(signal.SIGTERM)
        output, errors = served.process.communicate(timeout=PATIENCE_S)
    assert served.process.returncode == 0
    assert "timeout graceful shutdown exceeded" in errors
    assert "accepted=0, completed=0, failed=0, refused=0, in_flight=0" in output


def test_sigterm_under_load_loses_no_accepted_request(expected: Any) -> None:
    """Each of the clients asks until it is refused; the server counts as many answers as they got."""
    images, answers = expected
    with serving() as served:
        url = f"http://{served.address}/v2/models/digits/infer"
        ends: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
        warm = threading.Semaphore(0)

        def client(number: int) -> None:
            body = {
                "inputs": [
                    {
                        "name": "image",
                        "datatype": "FP32",
                        "shape": [1, 1, 8, 8],
                        "data": images[number].ravel().tolist(),
                    }
                ]
            }
            answered, end = 0, "?"
            with requests.Session() as session:
                while True:
                    try:
                        answer = session.post(url, json=body, timeout=PATIENCE_S)
                    except requests.ConnectionError as error:  # the connection was closed before it was accepted
                        end = f"not connected: {error}"
                        break
                    if answer.status_code != 200:
                        end = f"{answer.status_code} {answer.json()['error']}"
                        break
                    np.testing.assert_allclose(answer.json()["outputs"][0]["data"], answers[number], rtol=1e-4)
                    answered += 1
                    if answered == 5:
                        warm.release()
            ends.put((answered, end))

        threads = [threading.Thread(target=client, args=(number,), daemon=True) for number in range(16)]
        for thread in threads:
            thread.start()
        for _ in threads:
            assert warm.acquire(timeout=PATIENCE_S)
        output = served.terminate()
        for thread in threads:
            thread.join(PATIENCE_S)
        found = [ends.get(timeout=PATIENCE_S) for _ in threads]
    counted = re.search(r"accepted=(\d+), completed=(\d+), failed=(\d+), refused=(\d+), in_flight=(\d+)", output)
    assert counted, output
    accepted, completed, failed, _, in_flight = map(int, counted.groups())
    assert (failed, in_flight) == (0, 0)
    assert accepted == completed == sum(answered for answered, _ in found)
    allowed = re.compile("503 the server is shutting down|not connected")
    # Whether anybody hears the 503 depends on who is faster; tests/unit/test_open_inference.py has it for certain.
    assert [end for _, end in found if not allowed.match(end)] == []
