"""Converters that worker processes of the tests import: one that works, and all the ways in which others do not."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def scale_model(factor: float) -> onnx.ModelProto:
    """``y = x * factor`` with a dynamic leading axis."""
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "k"], ["y"])],
        "scale",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
        [numpy_helper.from_array(np.array(factor, np.float32), "k")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def good(task: Any) -> None:
    """The file holds the factor as JSON."""
    with open(task.source, encoding="utf-8") as file:
        factor = json.load(file)["factor"]
    task.progress("scaling")
    print("said on the way")
    onnx.save(scale_model(factor), task.output)
    task.producer = "fake 1.0"
    task.note("made by a test")
    for sample in task.samples():
        task.reference(sample, [sample["x"] * np.float32(factor)])


def wrong(task: Any) -> None:
    """The model is not what the source computes."""
    onnx.save(scale_model(2), task.output)
    for sample in task.samples():
        task.reference(sample, [sample["x"] * np.float32(2.01)])


def hang(task: Any) -> None:
    """With a child of its own, which outlives a worker that is ended alone."""
    child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    with open(task.options["pids"], "w", encoding="utf-8") as file:
        json.dump([os.getpid(), child.pid, task.folder], file)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("about to hang")
    task.progress("hanging")
    threading.Event().wait()


def leave_a_child(task: Any) -> None:
    """The work is done, and something of it holds the output open."""
    child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    with open(task.options["pids"], "w", encoding="utf-8") as file:
        json.dump([os.getpid(), child.pid, task.folder], file)
    onnx.save(scale_model(2), task.output)


def crash(task: Any) -> None:
    """As native code does."""
    print("segment 7 of 9")
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGSEGV)


def out_of_memory(task: Any) -> None:
    """As the kernel's OOM killer does it."""
    os.kill(os.getpid(), signal.SIGKILL)


def no_memory(task: Any) -> None:
    """As Python does it."""
    raise MemoryError


def leave(task: Any) -> None:
    """The process ends in the middle."""
    os._exit(3)


def fail(task: Any) -> None:
    """An ordinary exception."""
    print("loaded 3 layers")
    raise ValueError("layer 4 is unknown")


def chatter(task: Any) -> None:
    """Prints more than anybody will read."""
    for number in range(20_000):
        print(f"line {number} of much too much")
    raise ValueError("done talking")


def exit_politely(task: Any) -> None:
    """What a converter with a command line does."""
    sys.exit("usage: convert FILE")


def nothing(task: Any) -> None:
    """Returns, and wrote nothing."""


def full_disk(task: Any) -> None:
    """The kernel says so."""
    with open("/dev/full", "wb") as file:
        file.write(bytes(1 << 16))


def full_disk_inside(task: Any) -> None:
    """As a framework would tell it: wrapped."""
    try:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise RuntimeError("saving failed") from error


def no_room_at_all(task: Any) -> None:
    """So full that not even what went wrong can be written."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    with open(task.output, "wb") as file:
        file.write(bytes(1 << 16))


def strange_words(task: Any) -> None:
    """What is told need not be text."""
    task.producer, where = 7, os.path.dirname(__file__)
    task.note({"made in": where})
    task.progress(3)
    onnx.save(scale_model(2), task.output)


def describe(task: Any) -> None:
    """What a converter is told."""
    task.note(json.dumps([task.format, task.opset, task.options, task.trust, os.environ["CUDA_VISIBLE_DEVICES"]]))
    onnx.save(scale_model(2), task.output)
