"""Real data for the conformance tests: episodes and demonstrations of each policy, on a suite that suits it."""

import dataclasses
import functools
import json
import os
import pickle
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock

from vlarl_bench import registry
from vlarl_bench.config import BUDGETS
from vlarl_bench.errors import BenchError
from vlarl_bench.rollout import Rollout
from vlarl_bench.suite import Demonstration

from .narrow import narrow


@dataclass(frozen=True)
class Bench:
    """One policy with random weights, and data from a suite that it can run on."""

    spec: Any
    suite: Any
    protocol: Any
    policy: Any
    rollout: Any
    """Four episodes of two decisions, two from each of two initial states; of each two one counts as a success, so
    there is something to learn. Another policy may have acted in them: `data` is for what must be the policy's own."""
    demonstrations: Any
    """Two of 12 environment steps."""

    @property
    def observations(self):
        """Four different ones."""
        return [episode.observations[i % len(episode.observations)] for i, episode in enumerate(self.rollout.episodes)]

    def data(self, algorithm, policy):
        """What the algorithm's `update` is given: where it learns from rollouts, the recorded episodes as if `policy`
        had acted in them its way. What they led to stays, so nothing is simulated again."""
        if algorithm.learns_from == "demonstrations":
            return self.demonstrations
        seen = [observation for episode in self.rollout.episodes for observation in episode.observations[:-1]]
        generators = [torch.Generator().manual_seed(row) for row in range(len(seen))]
        with torch.no_grad():
            drawn = algorithm.act(policy, policy.encode(policy.preprocess(seen)), generators)
        episodes, row = [], 0
        for episode in self.rollout.episodes:
            rows = range(row, row + len(episode.latents))
            row += len(rows)
            acted = dataclasses.replace(
                episode,
                latents=[drawn.latent[i].numpy() for i in rows],
                traces=[] if drawn.trace is None else [drawn.trace[i].numpy() for i in rows],
                actions=[drawn.actions[i, :n].numpy() for i, n in zip(rows, episode.executed, strict=True)],
            )
            episodes.append(acted)
        return dataclasses.replace(self.rollout, episodes=episodes)


def create(spec, embodiment, vocabulary, seed):
    """Random weights. What exists at its published size only is made with narrow layers."""
    make = functools.partial(narrow, spec) if spec.published else spec.create
    return make(embodiment, vocabulary, seed)


def stage(spec):
    """(suite, protocol) of the first suite that shows what the policy must see, in more tasks than one; a light one if
    it does."""
    for name in ("libero_object", *registry.names("suite")):
        suite = registry.get("suite", name)
        try:
            protocol = suite.protocol(spec.observation)
        except BenchError:
            continue
        tells_apart = len(suite.tasks) > 1 and all(task.suite == name for task in suite.tasks)
        if tells_apart and set(spec.cameras) <= set(protocol.cameras):
            return suite, protocol
    return pytest.skip(f"no registered suite shows what {spec.name} must see")


def _recorded(name):
    """What policies that see the same share, since opening a scene takes longest: names of the objects, four short
    episodes and two of single steps, as the policy called `name` acts."""
    from vlarl_bench.pool import Pool
    from vlarl_bench.rollout import Job, episode_seed, run_episodes

    spec = registry.get("policy", name)
    suite, protocol = stage(spec)
    task = suite.tasks[0]
    jobs = [Job(task, protocol.train_states[i // 2], i % 2, episode_seed(0, i)) for i in range(4)]
    short = dataclasses.replace(protocol, horizon={task.suite: 2 * protocol.execute})
    single = dataclasses.replace(protocol, horizon={task.suite: 12}, execute=1)
    with Pool(suite, protocol, workers=1) as pool:
        objects = pool.call("reset", {0: (task, protocol.train_states[0])})[0].objects
        policy = create(spec, suite.embodiment(protocol), _vocabulary(suite, objects), 0)
        episodes = run_episodes(pool, policy, jobs, short, slots=4)
        steps = run_episodes(pool, policy, jobs[:2], single, slots=2)
    for i, episode in enumerate(episodes):
        episode.success = i % 2 == 0
    demonstrations = [
        Demonstration(task, e.job.init_state, True, tuple(e.observations[:-1]), np.concatenate(e.actions))
        for e in steps
    ]
    return objects, Rollout(episodes, {task.suite: 2}), demonstrations


def _vocabulary(suite, objects):
    return [task.instruction for task in suite.tasks] + list(objects)


@functools.cache
def _shared(name, folder):
    """The same, recorded by whichever of the processes that test comes first."""
    recorded = folder / f"{name}.pickle"
    with FileLock(folder / f"{name}.lock"):
        if not recorded.exists():
            recorded.write_bytes(pickle.dumps(_recorded(name)))
    return pickle.loads(recorded.read_bytes())


@functools.cache
def _bench(folder, policy_name):
    spec = registry.get("policy", policy_name)
    suite, protocol = stage(spec)
    alike = next(n for n in registry.names("policy") if stage(registry.get("policy", n)) == (suite, protocol))
    objects, rollout, demonstrations = _shared(alike, folder)
    policy = create(spec, suite.embodiment(protocol), _vocabulary(suite, objects), 0)
    return Bench(spec, suite, protocol, policy, rollout, demonstrations)


@pytest.fixture(scope="session")
def bench(tmp_path_factory):
    """`bench(policy_name)`: the policy and its data, made once a session. Copy the policy before changing it."""
    folder = tmp_path_factory.getbasetemp()
    return functools.partial(_bench, folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder)


@pytest.fixture(scope="session")
def budget():
    """The smallest budget that ships, with supervised work that takes a second also from pixels."""
    return dataclasses.replace(BUDGETS["smoke"], gradient_steps=2, batch_size=4)


LISTED = """
import json, sys, types
from vlarl_bench import registry
heavy = ("torch", "transformers", "mujoco", "robosuite", "libero", "gymnasium", "scipy", "matplotlib")
found = {}
for name in registry.names(KIND):
    what = registry.get(KIND, name)
    (what.Settings() if KIND == "algorithm" else what.tasks if KIND == "suite" else what.summary)
    found[name] = [m for m in heavy if type(sys.modules.get(m)) is types.ModuleType]
print(json.dumps(found))
"""


@pytest.fixture(scope="session")
def imported():
    """`imported(kind)`: for each plug-in of that kind the heavy modules that are loaded once it, after those before it,
    has been named and described. `vlarl-bench list` must stay instant; what is imported lazily is not yet a plain
    module."""

    @functools.cache
    def found(kind):
        code = LISTED.replace("KIND", repr(kind))
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    return found
