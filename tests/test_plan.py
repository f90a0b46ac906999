"""What a run is made of, before anything runs."""

import dataclasses
from collections import Counter

import numpy as np
import pytest

from vlarl_bench import registry
from vlarl_bench.config import BUDGETS, RunConfig
from vlarl_bench.errors import BenchError
from vlarl_bench.plan import plan_run


def config(algorithm="fpo", policy="pi0-tiny", suite="libero_object", **changes):
    budget = dataclasses.replace(BUDGETS["smoke"], tasks=3 if suite.startswith("libero") else 2)
    settings = registry.get("algorithm", algorithm).Settings()
    made = RunConfig(
        algorithm=algorithm, policy=policy, suite=suite, seed=0, budget=budget, settings=settings, out="unused"
    )
    return dataclasses.replace(made, **changes)


def test_tasks_take_turns_over_states_that_do_not_repeat():
    plan = plan_run(config())
    jobs = plan.train_jobs(1, 60)
    assert [job.task for job in jobs] == [*plan.tasks] * 20
    assert set(Counter((job.task, job.init_state) for job in jobs).values()) == {1}
    assert {job.init_state for job in jobs} <= set(plan.protocol.train_states)
    assert jobs == plan.train_jobs(1, 60)
    assert jobs != plan.train_jobs(2, 60)


def test_weights_decide_how_often_a_task_comes():
    plan = plan_run(config())
    jobs = plan.train_jobs(1, 1000, np.array([0.7, 0.3, 0.0]))
    count = Counter(job.task for job in jobs)
    assert count[plan.tasks[2]] == 0
    assert abs(count[plan.tasks[0]] - 700) < 60  # four standard deviations
    # Each task still goes through all its states before one comes again, and then as another repeat.
    assert set(Counter((job.task, job.init_state, job.repeat) for job in jobs).values()) == {1}
    assert jobs == plan.train_jobs(1, 1000, np.array([0.7, 0.3, 0.0]))


def test_a_group_shares_its_initial_state():
    plan = plan_run(config())
    jobs = plan.train_jobs(1, 26, group=4)
    groups = [jobs[i : i + 4] for i in range(0, 26, 4)]
    assert [len(group) for group in groups] == [4, 4, 4, 4, 4, 4, 2]
    for group in groups:
        assert len({(job.task, job.init_state) for job in group}) == 1
        assert len({job.seed for job in group}) == len({job.repeat for job in group}) == len(group)
    assert [group[0].task for group in groups] == [*plan.tasks, *plan.tasks, plan.tasks[0]]
    many = Counter((job.task, job.init_state, job.repeat) for job in plan.train_jobs(1, 1000, group=4))
    assert set(many.values()) == {1}


def test_a_prior_is_that_of_the_suite_s_benchmark():
    folders = {plan_run(config(suite=suite)).base for suite in ("libero_object", "aloha_insertion")}
    assert {folder.name for folder in folders} == {"libero", "aloha"}
    with pytest.raises(BenchError, match=r"^base: 'prior'; 'octo-tiny' ships no prior for aloha; train one with "):
        plan_run(config("dppo", "octo-tiny", "aloha"))


def test_a_policy_that_looks_at_cameras_which_are_not_shown_is_refused():
    libero = registry.get("policy", "pi0-tiny-pixels").prior_folder("libero")
    made = config("fpo", "pi0-tiny-pixels", "libero_object", base=str(libero))
    plan = plan_run(made)
    blind = dataclasses.replace(plan, protocol=dataclasses.replace(plan.protocol, cameras=("agentview",)))
    assert plan.load_base().cameras == plan.protocol.cameras
    with pytest.raises(BenchError, match=r"looks at agentview, robot0_eye_in_hand, but protocol .* shows agentview"):
        blind.load_base()
