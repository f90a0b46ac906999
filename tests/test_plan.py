"""What a run is made of, before anything runs."""

import dataclasses
import json
import shutil
from collections import Counter

import numpy as np
import pytest

from vlarl_bench import registry
from vlarl_bench.config import BUDGETS, EvalConfig, RunConfig
from vlarl_bench.errors import BenchError
from vlarl_bench.plan import plan_evaluation, plan_run
from vlarl_bench.policies.pi0 import Pi0


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


@pytest.mark.parametrize(("episodes", "group"), [(8, 1), (8, 2), (15, 4)])
def test_over_the_rounds_every_task_has_its_turn(episodes, group):
    """Where a round is no multiple of them all: else the first tasks would be trained on more than the last."""
    plan = plan_run(config())
    rounds = [plan.train_jobs(iteration, episodes, group=group) for iteration in (1, 2, 3)]
    groups = [job.task for jobs in rounds for job in jobs[::group]]
    assert groups == [*plan.tasks] * (len(groups) // 3) and len(groups) % 3 == 0


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
    with pytest.raises(BenchError, match=r"^base: 'prior'; 'octo-tiny-pixels' ships no prior for aloha; train one "):
        plan_run(config("dppo", "octo-tiny-pixels", "aloha"))


def test_a_policy_that_looks_at_cameras_which_are_not_shown_is_refused():
    libero = registry.get("policy", "pi0-tiny-pixels").prior_folder("libero")
    made = config("fpo", "pi0-tiny-pixels", "libero_object", base=str(libero))
    plan = plan_run(made)
    blind = dataclasses.replace(plan, protocol=dataclasses.replace(plan.protocol, cameras=("agentview",)))
    assert plan.load_base().cameras == plan.protocol.cameras
    with pytest.raises(BenchError, match=r"looks at agentview, robot0_eye_in_hand, but protocol .* shows agentview"):
        blind.load_base()


def carded(tmp_path, **fields):
    """The shipped prior with other fields in its config.json, read before any weight is."""
    folder = tmp_path / "policy"
    shutil.copytree(plan_run(config()).base, folder)
    card = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(card | fields))
    return str(folder)


def test_a_policy_is_not_judged_on_states_that_it_learned_from(tmp_path):
    known = {
        "policy": "pi0-tiny",
        "suite": "libero_object",
        "out": "unused",
        "tasks": (plan_run(config()).tasks[0].key,),
    }
    for i, (states, refused) in enumerate((([*range(25)], False), ([3, 26, 27], True), ([], False))):
        base = carded(tmp_path / str(i), train_states=states)
        for plan, asked in ((plan_evaluation, EvalConfig(base=base, **known)), (plan_run, config(base=base))):
            if refused:
                with pytest.raises(BenchError, match=r"learned from \(. of .*, such as 26 of libero_object/"):
                    plan(asked)
            else:
                assert plan(asked).learned_from() == states
    # Of tasks that it was not trained on no state was seen; settings may be chosen on states that training uses.
    other = {**known, "tasks": (plan_run(config()).suite.tasks[-1].key,)}
    base = carded(tmp_path / "other", train_states=[26], tasks=[])
    assert plan_evaluation(EvalConfig(base=base, **other)).learned_from() == [26]
    # Fine-tuning on another task makes it forget none of them.
    first, last = (plan_run(config()).suite.tasks[i].key for i in (0, -1))
    base = carded(tmp_path / "twice", train_states=[26], tasks=[last], learned_tasks=[first, last])
    with pytest.raises(BenchError, match=r"learned from .* such as 26 of libero_object/"):
        plan_evaluation(EvalConfig(base=base, **known))
    base = carded(tmp_path / "tuned", train_states=[*range(25)])
    assert plan_run(config(base=base, protocol="tuning")).learned_from() == [*range(25)]


@pytest.mark.parametrize("field", ["tasks", "train_states"])
def test_a_card_that_lists_nothing_is_named(tmp_path, field):
    with pytest.raises(BenchError, match=rf"config.json: {field} is None; it must be a list"):
        plan_run(config(base=carded(tmp_path, **{field: None})))


def test_a_policy_that_has_not_what_the_method_needs_is_refused_when_it_is_loaded(monkeypatch):
    """Its kind may: OpenVLA's has likelihoods, and an OFT folder's regression has none."""
    plan = plan_run(config())
    monkeypatch.setattr(Pi0, "capabilities", Pi0.capabilities - {"denoising"})
    with pytest.raises(BenchError, match=r"^base: the policy in .* has no denoising, which 'fpo' needs$"):
        plan.load_base()


def test_an_evaluation_decodes_as_its_protocol_says_unless_told_otherwise():
    base = plan_run(config()).base
    known = {"policy": "pi0-tiny", "suite": "libero_object", "out": "unused", "base": str(base)}
    assert plan_evaluation(EvalConfig(**known)).protocol.decoding == "sampled"
    assert plan_evaluation(EvalConfig(decoding="zero-noise", **known)).protocol.decoding == "zero-noise"
    # Where nothing is drawn a repeat would be the same episode, counted twice.
    for decoding, repeats in (("protocol", 3), ("zero-noise", 1)):
        plan = plan_evaluation(EvalConfig(decoding=decoding, repeats=3, states=2, **known))
        assert (plan.repeats, len(plan.eval_jobs(plan.protocol.decoding))) == (repeats, 10 * 2 * repeats)
        assert plan.decodings == (plan.protocol.decoding,)
    suite = registry.get("suite", "libero_object")
    greedy = {name for name in ("openvla", "openvla-oft", "simplevla", "openpi", "lerobot", "rlinf")
              if suite.protocol("pixels", name).decoding == "zero-noise"}  # fmt: skip
    assert greedy == {"openvla", "openvla-oft", "simplevla"}


def test_a_run_that_draws_noise_where_it_is_judged_is_judged_without_any_besides():
    plan = plan_run(config(budget=dataclasses.replace(config().budget, eval_repeats=2)))
    assert plan.decodings == ("sampled", "zero-noise")
    sampled, quiet = (plan.eval_jobs(decoding) for decoding in plan.decodings)
    assert len(sampled) == 2 * len(quiet) > 0
    assert [job for job in sampled if job.repeat == 0] == quiet
    keys = {plan.key("base", 0, job, decoding) for decoding in plan.decodings for job in plan.eval_jobs(decoding)}
    assert len(keys) == len(sampled) + len(quiet)


def test_no_two_episodes_of_runs_rounds_or_evaluations_draw_the_same_noise():
    drawn = []
    for plan in (plan_run(config(seed=seed)) for seed in (0, 1)):
        drawn += [job.seed for job in plan.eval_jobs("sampled")]
        drawn += [job.seed for iteration in (1, 2, 3) for job in plan.train_jobs(iteration, 60)]
    assert len(set(drawn)) == len(drawn) > 2 * 3 * 60
