"""Strangers' bytes are parsed and decoded in worker processes that may die; no other process looks into them.

    Ray task, replica, notebook ──► Pool ──► worker: limits of memory and time ──► JSON, and pixels in shared memory

A worker has neither torch nor Ray, no secrets in its environment, and cannot write files. Whatever a file does to it, a
crash of a compiled decoder, a hang, memory without end, an exception that is no ``Exception``, ends as the refusal of
that file; the worker is replaced, and nothing else is lost. Its answers are JSON and arrays of plain numbers, never
pickles. What a worker can be asked to do is listed in ``mp3d.data.decode_worker.TASKS``.
"""

import atexit
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import LifoQueue
from threading import Lock
from time import monotonic
from typing import Any, NamedTuple, TypeVar

import numpy as np

from mp3d.errors import Refusal

SHARED_BYTES = 64 * 2**20
"""Of the memory in which a worker leaves an array; pages never touched cost nothing."""
MAX_ANSWER_BYTES = 64 * 2**20
"""Of the JSON: the headers of a few thousand frames are far smaller."""
START_S = 60.0
"""A worker is at work within a second, on a machine that is not overloaded."""
MAX_STARTS = 3
KEPT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 * 2**20), "MALLOC_TRIM_THRESHOLD_": str(64 * 2**20)}
"""For glibc: a worker keeps what one slice took for the next. Else a third of its time goes into getting zeroed pages
from the system and giving them back, slice by slice."""
REQUESTS_AHEAD = 16
"""Files that a worker finds waiting; so many names fit into a socket, whatever the answers."""
Asked = TypeVar("Asked")
Answered = TypeVar("Answered")

LIMIT_SIGNALS = (signal.SIGXCPU, signal.SIGKILL)
"""A worker that ends by one of these met the limit of processor time, or the machine had no memory left."""


@dataclass(frozen=True)
class Limits:
    """What one task on one file may cost: its header, its pixels, or one frame of many.

    Attributes:
        memory_bytes: address space of the worker, 0.3 GB of which are Python and its libraries.
        cpu_s: whole seconds of processor time, which a busy machine does not shorten.
        wall_s: seconds in all, waiting for a slow disk among them; with the end of the worker they make five at most.
    """

    memory_bytes: int = 2**30
    cpu_s: int = 3
    wall_s: float = 4.5


class Request(NamedTuple):
    """One task on one file.

    Attributes:
        task: a key of ``mp3d.data.decode_worker.TASKS``.
        source: the file, or its bytes.
        arguments: keyword arguments of the task, as JSON has them.
        label: what a refusal calls the file; neither its name nor a UID.
        spent_s: what the tasks before took of the file's :attr:`Limits.wall_s`.
        out: where to put the array of the answer, if it is of this type and shape; else it is a new one.
    """

    task: str
    source: Path | bytes
    arguments: dict[str, Any]
    label: str
    spent_s: float = 0.0
    out: np.ndarray | None = None


class Answer(NamedTuple):
    """What a task returned: plain data, and an array, which is empty where the task makes none; how long it took."""

    value: Any
    array: np.ndarray
    took_s: float


