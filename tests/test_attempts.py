"""Claims, with real processes."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from vlarl_bench import attempts
from vlarl_bench.attempts import Claim, is_alive, newest, read_attempt, take
from vlarl_bench.errors import BenchError
from vlarl_bench.records import read_rows
from vlarl_bench.sealed import write_sealed

fork = multiprocessing.get_context("fork")


def crowd(*arguments):
    """What each of 64 processes was told."""
    command = [sys.executable, Path(__file__).parent / "faults" / "crowd.py", *map(str, arguments)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout)


@pytest.mark.torture
def test_of_64_processes_one_gets_the_cell_and_again_when_it_is_dead(tmp_path, record_property):
    for number in (1, 2):
        told = crowd("claim", tmp_path)
        winners = [pid for pid, won in told if won]
        assert (len(told), len(winners)) == (64, 1)
        (path,) = newest(tmp_path).values()
        attempt = read_attempt(path)
        assert (attempt.pid, attempt.number, attempt.outcome) == (*winners, number, "")
        assert not is_alive(path, attempt)
    assert sorted(os.listdir(tmp_path)) == ["cell.0001.json", "cell.0002.json"]
    record_property("torture", "64 processes after one cell, twice: 1 winner each time")


def test_a_process_that_was_killed_or_whose_id_another_has_is_dead(tmp_path):
    def hold(ready):
        take(tmp_path, "cell", seen=0)
        ready.put(True)
        time.sleep(600)

    ready = fork.SimpleQueue()
    holder = fork.Process(target=hold, args=(ready,))
    holder.start()
    ready.get()
    path = tmp_path / "cell.0001.json"
    attempt = read_attempt(path)
    assert is_alive(path, attempt)
    assert take(tmp_path, "cell", seen=0) == f"it is running: process {holder.pid} on {attempt.host}"
    assert not is_alive(path, replace(attempt, started="1"))
    os.kill(holder.pid, signal.SIGSTOP)  # however long it sleeps, it is not dead
    os.utime(path, (0, 0))
    assert is_alive(path, attempt)
    os.kill(holder.pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while is_alive(path, attempt):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert isinstance(take(tmp_path, "cell", seen=0), Claim)


@pytest.fixture
def far(tmp_path):
    """A claim that another machine holds."""
    claim = take(tmp_path, "cell", seen=0)
    attempt = replace(claim.attempt, host="far", job="7_1")
    write_sealed(tmp_path / attempt.file, asdict(attempt))
    return Claim(tmp_path, attempt)


def test_a_holder_elsewhere_lives_by_its_heartbeat_whatever_the_clocks_say(far, tmp_path, monkeypatch):
    path = tmp_path / far.attempt.file
    monkeypatch.setattr(time, "time", lambda: 4e9)  # this machine's clock has jumped
    assert is_alive(path, far.attempt)
    assert take(tmp_path, "cell", seen=0) == "it is running: job 7_1 on far"
    stored = attempts.file_clock(tmp_path)
    os.utime(path, (stored - attempts.EXPIRES - 1,) * 2)
    assert not is_alive(path, far.attempt)
    assert far.beat()
    assert is_alive(path, far.attempt)


def test_after_a_clock_was_set_back_a_dead_holder_does_not_seem_alive_for_ever(far, tmp_path):
    path, day = tmp_path / far.attempt.file, 86400
    os.utime(path, (attempts.file_clock(tmp_path) + day,) * 2)
    assert not is_alive(path, far.attempt)
    assert far.beat()  # one that lives tells so by the new clock
    assert is_alive(path, far.attempt)


def test_wall_time_is_counted_by_the_file_systems_clock(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1e9)
    take(tmp_path, "cell", seen=0)
    monkeypatch.setattr(attempts, "is_alive", lambda *_: False)
    assert 0 <= take(tmp_path, "cell", seen=0).attempt.seconds < 60


def test_an_attempt_whose_folder_is_gone_is_not_written_anew(tmp_path):
    claim = take(tmp_path / "attempts", "cell", seen=0)
    (tmp_path / "attempts").rename(tmp_path / "moved")
    assert not claim.beat()
    with pytest.raises(BenchError, match=r"cell\.0001\.json: no such file"):
        claim.end("done")
    assert not (tmp_path / "attempts").exists()


def test_a_holder_that_was_given_up_is_told_so(far, tmp_path):
    os.utime(tmp_path / far.attempt.file, (0, 0))
    assert isinstance(take(tmp_path, "cell", seen=0), Claim)
    assert not far.beat()


def test_a_requeued_job_takes_over_from_itself_at_once(far, tmp_path):
    assert isinstance(take(tmp_path, "cell", seen=0, job="7_2"), str)
    again = take(tmp_path, "cell", seen=0, job="7_1")
    assert again.attempt.number == 2


def test_done_is_final_and_a_failure_is_tried_again_only_by_who_saw_it(tmp_path):
    claim = take(tmp_path, "cell", seen=0)
    time.sleep(0.2)
    lost = claim.end("failed", "no space left").seconds
    assert take(tmp_path, "cell", seen=0) == "it failed; --retry-failed tries again"
    claim = take(tmp_path, "cell", seen=1)
    assert claim.end("done").seconds >= lost >= 0.2  # what failed was paid for, too
    assert take(tmp_path, "cell", seen=1) == "it is done"
    assert take(tmp_path, "cell", seen=2).attempt.number == 3  # by who saw that its folder is gone


def test_wall_time_adds_up_over_attempts(tmp_path):
    claim = take(tmp_path, "cell", seen=0)
    time.sleep(0.2)
    first = claim.end("interrupted").seconds
    assert first >= 0.2
    assert take(tmp_path, "cell", seen=0).end("done").seconds >= first


def test_every_flipped_byte_and_every_truncation_is_named(tmp_path):
    take(tmp_path, "cell", seen=0).end("done")
    path = tmp_path / "cell.0001.json"
    whole = path.read_bytes()
    for i in range(len(whole)):
        damaged = whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :]
        for content in (damaged, whole[:i]):
            path.write_bytes(content)
            with pytest.raises(BenchError, match=r"cell\.0001\.json: "):
                read_attempt(path)
    path.write_bytes(whole)
    os.rename(path, tmp_path / "other.0001.json")
    with pytest.raises(BenchError, match=r"it holds the attempt 'cell.0001.json'"):
        read_attempt(tmp_path / "other.0001.json")


@pytest.mark.torture
@pytest.mark.parametrize("shared", [False, True])
def test_64_processes_append_rows_at_once_and_none_is_lost_or_torn(tmp_path, shared, record_property):
    """Each cell has a file of its own. Where 64 are after one, one writes it and the others are told."""
    told = crowd("append", tmp_path, *(["shared"] if shared else []))
    assert len(told) == 64
    files = list(tmp_path.glob("*/episodes.jsonl"))
    rows = [row for file in files for row in read_rows(file)]
    writers = [error for error in told if not error]
    assert len(files) == len(writers) == (1 if shared else 64)
    assert len(rows) == 20 * len(writers)
    for error in filter(None, told):
        assert error.endswith("another process is writing here; wait or use another folder")
    for file in files:
        lines = file.read_text().splitlines()
        assert [json.loads(line)["repeat"] for line in lines] == list(range(20))
    record_property("torture", f"64 processes, {len(files)} files: {len(rows)} rows, none lost, none torn")
