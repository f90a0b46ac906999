from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlarl_bench.protocol import Protocol
from vlarl_bench.provenance import make_manifest
from vlarl_bench.records import EpisodeLog, EpisodeRow
from vlarl_bench.sealed import write_sealed

PROTOCOL = Protocol("tiny-state", 1, "state", {"suite_a": 200, "suite_b": 200}, 10, 8, (0, 1, 2, 3), (4, 5, 6, 7))
TASKS = ("suite_a/pick_it_up", "suite_a/put_it_down")

Outcome = Callable[[str, int, int], bool]


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Writes a run folder. base, final and evaluated say for (task key, init_state, repeat) whether it succeeded, and
    noiseless the same of base and final as they decode without noise."""

    def make(
        name: str,
        *,
        base: Outcome | None = None,
        final: Outcome | None = None,
        evaluated: Outcome | None = None,
        noiseless: tuple[Outcome, Outcome] | None = None,
        train: tuple[tuple[int, bool], ...] = (),
        skip: tuple[int, ...] = (),
        seed: int = 0,
        algorithm: str = "fpo",
        tasks: tuple[str, ...] = TASKS,
        protocol: Protocol = PROTOCOL,
        config: dict[str, Any] | None = None,
        trained: dict[str, Any] | None = None,
        **fields: Any,
    ) -> Path:
        folder = tmp_path / name

        def row(phase: str, task: str, state: int, repeat: int, success: bool, **more: Any) -> EpisodeRow:
            values: dict[str, Any] = {
                "run": name, "phase": phase, "iteration": 2 if phase == "final" else 0, "algorithm": algorithm,
                "policy": "pi0-tiny", "checkpoint": "0" * 12, "suite": task.split("/")[0], "task": task.split("/")[1],
                "init_state": state, "repeat": repeat, "seed": 0, "decoding": protocol.decoding, "observation": "state",
                "success": success, "steps": 100, "return_": float(success), "protocol": protocol.hash,
                "fingerprint": "f" * 12, "code": "0.1.0",
                "env_steps": 0, "gradient_steps": 0, "flops": 0,
            }  # fmt: skip
            return EpisodeRow(**(values | fields | more))

        quiet_base, quiet_final = noiseless or (None, None)
        played = [("base", base, {}), ("final", final, {}), ("eval", evaluated, {})]
        played += [(phase, quiet, {"decoding": "zero-noise"}) for phase, quiet in
                   (("base", quiet_base), ("final", quiet_final))]  # fmt: skip
        rows = [
            row(phase, task, state, repeat, outcome(task, state, repeat), **more)
            for phase, outcome, more in played
            if outcome is not None
            for task in tasks
            for state in protocol.eval_states
            for repeat in range(1 if more else 2)
            if not (phase == "final" and state in skip)
        ]
        rows += [
            row("train", tasks[0], i % 4, i // 4, success, iteration=iteration, decoding="explore")
            for i, (iteration, success) in enumerate(train)
        ]
        with EpisodeLog(folder / "episodes.jsonl") as log:
            log.append_all(rows)
        asked = {"states": 4, "repeats": 2} if evaluated else {"algorithm": algorithm, "budget": {"tasks": 2}}
        resolved = {"seed": seed, "out": str(folder), "base": "prior"} | asked
        write_sealed(folder / "config.json", resolved | (config or {}))
        manifest = make_manifest(
            run=name, argv=["run"], algorithm=algorithm, policy="pi0-tiny", suite="suite", seed=seed,
            base_checkpoint="0" * 12, protocol=protocol, tasks=tasks, suite_tasks=20,
            init_states=protocol.eval_states, repeats=2, noiseless=noiseless is not None, trained=trained,
        )  # fmt: skip
        write_sealed(folder / "manifest.json", manifest)
        return folder

    return make


def never(task: str, state: int, repeat: int) -> bool:
    return False


def always(task: str, state: int, repeat: int) -> bool:
    return True


@pytest.fixture
def outcomes() -> dict[str, Outcome]:
    """`half` succeeds on repeat 0 only."""
    return {"never": never, "always": always, "half": lambda task, state, repeat: repeat == 0}