class Pool:
    """Workers, started when they are first needed and replaced when they die. Threads may share a pool.

    Args:
        num_workers: files that are read at the same time.
        limits: for each file.
        module: run by the workers.
    """

    def __init__(
        self, num_workers: int = 1, limits: Limits | None = None, module: str = "mp3d.data.decode_worker"
    ) -> None:
        self.limits = limits or Limits()
        self.module = module
        self.num_workers = num_workers
        self._idle: LifoQueue[_Worker | None] = LifoQueue()
        for _ in range(num_workers):
            self._idle.put(None)
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="decode")

    def call(self, request: Request) -> Answer:
        """Have one task done.

        Raises:
            Refusal: that of the task, or ``DECODE_CRASHED``, ``DECODE_LIMIT`` or ``DECODE_FAILED``.
        """
        (answer,) = self.call_each([request])
        if isinstance(answer, Refusal):
            raise answer
        return answer

    def call_each(self, requests: Sequence[Request]) -> list[Answer | Refusal]:
        """Have one task after the other done by one worker, which need not wait for the next; what :meth:`call` would
        return or raise, in order. For many small tasks that make no array: it would be overwritten by the next."""
        worker = self._idle.get()
        answers: list[Answer | Refusal] = []
        try:
            while rest := requests[len(answers) :]:
                if worker is not None and not worker.alive:
                    worker.end()
                    worker = None
                if worker is None:
                    worker = self._started()
                ahead = 1 if any(isinstance(request.source, bytes) for request in rest) else REQUESTS_AHEAD
                answers += worker.call_each(rest[:ahead])
            return answers
        finally:
            self._idle.put(worker)

    def _started(self) -> "_Worker":
        """A new worker; one that the system ends while it starts, for want of memory perhaps, is tried again."""
        for _ in range(MAX_STARTS - 1):
            with suppress(RuntimeError):
                return _Worker(self.module, self.limits)
        return _Worker(self.module, self.limits)

    def map(self, requests: Iterable[Request]) -> Iterator[Answer]:
        """The answers in the order of the requests, while the workers read ahead by one file each.

        Raises:
            Refusal: as :meth:`call`, at the place of the file.
        """
        return self._ahead(self.call, requests)

    def map_each(self, batches: Iterable[Sequence[Request]]) -> Iterator[list[Answer | Refusal]]:
        """:meth:`call_each` of one batch after the other, while the workers read ahead by one batch each."""
        return self._ahead(self.call_each, batches)

    def _ahead(self, call: Callable[[Asked], Answered], requests: Iterable[Asked]) -> Iterator[Answered]:
        ahead: deque[Future[Answered]] = deque()
        try:
            for request in requests:
                ahead.append(self._threads.submit(call, request))
                if len(ahead) > self.num_workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()

    def close(self) -> None:
        """End the workers; the pool is of no use afterwards."""
        self._threads.shutdown(cancel_futures=True)
        for _ in range(self.num_workers):
            if worker := self._idle.get():
                worker.end()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def shared_pool(num_workers: int = 1) -> Pool:
    """The pool of this process with so many workers; it ends with the process."""
    with _shared_lock:
        if num_workers not in _shared:
            _shared[num_workers] = Pool(num_workers)
            atexit.register(_shared[num_workers].close)
        return _shared[num_workers]


_shared: dict[int, Pool] = {}
_shared_lock = Lock()


def _forget_shared_pools() -> None:
    """A forked child must not speak to its parent's workers."""
    global _shared, _shared_lock
    _shared, _shared_lock = {}, Lock()


os.register_at_fork(after_in_child=_forget_shared_pools)


