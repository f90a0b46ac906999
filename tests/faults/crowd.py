"""64 processes after the same thing at once, as a program: forked from a small process, which costs a tenth of what it
does from one that has grown by many tests. `python crowd.py claim|append FOLDER [shared]` prints what each was told."""

import json
import multiprocessing
import os
import sys
from pathlib import Path

from vlarl_bench.attempts import Claim, take
from vlarl_bench.errors import BenchError
from vlarl_bench.records import EpisodeLog, EpisodeRow

MANY = 64
ROW = {
    **{"run": "r", "phase": "base", "iteration": 0, "algorithm": "a", "policy": "p", "checkpoint": "c", "suite": "s"},
    **{"task": "t", "init_state": 0, "repeat": 0, "seed": 0, "decoding": "sampled", "observation": "state"},
    **{"success": True, "steps": 3, "return": 1.0, "protocol": "p", "fingerprint": "f", "code": "c"},
    **{"env_steps": 0, "gradient_steps": 0, "flops": 0},
}


def claim(folder, barrier, answers):
    """Answers (its id, whether it got the cell)."""
    barrier.wait()
    taken = take(folder, "cell", seen=0)
    answers.put((os.getpid(), isinstance(taken, Claim)))
    barrier.wait()  # the holder lives until all have tried


def append(folder, barrier, answers, shared=False):
    """Answers why it could not write its 20 rows; empty if it could."""
    barrier.wait()
    name = "shared" if shared else str(os.getpid())
    try:
        with EpisodeLog(folder / name / "episodes.jsonl") as log:
            for repeat in range(20):
                log.append(EpisodeRow.from_json({**ROW, "run": str(os.getpid()), "repeat": repeat}))
            barrier.wait()
        answers.put("")
    except BenchError as error:
        answers.put(str(error))
        barrier.wait()
    except Exception as error:  # whoever waits for the answer must get one
        answers.put(repr(error))
        raise


if __name__ == "__main__":
    what, folder, *shared = sys.argv[1:]
    fork = multiprocessing.get_context("fork")
    barrier, answers = fork.Barrier(MANY, timeout=60), fork.SimpleQueue()  # nobody waits for ever for one that failed
    arguments = (Path(folder), barrier, answers, *map(bool, shared))
    crowd = [fork.Process(target={"claim": claim, "append": append}[what], args=arguments) for _ in range(MANY)]
    for process in crowd:
        process.start()
    told = [answers.get() for _ in crowd]
    for process in crowd:
        process.join(60)
    print(json.dumps(told))
