"""Worker processes under watch: one that dies, stops, hangs or raises is found within a stated time and named.

A worker answers requests one by one. It ends with the process that started it, however that one ends. While an answer
is due a thread of the parent looks once a second whether the worker is stopped or has been silent for too long, and
kills it if so. A blocked read or write then ends by itself, so whoever waits for an answer needs no time-out.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from .errors import BenchError

TICK = 1.0
"""Seconds between two looks at a worker that owes an answer. Time is counted in looks: while the parent itself is
stopped or the machine sleeps, no worker grows late."""
STOPPED = 10.0
"""Seconds for which a worker that owes an answer may be stopped (SIGSTOP)."""
_PR_SET_PDEATHSIG = 1


def end_with(parent: int) -> None:
    """Linux kills this process when `parent`, which started it, ends, also while it is stopped or in a loop."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before that call
        os._exit(1)


class WorkerLost(Exception):
    """A worker did not answer and is dead now; the text says why in one line."""

    def __init__(self, why: str, trace: str = "") -> None:
        super().__init__(why)
        self.trace = trace
        """The worker's traceback, if it raised."""


class Worker:
    """One process that is given requests and answers each of them in turn.

    `make(*args)` runs in the process and returns the function that answers a request. A pool of workers belongs to the
    thread that started it: Linux ends the workers with that thread.
    """

    def __init__(self, make: Callable[..., Callable[[Any], Any]], args: Sequence[Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        try:
            self.process.start()
        except OSError as error:
            raise BenchError(f"workers: cannot start a process ({error.strerror}); try fewer") from error
        finally:
            theirs.close()
        # Not an argument of the process: starting one that dies at once would block if there were much to hand over.
        self._orders: tuple[Any, ...] | None = (make, *args)
        self._limits: deque[float] = deque()
        self._due: tuple[float] | None = None
        self._verdict = ""
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def ask(self, requests: Sequence[Any], limits: Iterable[float]) -> None:
        """Sends requests; `limits` are the seconds that each may take, counted from the answer before it."""
        self._limits.extend(limits)
        self._next()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # dead: told when the answer is read
            if self._orders is not None:
                self.pipe.send(self._orders)
                self._orders = None
            self.pipe.send(requests)

    def answer(self) -> Any:
        """Waits for the next answer.

        Raises:
            WorkerLost: when the process died, was killed by the watch, or raised. It has ended then.
            BenchError: when it raised one: a mistake of the user, not of the worker.
        """
        try:
            kind, content = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(STOPPED)  # its pipe closes a moment before its exit code is known
            self.end()
            raise WorkerLost(self._verdict or _how_it_ended(self.process.exitcode)) from None
        except Exception as error:  # whatever reading somebody else's classes may raise
            self.end()
            raise WorkerLost(f"gave an answer that cannot be read: {_last_line(error)}") from error
        self._next()
        if kind == "BenchError":
            raise BenchError(content)
        if kind == "raised":
            self.end()
            why, trace = content
            raise WorkerLost(f"raised {why}", trace)
        return content

    def end(self) -> None:
        """Kills the process, also one that is stopped, and waits until it is gone."""
        self._over.set()
        self._watcher.join()
        self.process.kill()
        self.process.join()
        self.pipe.close()

    def _next(self) -> None:
        # A new tuple each time: the watch knows by its identity that it is another answer that is due.
        self._due = (self._limits.popleft(),) if self._limits else None

    def _watch(self) -> None:
        due, silent, stopped = None, 0.0, 0.0
        while not self._over.wait(TICK):
            if self._due is not due:
                due, silent, stopped = self._due, 0.0, 0.0
            if due is None:
                continue
            silent += TICK
            stopped = stopped + TICK if _is_stopped(self.process.pid) else 0.0
            if stopped >= STOPPED:
                self._verdict = f"was stopped (SIGSTOP) for {stopped:.0f} s"
            elif silent >= due[0]:
                self._verdict = f"gave no answer within {due[0]:.0f} s"
            if self._verdict:
                self.process.kill()
                return


def ready(workers: Iterable[Worker]) -> list[Worker]:
    """Waits until some have an answer, or have ended, and returns those."""
    by_pipe = {worker.pipe: worker for worker in workers}
    return [by_pipe[pipe] for pipe in wait(list(by_pipe)) if isinstance(pipe, Connection)]


def _serve(pipe: Connection) -> None:
    """A worker's life: answer requests until the pipe closes or something unexpected is raised."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    assert parent.pid is not None
    end_with(parent.pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        make, *args = pipe.recv()
        answer = make(*args)
        while True:
            for request in pipe.recv():
                try:
                    pipe.send(("answer", answer(request)))
                except (BrokenPipeError, ConnectionResetError):
                    return
                except BenchError as error:
                    pipe.send(("BenchError", str(error)))
                except Exception as error:
                    pipe.send(("raised", (_last_line(error), traceback.format_exc())))
                    return  # nobody knows what state it is in


def _is_stopped(pid: int | None) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except (OSError, IndexError):  # no such file here: the time limit finds a stopped worker, too, if later
        return False


def _how_it_ended(code: int | None) -> str:
    if code is None or code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    memory = ", perhaps for want of memory (try --workers 1)" if -code == signal.SIGKILL else ""
    return f"was killed by {name}{memory}"


def _last_line(error: BaseException) -> str:
    """`ValueError: text, in step (simulator.py:12)`: what a traceback ends with, in one line."""
    text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    frames = traceback.extract_tb(error.__traceback__)
    return f"{text}, in {frames[-1].name} ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else text
