"""A run of the toy suite alone, then by two processes of which one is killed, then continued by three.

python shared_runs.py OUT: leaves OUT/calm and OUT/stormy, and prints how the two processes ended and after how long.
"""

import dataclasses
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path


def process(number: int, count: int, port: int, out: str, resume: bool) -> None:
    """One of `count` processes of a run."""
    from vlarl_bench.algorithms.rwfm import RWFMSettings

    from vlarl_bench import distributed
    from vlarl_bench.config import BUDGETS, RunConfig
    from vlarl_bench.errors import BenchError
    from vlarl_bench.run import run

    os.environ |= {"RANK": str(number), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    distributed.MOMENT = 0.0
    settings = RWFMSettings(gradient_steps=2, minibatch=8)  # it learns from failures, too
    budget = dataclasses.replace(BUDGETS["smoke"], iterations=2, episodes=3)
    small = {"tasks": ("one",), "workers": 1, "slots": 2, "threads": 1, "video": False}
    config = RunConfig("rwfm", "toy-arm", "pi0-tiny", budget, settings, out, **small)
    try:
        with distributed.joined():
            run(config, resume=resume)
    except BenchError as error:
        sys.exit(str(error))


def shared(count: int, out: str, resume: bool, kill: Path | None = None) -> dict:
    """Runs it by `count` processes; after the first round a simulator kills the one that it belongs to."""
    import torch

    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # that of this process, whose port is free
    fork = multiprocessing.get_context("fork")  # what is imported here need not be imported by each
    processes = [fork.Process(target=process, args=(i, count, store.port, out, resume)) for i in range(count)]
    for one in processes:
        one.start()
    while kill and not Path(out, "checkpoints", "000001").exists():
        assert all(one.is_alive() for one in processes)
        time.sleep(0.02)
    if kill:
        kill.touch()
        while kill.exists():
            time.sleep(0.02)
    began = time.monotonic()
    for one in processes:
        one.join()
    return {"codes": [one.exitcode for one in processes], "seconds": time.monotonic() - began}


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    process(0, 1, 0, str(out / "calm"), False)  # imports what the others then need not import
    ended = shared(2, str(out / "stormy"), False, Path(os.environ["TOY_KILL"]))
    print(json.dumps({"killed": ended, "resumed": shared(3, str(out / "stormy"), True)}))
