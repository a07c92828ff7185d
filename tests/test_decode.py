"""The pool of disposable workers: whatever happens in one of them is the refusal of one file."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mp3d.data import decode
from mp3d.data.decode import Limits, Pool, Request
from mp3d.errors import Refusal

LIMITS = Limits(cpu_s=1, wall_s=2.0)


@pytest.fixture
def pool() -> Iterator[Pool]:
    with Pool(limits=LIMITS, module="tests.faulty_worker") as pool:
        yield pool


def request(task: str, source: Path | bytes = b"", **arguments: Any) -> Request:
    return Request(task, source, arguments, "instance 7")


def refusal_of(pool: Pool, task: str, **arguments: Any) -> Refusal:
    with pytest.raises(Refusal) as refused:
        pool.call(request(task, **arguments))
    assert "instance 7" in refused.value.detail or task == "refuse"
    return refused.value


def pid(pool: Pool) -> int:
    return pool.call(request("echo")).value["pid"]


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split(") ")[1][0] != "Z"
    except FileNotFoundError:
        return False


def test_files_and_bytes_arguments_and_arrays(pool: Pool, tmp_path: Path) -> None:
    content = np.random.default_rng(0).bytes(3_000_000)
    (tmp_path / "ä\udc80.dcm").write_bytes(content)
    for source in (content, tmp_path / "ä\udc80.dcm"):
        value, array, took_s = pool.call(request("echo", source, number=float("inf"), text="\udce4"))
        assert (value["number"], value["text"]) == (float("inf"), "\udce4")
        assert array.shape == (1, len(content))
        assert array.tobytes() == content
        assert 0 < took_s < LIMITS.wall_s


def test_an_array_is_not_changed_by_the_next_answer(pool: Pool) -> None:
    first = pool.call(request("echo", b"abc")).array
    pool.call(request("echo", b"xyz"))
    assert first.tobytes() == b"abc"


@pytest.mark.parametrize(
    ("task", "arguments", "reason", "survives"),
    [
        ("die", {"number": signal.SIGSEGV}, "DECODE_CRASHED", False),
        ("die", {"number": signal.SIGABRT}, "DECODE_CRASHED", False),
        ("die", {"number": signal.SIGKILL}, "DECODE_LIMIT", False),
        ("spin", {}, "DECODE_LIMIT", False),
        ("stand_still", {}, "DECODE_LIMIT", False),
        ("fill_memory", {}, "DECODE_LIMIT", True),
        ("answer_too_much", {}, "DECODE_LIMIT", True),
        ("panic", {}, "DECODE_FAILED", True),
        ("refuse", {}, "NOT_CT", True),
    ],
)
def test_whatever_a_file_does_is_its_own_refusal(
    pool: Pool, task: str, arguments: dict[str, Any], reason: str, survives: bool
) -> None:
    before = pid(pool)
    refusal = refusal_of(pool, task, **arguments)
    assert refusal.reason == reason
    assert "CANARY" not in refusal.detail
    assert (pid(pool) == before) == survives
    assert survives or not is_running(before)


def test_a_file_gets_its_answer_within_five_seconds_whatever_it_waits_for() -> None:
    """Of the time that its header took, nothing is left for its pixels."""
    assert Limits().wall_s < 5
    with Pool(module="tests.faulty_worker") as pool:
        pool.call(request("echo"))
        for spent_s in (0.0, 4.0):
            started = time.monotonic()
            with pytest.raises(Refusal, match="DECODE_LIMIT"):
                pool.call(request("stand_still")._replace(spent_s=spent_s))
            waited_s = time.monotonic() - started
            assert Limits().wall_s - spent_s <= waited_s < 60
            pool.call(request("echo"))


def test_an_array_is_put_where_it_is_wanted(pool: Pool) -> None:
    out = np.zeros((1, 3), np.uint8)
    assert pool.call(request("echo", b"abc")._replace(out=out)).array is out
    assert out.tobytes() == b"abc"
    other = pool.call(request("echo", b"four")._replace(out=out)).array
    assert (other.tobytes(), out.tobytes()) == (b"four", b"abc")


def test_a_worker_that_was_killed_between_two_files_is_replaced(pool: Pool) -> None:
    os.kill(pid(pool), signal.SIGKILL)
    time.sleep(0.2)
    assert pool.call(request("echo", b"again")).array.tobytes() == b"again"


def test_the_time_of_good_files_does_not_add_up(pool: Pool) -> None:
    busy = "import time; t = time.process_time()\nwhile time.process_time() - t < .4: pass"
    assert subprocess.run([sys.executable, "-c", busy], check=True).returncode == 0
    before = pid(pool)
    for _ in range(200):
        pool.call(request("echo", bytes(2**20)))
    assert pid(pool) == before


def test_a_worker_writes_no_file(pool: Pool, tmp_path: Path) -> None:
    assert refusal_of(pool, "write_file", path=str(tmp_path / "file")).reason == "DECODE_CRASHED"
    assert not (tmp_path / "file").exists() or (tmp_path / "file").stat().st_size == 0


def test_a_worker_knows_neither_torch_nor_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    with Pool(module="tests.faulty_worker") as pool:
        seen = pool.call(request("look_around")).value
    assert not {"torch", "ray", "wandb", "matplotlib"} & set(seen["modules"])
    assert "secret" not in json.dumps(seen["environment"])


def test_several_workers_answer_in_order() -> None:
    with Pool(num_workers=3, limits=LIMITS, module="tests.faulty_worker") as pool:
        requests = [request("echo", bytes([n]) * (200_000 - 900 * n)) for n in range(200)]
        answers = list(pool.map(requests))
        assert [answer.array[0, 0] for answer in answers] == list(range(200))
        assert len({answer.value["pid"] for answer in answers}) == 3


def test_a_refusal_stands_at_its_place_and_the_rest_can_be_read(pool: Pool) -> None:
    answers = pool.map([request("echo", b"a"), request("panic"), request("echo", b"c")])
    assert next(answers).array.tobytes() == b"a"
    with pytest.raises(Refusal, match="DECODE_FAILED"):
        next(answers)
    assert pool.call(request("echo", b"d")).array.tobytes() == b"d"


def test_files_that_wait_for_their_turn_pay_for_no_other(pool: Pool, tmp_path: Path) -> None:
    files = [tmp_path / str(number) for number in range(40)]
    tasks = dict.fromkeys(range(40), "count") | {3: "refuse", 7: "die", 8: "panic", 21: "stand_still", 22: "die"}
    requests = [
        request(task, files[i], **({"number": 9} if task == "die" else {"number": i} if task == "count" else {}))
        for i, task in tasks.items()
    ]
    answers = pool.call_each(requests)
    refused = {i: answer.reason for i, answer in enumerate(answers) if isinstance(answer, Refusal)}
    assert refused == {
        3: "NOT_CT", 7: "DECODE_LIMIT", 8: "DECODE_FAILED", 21: "DECODE_LIMIT", 22: "DECODE_LIMIT"
    }  # fmt: skip
    told = {i: answer.value for i, answer in enumerate(answers) if not isinstance(answer, Refusal)}
    assert [value["number"] for value in told.values()] == [i for i in range(40) if i not in refused]
    assert len({value["pid"] for value in told.values()}) == 3  # two died in a row


def test_batches_that_several_workers_read_are_answered_in_order(tmp_path: Path) -> None:
    with Pool(num_workers=2, limits=LIMITS, module="tests.faulty_worker") as pool:
        requests = [
            request("die", tmp_path / "x", number=9) if i == 50 else request("count", tmp_path / "x", number=i)
            for i in range(120)
        ]
        batches = [requests[start : start + 8] for start in range(0, 120, 8)]
        answers = [answer for answered in pool.map_each(batches) for answer in answered]
    refused = [i for i, answer in enumerate(answers) if isinstance(answer, Refusal)]
    told = [answer.value for answer in answers if not isinstance(answer, Refusal)]
    assert refused == [50]
    assert [value["number"] for value in told] == [i for i in range(120) if i != 50]
    assert len({value["pid"] for value in told}) > 1


def test_an_array_that_the_next_answer_may_have_overwritten_is_none(pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    several = pool.call_each([request("echo", tmp_path / "a")] * 2)
    assert [answer.reason for answer in several if isinstance(answer, Refusal)] == ["DECODE_CRASHED"]
    alone = pool.call_each([request("echo", b"a")] * 2)
    assert [bytes(answer.array) for answer in alone if not isinstance(answer, Refusal)] == [b"a"] * 2


def test_threads_share_a_pool() -> None:
    wrong: list[int] = []

    def ask(number: int, pool: Pool) -> None:
        for _ in range(20):
            if pool.call(request("echo", number=number)).value["number"] != number:
                wrong.append(number)

    with Pool(num_workers=2, limits=LIMITS, module="tests.faulty_worker") as pool:
        threads = [threading.Thread(target=ask, args=(number, pool)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_an_interrupted_call_does_not_answer_the_next(pool: Pool) -> None:
    before = pid(pool)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background process ignores it
    try:
        threading.Timer(0.3, signal.pthread_kill, [threading.get_ident(), signal.SIGINT]).start()
        with pytest.raises(KeyboardInterrupt):
            pool.call(request("stand_still"))
    finally:
        signal.signal(signal.SIGINT, handler)
    assert pool.call(request("echo", b"next")).array.tobytes() == b"next"
    assert pid(pool) != before


def test_workers_end_with_their_parent_even_if_it_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time; from mp3d.data.decode import Pool, Request\n"
        "pool = Pool(module='tests.faulty_worker')\n"
        "print(pool.call(Request('echo', b'', {}, '')).value['pid'], flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        assert is_running(worker)
        parent.kill()
    deadline = time.monotonic() + 5
    while is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(worker)


def test_a_forked_child_has_workers_of_its_own(tmp_path: Path) -> None:
    ours = decode.shared_pool()
    child = os.fork()
    if not child:
        os._exit(0 if decode.shared_pool() is not ours else 1)
    assert os.waitpid(child, 0)[1] == 0
