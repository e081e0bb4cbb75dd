"""Many rows without Python: right numbers, helpers, stopping, failures, and arguments that make no sense."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from tests.unit.native.rig import EFFICIENT, LATENCY, MODES, WIDTH, Lane, Rig, rig, submit
from trtx_py import _native

LAUNCH_FAILED, OUT_OF_MEMORY = 719, 2
SPIN_NS = 1_000_000_000
SIZES = (1, 2, 4)
Station = tuple[_native.Place, tuple[_native.Bucket, ...]]


def family(own: Lane, sizes: tuple[int, ...] = SIZES, widths: tuple[int, ...] = (WIDTH,)) -> list[_native.Bucket]:
    """Buckets of so many rows each, over the memory of the largest on every slot: each output is its input."""
    made, driver = own.rig, own.rig.driver
    memory = [
        [(made.pinned(sizes[-1] * width * 4), made.pinned(sizes[-1] * width * 4)) for width in widths]
        for _ in range(own.native.slots)
    ]
    buckets = []
    for size in sizes:
        names = [str(number) if number else "" for number in range(len(widths))]
        specs = tuple((f"x{name}", "f", (size, width)) for name, width in zip(names, widths, strict=True))
        bucket = _native.Bucket(own.native, specs, tuple(f"y{name}" for name in names), True)
        for slot, pairs in enumerate(memory):
            driver.cuStreamBeginCapture(own.stream, 2)
            views = []
            for ((x_pinned, x), (y_pinned, y)), width in zip(pairs, widths, strict=True):
                nbytes = size * width * 4
                device = made.device(nbytes)
                driver.cuMemcpyHtoDAsync(device, x_pinned, nbytes, own.stream)
                driver.cuMemcpyDtoHAsync(y_pinned, device, nbytes, own.stream)
                views.append([array.reshape(-1, width)[:size] for array in (x, y)])
            graph = driver.cuStreamEndCapture(own.stream)
            made.executables.append(driver.cuGraphInstantiate(graph, 0))
            driver.cuGraphDestroy(graph)
            bucket.add_place(slot, made.executables[-1], tuple(x for x, _ in views), tuple(y for _, y in views))
        buckets.append(bucket)
    return buckets


def stations(buckets: list[_native.Bucket], count: int) -> tuple[Station, ...]:
    """So many places of the largest, with all graphs."""
    found = []
    for _ in range(count):
        place = buckets[-1].acquire()
        assert place is not None
        found.append((place, tuple(buckets)))
    return tuple(found)


def give_back(places: tuple[Station, ...]) -> None:
    for place, _ in places:
        place.release()


def numbers(count: int, width: int = WIDTH) -> np.ndarray[Any, Any]:
    return np.arange(count * width, dtype=np.float32).reshape(count, width) + 1


def job(
    x: np.ndarray[Any, Any], y: np.ndarray[Any, Any], start: int = 0, batch: int = 4, piece: int = 1 << 18
) -> _native.ManyRows:
    return _native.ManyRows((x,), (y,), start, len(x), batch, piece)


class Helpers:
    """Threads in ``help``."""

    def __init__(self, many: _native.ManyRows, count: int, spin_ns: int = 0) -> None:
        self._many, self._spin_ns = many, spin_ns
        self._copied: list[int] = []
        self._threads = [threading.Thread(target=self._help) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def _help(self) -> None:
        self._copied.append(self._many.help(self._spin_ns))

    def join(self) -> int:
        """They have gone home. How many pieces they copied."""
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()
        assert len(self._copied) == len(self._threads)
        return sum(self._copied)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("places", [1, 3])
def test_every_number_of_rows(mode: int, places: int) -> None:
    """The last chunk goes with the smallest graph that has enough rows."""
    with rig() as made:
        buckets = family(made.lane(3, mode))
        held = stations(buckets, places)
        for count in range(1, 14):
            x, y = numbers(count), np.zeros((count, WIDTH), np.float32)
            many = job(x, y)
            assert many.run(held, SPIN_NS if mode == LATENCY else 0, 0) == -(-count // 4)
            np.testing.assert_array_equal(y, x)
            assert (many.done, many.next, many.batches) == (count, count, -(-count // 4))
            assert many.padding == (1 if count % 4 == 3 else 0)
            assert many.error() is None
            queue, gpu = (np.frombuffer(each) for each in many.times())
            assert len(queue) == len(gpu) == many.batches
            assert (queue >= 0).all()
            assert (gpu >= 0).all()
        assert sum(bucket.hits for bucket in buckets) == sum(-(-count // 4) for count in range(1, 14))
        give_back(held)
        assert buckets[-1].busy == 0


def test_some_rows_in_the_middle() -> None:
    with rig() as made:
        held = stations(family(made.lane(2)), 2)
        x, y = numbers(20), np.zeros((20, WIDTH), np.float32)
        many = _native.ManyRows((x,), (y,), 3, 14, 3)
        assert many.run(held, SPIN_NS, 0) == 4
        np.testing.assert_array_equal(y[3:14], x[3:14])
        assert not y[:3].any()
        assert not y[14:].any()
        assert many.padding == 3  # thrice three rows in a graph of four, and two in one of two
        empty = _native.ManyRows((x,), (y,), 5, 5, 3)
        assert empty.run(held, SPIN_NS, 0) == 0
        give_back(held)


def test_two_lanes() -> None:
    with rig() as made:
        lanes = [family(made.lane(2, mode)) for mode in (LATENCY, EFFICIENT)]
        held = (*stations(lanes[0], 2), *stations(lanes[1], 2))
        x, y = numbers(4001), np.zeros((4001, WIDTH), np.float32)
        many = job(x, y)
        assert many.run(held, 20_000, 0) == many.batches == 1001
        np.testing.assert_array_equal(y, x)
        give_back(held)


@pytest.mark.parametrize("helpers", [0, 1, 3])
def test_pieces_of_every_size(helpers: int) -> None:
    """A piece may end anywhere, also in another tensor than it began."""
    widths = (3, 1, WIDTH)
    with rig() as made:
        held = stations(family(made.lane(2), widths=widths), 2)
        for piece in (*range(1, 40), 4 * sum(widths) * 4 - 1, 4 * sum(widths) * 4):
            inputs = tuple(numbers(7, width) for width in widths)
            outputs = tuple(np.zeros_like(x) for x in inputs)
            many = _native.ManyRows(inputs, outputs, 0, 7, 4, piece)
            helping = Helpers(many, helpers)
            assert many.run(held, SPIN_NS, 0) == 2
            helping.join()
            for x, y in zip(inputs, outputs, strict=True):
                np.testing.assert_array_equal(y, x)
        give_back(held)


@pytest.mark.parametrize("spin_ns", [0, 5_000, SPIN_NS])
@pytest.mark.parametrize("mode", [LATENCY, EFFICIENT])
def test_helpers(mode: int, spin_ns: int) -> None:
    """Many small copies one after another, with helpers that sleep between them, or poll."""
    with rig() as made:
        held = stations(family(made.lane(3, mode)), 3)
        for piece in (1, 5, 32):
            x, y = numbers(2001), np.zeros((2001, WIDTH), np.float32)
            many = job(x, y, piece=piece)
            helping = Helpers(many, 3, spin_ns)
            assert many.run(held, 0, 0) == 501
            helping.join()
            np.testing.assert_array_equal(y, x)
            assert (many.done, many.next, many.batches, many.padding) == (2001, 2001, 501, 0)
        give_back(held)


def test_helpers_share_the_copying() -> None:
    """More of them than there are cores: the captain waits for pieces of threads that are not running."""
    width, copied, pieces = 1 << 14, 0, 0
    with rig() as made:
        held = stations(family(made.lane(2), sizes=(8,), widths=(width,)), 2)
        x = numbers(100, width)
        while pieces < 8000 or not copied:
            y = np.zeros_like(x)
            many = job(x, y, batch=8, piece=1 << 14)
            helping = Helpers(many, 6)
            assert many.run(held, 0, 0) == 13
            copied += helping.join()
            np.testing.assert_array_equal(y, x)
            pieces += 2 * x.nbytes >> 14
        assert copied <= pieces
        give_back(held)


def test_what_fits_a_piece_is_not_shared() -> None:
    with rig() as made:
        held = stations(family(made.lane(1)), 1)
        x, y = numbers(400), np.zeros((400, WIDTH), np.float32)
        many = job(x, y, piece=4 * WIDTH * 4)
        helping = Helpers(many, 2, SPIN_NS)
        assert many.run(held, 0, 0) == 100
        assert helping.join() == 0
        np.testing.assert_array_equal(y, x)
        give_back(held)


class Running:
    """``run`` in a thread, whose first launches wait for a gate."""

    def __init__(self, made: Rig, many: _native.ManyRows, places: tuple[Station, ...], own: Lane) -> None:
        self.gate = own.hold()
        self._many = many
        self.result: int | BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(places,))
        self._thread.start()
        while own.native.statistics()["in_flight"] < len(places):
            pass  # they are being launched

    def _run(self, places: tuple[Station, ...]) -> None:
        try:
            self.result = self._many.run(places, 0, 0)
        except BaseException as error:
            self.result = error

    def join(self) -> Any:
        self._thread.join(60)
        assert not self._thread.is_alive()
        return self.result


def test_stopped_in_the_middle() -> None:
    """What is in flight is finished; the rest is for another, from `next` on."""
    with rig() as made:
        own = made.lane(2)
        held = stations(family(own), 2)
        x, y = numbers(100), np.zeros((100, WIDTH), np.float32)
        many = job(x, y)
        running = Running(made, many, held, own)
        many.tell(False)
        running.gate.open()
        assert running.join() == 2
        assert (many.next, many.done) == (8, 8)
        np.testing.assert_array_equal(y[:8], x[:8])
        assert not y[8:].any()
        assert many.run(held, SPIN_NS, 0) == 0  # it stays stopped
        rest = job(x, y, 8)
        rest.run(held, SPIN_NS, 0)
        np.testing.assert_array_equal(y, x)
        give_back(held)


@pytest.mark.parametrize("spin_ns", [0, SPIN_NS])
def test_stopped_with_helpers(spin_ns: int) -> None:
    """They copy the results of what is in flight, and leave."""
    with rig() as made:
        own = made.lane(2)
        held = stations(family(own), 2)
        x, y = numbers(100), np.zeros((100, WIDTH), np.float32)
        many = job(x, y, piece=1)
        helping = Helpers(many, 2, spin_ns)
        running = Running(made, many, held, own)
        many.tell(False)
        running.gate.open()
        assert running.join() == 2
        helping.join()
        np.testing.assert_array_equal(y[:8], x[:8])
        assert not y[8:].any()
        give_back(held)


def test_helpers_that_come_late() -> None:
    with rig() as made:
        own = made.lane(2)
        held = stations(family(own), 2)
        x, y = numbers(400), np.zeros((400, WIDTH), np.float32)
        many = job(x, y, piece=3)
        running = Running(made, many, held, own)
        helping = Helpers(many, 2)
        running.gate.open()
        assert running.join() == 100
        helping.join()
        np.testing.assert_array_equal(y, x)
        assert Helpers(many, 2).join() == 0  # later still: there is nothing to wait for
        give_back(held)


def test_helpers_of_a_run_that_never_is() -> None:
    """Told to stop before, or called with what makes no sense."""
    x, y = numbers(8), np.zeros((8, WIDTH), np.float32)
    for abandon in (False, True):
        many = job(x, y)
        helping = Helpers(many, 2)
        many.tell(abandon)
        assert helping.join() == 0
    many = job(x, y)
    helping = Helpers(many, 2)
    with pytest.raises(ValueError, match="places"):
        many.run((), 0, 0)
    assert helping.join() == 0
    for nonsense in (-1, "", 1 << 80):
        with pytest.raises((TypeError, OverflowError)):
            many.help(nonsense)  # type: ignore[arg-type]


def test_a_time_limit() -> None:
    """Each call brings the job forward, however late it is."""
    with rig() as made:
        held = stations(family(made.lane(2)), 2)
        x, y = numbers(16), np.zeros((16, WIDTH), np.float32)
        many = job(x, y)
        for done in (4, 8, 12, 16, 16):
            many.run(held, SPIN_NS, 1)
            assert (many.next, many.done) == (done, done)
        np.testing.assert_array_equal(y, x)
        give_back(held)


def test_abandoned_in_flight() -> None:
    """It does not wait for the GPU; the slots come back when that is done."""
    with rig() as made:
        own = made.lane(2)
        buckets = family(own)
        port = made.port(buckets[-1])
        held = stations(buckets, 2)
        x, y = numbers(100), np.zeros((100, WIDTH), np.float32)
        many = job(x, y, piece=9)
        running = Running(made, many, held, own)
        assert many.error() is None
        with pytest.raises(RuntimeError, match="at work"):
            many.times()
        helping = Helpers(many, 2)
        many.tell(True)
        assert running.join() == 0
        helping.join()
        give_back(held)
        assert buckets[-1].acquire() is None
        assert port.running == 2
        running.gate.open()
        own.rest()
        assert port.running == 0
        assert (port.hits, port.cancelled) == (2, 2)
        assert buckets[-1].busy == 0
        assert not y.any()
        assert many.times() == (b"", b"")


def test_a_launch_that_fails() -> None:
    with rig() as made:
        own = made.lane(2)
        buckets = family(own)
        port = made.port(buckets[-1])
        held = stations(buckets, 2)
        x, y = numbers(100), np.zeros((100, WIDTH), np.float32)
        many = job(x, y, piece=7)
        helping = Helpers(many, 2)
        made.fault("cuGraphLaunch", OUT_OF_MEMORY, nth=4)
        assert many.run(held, SPIN_NS, 0) == many.batches == 3
        helping.join()
        error: Any = many.error()
        assert (error.status, error.call) == (OUT_OF_MEMORY, "cuGraphLaunch")
        assert many.done == 12
        np.testing.assert_array_equal(y[:12], x[:12])
        assert (port.hits, port.completed, port.failed) == (4, 3, 1)
        assert many.run(held, SPIN_NS, 0) == 0
        again = job(x, y)
        again.run(held, SPIN_NS, 0)
        np.testing.assert_array_equal(y, x)
        give_back(held)
        assert submit_works(port, buckets)


def submit_works(port: _native.Port, buckets: list[_native.Bucket]) -> bool:
    """The slots are as good as before."""
    wait = port.submit({"x": numbers(4)}, None)
    return wait is not None and wait.block(0) and bool(np.array_equal(wait.result()["y"], numbers(4)))


def test_a_lost_device() -> None:
    with rig(sound=False) as made:
        own = made.lane(2)
        buckets = family(own)
        port = made.port(buckets[-1])
        held = stations(buckets, 2)
        many = job(numbers(100), np.zeros((100, WIDTH), np.float32))
        made.fault("cuGraphLaunch", LAUNCH_FAILED, nth=5, lose=True)
        many.run(held, SPIN_NS, 0)
        error: Any = many.error()
        assert error.status == LAUNCH_FAILED
        assert many.done < 100
        assert own.native.dead == LAUNCH_FAILED
        late = job(numbers(9), np.zeros((9, WIDTH), np.float32))
        assert late.run(held, SPIN_NS, 0) == 0
        assert late.error() is not None
        assert port.completed + port.failed == port.hits
        give_back(held)


def test_a_place_at_work_is_nobody_elses() -> None:
    with rig() as made:
        own = made.lane(2)
        buckets = family(own)
        held = stations(buckets, 2)
        x, y = numbers(8), np.zeros((8, WIDTH), np.float32)
        many, other = job(x, y), job(x, y.copy())
        running = Running(made, many, held, own)
        place = held[0][0]
        for call in (
            place.release,
            lambda: place.submit(None, False),
            lambda: other.run(held, 0, 0),
            lambda: many.run((), 0, 0),
        ):
            with pytest.raises(RuntimeError):
                call()
        assert not own.native.close()
        running.gate.open()
        assert running.join() == 2
        np.testing.assert_array_equal(y, x)
        give_back(held)
        with pytest.raises(RuntimeError, match="given back"):
            other.run(held, 0, 0)


def test_a_place_with_a_request_in_flight() -> None:
    with rig() as made:
        own = made.lane(1)
        buckets = family(own)
        port = made.port(buckets[-1])
        held = stations(buckets, 1)
        gate = own.hold()
        wait = held[0][0].submit(None, False)
        many = job(numbers(8), np.zeros((8, WIDTH), np.float32))
        with pytest.raises(RuntimeError, match="at work"):
            many.run(held, 0, 0)
        gate.open()
        assert wait.block(0)
        wait.result()
        del wait
        assert many.run(held, SPIN_NS, 0) == 2
        give_back(held)
        assert submit(made.port(own.bucket()), 1.0).block(0)
        assert port.open


def bad_jobs() -> dict[str, Any]:
    x, y = numbers(8), np.zeros((8, WIDTH), np.float32)
    frozen = y.copy()
    frozen.flags.writeable = False
    return {
        "no inputs": ((), (y,), 0, 8, 4),
        "unequal rows": ((x,), (y[:7],), 0, 8, 4),
        "no rows": ((x[:0],), (y[:0],), 0, 0, 4),
        "no axis": ((np.float32(1).reshape(()),), (y,), 0, 8, 4),
        "not contiguous": ((np.zeros((8, 2 * WIDTH), np.float32)[:, ::2],), (y,), 0, 8, 4),
        "read-only outputs": ((x,), (frozen,), 0, 8, 4),
        "no array": ((x,), (1,), 0, 8, 4),
        "before the first": ((x,), (y,), -1, 8, 4),
        "backwards": ((x,), (y,), 5, 4, 4),
        "past the end": ((x,), (y,), 0, 9, 4),
        "no batch": ((x,), (y,), 0, 8, 0),
        "no piece": ((x,), (y,), 0, 8, 4, 0),
        "a list": ([x], (y,), 0, 8, 4),
        "too large": ((x,), (y,), 0, 1 << 80, 4),
    }


@pytest.mark.parametrize("what", bad_jobs())
def test_jobs_that_make_no_sense(what: str) -> None:
    with pytest.raises((ValueError, TypeError, BufferError, OverflowError)):
        _native.ManyRows(*bad_jobs()[what])


def test_a_job_without_init() -> None:
    many = _native.ManyRows.__new__(_native.ManyRows)
    with pytest.raises(RuntimeError):
        many.run((), 0, 0)
    with pytest.raises(RuntimeError):
        many.times()
    with pytest.raises(RuntimeError):
        many.help(0)
    with pytest.raises(RuntimeError):
        many.tell(False)
    made = job(numbers(8), np.zeros((8, WIDTH), np.float32))
    with pytest.raises(RuntimeError, match="once"):
        made.__init__((numbers(8),), (numbers(8),), 0, 8, 4)


def test_places_that_make_no_sense() -> None:
    with rig() as made:
        own, other = made.lane(2), made.lane(2)
        buckets, elsewhere = family(own), family(other)
        apart = family(own)[-1]  # of the same rows, in other memory
        held = stations(buckets, 1)
        place = held[0][0]
        x, y = numbers(8), np.zeros((8, WIDTH), np.float32)
        many = job(x, y)
        wide = _native.ManyRows((np.ones((8, 2 * WIDTH), np.float32),), (y,), 0, 8, 4)
        two = _native.ManyRows((x, x), (y,), 0, 8, 4)
        cases: list[tuple[_native.ManyRows, Any]] = [
            (many, ()),
            (many, [held[0]]),
            (many, (place,)),
            (many, ((place, ()),)),
            (many, ((place, (1,)),)),
            (many, ((1, tuple(buckets)),)),
            (many, ((place, (buckets[0],)),)),  # smaller than a batch
            (many, ((place, (buckets[2], buckets[1])),)),
            (many, ((place, (elsewhere[-1],)),)),
            (many, ((place, (apart,)),)),
            (many, (held[0], held[0])),
            (many, held * 300),
            (wide, held),
            (two, held),
        ]
        for each, places in cases:
            with pytest.raises((ValueError, TypeError, RuntimeError)):
                each.run(places, 0, 0)
            assert each.next == 0
        assert many.run(held, SPIN_NS, 0) == 2  # nothing stuck to the place
        give_back(held)


def test_the_arrays_are_held_and_let_go() -> None:
    x, y = numbers(8), np.zeros((8, WIDTH), np.float32)
    many = job(x, y)
    with pytest.raises(ValueError, match="resize"):
        y.resize((16, WIDTH))
    del many
    y.resize((16, WIDTH), refcheck=False)
    assert y.shape == (16, WIDTH)