class _Worker:
    """The parent's end of one worker process."""

    def __init__(self, module: str, limits: Limits) -> None:
        self._limits = limits
        self._socket, theirs = socket.socketpair()
        memory = _shared_memory(SHARED_BYTES)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module] + [str(theirs.fileno()), str(memory), json.dumps(asdict(limits))],
                pass_fds=(theirs.fileno(), memory),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # libraries quote there what they do not like, a patient's name perhaps
                env=_environment(),
                start_new_session=True,  # Ctrl-C is for the parent
            )
        self._shared = np.frombuffer(mmap.mmap(memory, SHARED_BYTES, access=mmap.ACCESS_READ), np.uint8)
        os.close(memory)
        self._ended = False
        try:
            receive(self._socket, monotonic() + START_S)
        except (OSError, EOFError) as error:  # no fault of any file
            self.end()
            raise RuntimeError(f"{module} did not start; run it by hand to see why") from error

    @property
    def alive(self) -> bool:
        return not self._ended and self._process.poll() is None

    def call_each(self, requests: Sequence[Request]) -> list[Answer | Refusal]:
        """The answers to all, or to those up to the one that ended the worker."""
        answers: list[Answer | Refusal] = []
        started = monotonic()
        deadline = started + self._limits.wall_s - requests[0].spent_s
        try:
            for request in requests:
                blob = request.source if isinstance(request.source, bytes) else b""
                path = None if isinstance(request.source, bytes) else os.fspath(request.source)
                message = json.dumps([request.task, path, len(blob), request.arguments]).encode()
                with suppress(OSError):  # whose fault it is shows in who gets no answer
                    send(self._socket, message, blob, deadline)
            for request in requests:
                try:
                    answers.append(self._receive(request, started, alone=len(requests) == 1))
                except Refusal as refusal:
                    answers.append(refusal)
                    if self._ended:
                        break
                started = monotonic()
        except BaseException:  # Ctrl-C: the answers to come must not be taken for those of the next files
            self.end()
            raise
        return answers

    def _receive(self, request: Request, started: float, alone: bool) -> Answer:
        deadline = started + self._limits.wall_s - request.spent_s
        try:
            content = json.loads(receive(self._socket, deadline, MAX_ANSWER_BYTES))
            if "array" in content and not alone:
                raise TypeError
            return Answer(*self._answer(content, request), monotonic() - started)
        except Refusal:
            raise
        except TimeoutError:
            self.end()
            raise _over_limit(request.label, f"{self._limits.wall_s:g} s") from None
        except (OSError, EOFError, ValueError, LookupError, TypeError) as error:  # died, or answers what is no answer
            code = self.end()
            if -code in LIMIT_SIGNALS:
                limit = f"{self._limits.cpu_s} s of processor time, or the machine's memory"
                raise _over_limit(request.label, limit) from None
            how = signal.Signals(-code).name if code < 0 else type(error).__name__
            detail = f"reading {request.label} ended its process ({how}); copy or export it again"
            raise Refusal("DECODE_CRASHED", detail) from None

    def _answer(self, content: dict[str, Any], request: Request) -> tuple[Any, np.ndarray]:
        if refusal := content.get("refusal"):
            raise Refusal(*refusal)
        if name := content.get("error"):
            if name == "MemoryError":
                raise _over_limit(request.label, f"{self._limits.memory_bytes >> 20} MiB of memory")
            raise Refusal("DECODE_FAILED", f"{request.label} is damaged ({name}); copy or export it again")
        if array := content.get("array"):
            dtype, shape = np.dtype(array["dtype"]), tuple(array["shape"])
            size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            shared, out = self._shared[:size].view(dtype).reshape(shape), request.out
            if out is None or (out.dtype, out.shape) != (dtype, shape):
                return content["value"], shared.copy()
            np.copyto(out, shared)
            return content["value"], out
        return content["value"], np.empty(0)

    def end(self) -> int:
        """Returns the exit code; negative: a signal."""
        self._ended = True
        self._socket.close()
        try:
            return self._process.wait(0.2)  # one that died, or waits for the next request, needs no more
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            return -signal.SIGALRM


def _over_limit(label: str, limit: str) -> Refusal:
    return Refusal("DECODE_LIMIT", f"reading {label} took more than {limit}; export it again or leave it out")


def _environment() -> dict[str, str]:
    """What Python and the libraries need; the tokens and keys of the parent stay with it."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL") if name in os.environ}
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return kept | one_thread | KEPT_MEMORY | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}


def _shared_memory(size: int) -> int:
    """A file descriptor of memory that both processes map; sealed where there are seals, so that it cannot shrink
    under the reader."""
    if not hasattr(os, "memfd_create"):
        with tempfile.TemporaryFile() as file:
            file.truncate(size)
            return os.dup(file.fileno())
    import fcntl

    memory = os.memfd_create("mp3d", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(memory, size)
    fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return memory


def send(channel: socket.socket, message: bytes, blob: bytes = b"", deadline: float | None = None) -> None:
    """A message with its length before it, then bytes as they are."""
    channel.settimeout(None if deadline is None else max(deadline - monotonic(), 0.001))
    channel.sendall(len(message).to_bytes(8, "little") + message)
    if blob:
        channel.sendall(blob)


def receive(channel: socket.socket, deadline: float | None = None, limit: int | None = None) -> bytearray:
    """The next message.

    Raises:
        TimeoutError: the deadline passed.
        EOFError: the other end closed the channel.
        ValueError: the message is longer than ``limit``.
    """
    size = int.from_bytes(receive_bytes(channel, 8, deadline), "little")
    if limit is not None and size > limit:
        raise ValueError(f"an answer of {size} bytes")
    return receive_bytes(channel, size, deadline)


def receive_bytes(channel: socket.socket, size: int, deadline: float | None = None) -> bytearray:
    """So many bytes; raises as :func:`receive`."""
    data = bytearray(size)
    view, at = memoryview(data), 0
    while at < size:
        channel.settimeout(None if deadline is None else max(deadline - monotonic(), 0.001))
        count = channel.recv_into(view[at:])
        if not count:
            raise EOFError
        at += count
    return data


Task = Callable[..., tuple[Any, np.ndarray | None]]
"""``task(source, **arguments)``, run in a worker."""
