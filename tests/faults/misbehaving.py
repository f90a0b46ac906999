"""What workers under test answer. In a file of its own, since workers import it."""

import os
import signal
import threading

import numpy as np


def echo():
    return lambda request: request


def halting():
    """Stops in the middle of writing a large answer: nobody has the time to read it all."""

    def answer(megabytes):
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGSTOP)).start()
        return np.zeros((megabytes, 2**20), np.uint8)

    return answer


def stock_reset():
    """LIBERO's own `ControlEnv.reset`, which swallows whatever is raised inside it and tries again; asked to break, it
    has something to swallow from then on."""
    from libero.libero import benchmark, get_libero_path
    from libero.libero.envs.env_wrapper import ControlEnv

    task = benchmark.get_benchmark("libero_object")().get_task(0)
    env = ControlEnv(
        bddl_file_name=f"{get_libero_path('bddl_files')}/{task.problem_folder}/{task.bddl_file}",
        use_camera_obs=False,
        has_offscreen_renderer=False,
    )

    def answer(request):
        if request == "reset":
            return sorted(env.reset())
        env.env.hard_reset, env.env.placement_initializer = False, None
        return request

    return answer
