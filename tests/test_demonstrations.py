"""Demonstrations that this project makes, on disk, and the worker processes that make them."""

import dataclasses
import re
import threading
from pathlib import Path

import pytest
from faulty_suite import Fault, FaultySuite

from vlarl_bench import demo_store, registry
from vlarl_bench.demo_store import RECORD, writing
from vlarl_bench.demonstrations import describe_demonstrations, load_demonstrations, make_demonstrations
from vlarl_bench.errors import BenchError
from vlarl_bench.pool import Patience
from vlarl_bench.suite import Suite

from .datasets import OTHER, PIXELS, STATE, SUITE, TASK, OneTask, episode, files, load, one_line, same, write


@pytest.mark.parametrize("pixels", [False, True])
def test_round_trip_is_bitwise(tmp_path: Path, pixels: bool) -> None:
    """Also of pixels (random ones, the hardest for a codec), and of tasks with different objects."""
    protocol = PIXELS if pixels else STATE
    episodes = [episode(3, 5, pixels), episode(1, 2, pixels)]
    others = [episode(0, 3, pixels, OTHER)]
    write(tmp_path, episodes, protocol)
    write(tmp_path, others, protocol)
    read = load(tmp_path, (TASK, OTHER), protocol)
    assert len(read) == 3
    assert all(same(a, b) for a, b in zip(episodes + others, read, strict=True))
    assert same(load(tmp_path, (TASK,), protocol, limit=1)[0], episodes[0])
    assert same(load(tmp_path / SUITE.name, (OTHER,), protocol)[0], others[0])
    described = describe_demonstrations(tmp_path, [TASK, OTHER], protocol, read)
    assert described["episodes"] == 3
    assert described["held_out"] == "from training states only"
    fewer = describe_demonstrations(tmp_path, [TASK], protocol, read[:2])
    assert fewer["digest"] != described["digest"]
    assert describe_demonstrations(tmp_path, [TASK, OTHER], protocol, episodes + others) == described


def test_equal_episodes_are_equal_files(tmp_path: Path) -> None:
    first, second = (write(tmp_path / name, [episode(3, 5, True)], PIXELS) for name in ("a", "b"))
    assert files(first) == files(second)


def test_every_kind_of_damage_is_one_clear_line(tmp_path: Path) -> None:
    root = write(tmp_path, [episode(0, 4, True)], PIXELS)
    read = {
        name: content for name, content in files(root).items() if name not in ("meta/stats.json", "meta/tasks.parquet")
    }
    assert len(read) == 6  # info, record, episodes, data and two videos
    for name, good in read.items():
        damaged = [None, good[:-2], good[:100], b"", b"not ours" * 100]
        for position in range(0, len(good), max(1, len(good) // 20)):
            damaged.append(good[:position] + bytes([good[position] ^ 16]) + good[position + 1 :])
        for content in damaged:
            if content is None:
                (root / name).unlink()
            else:
                (root / name).write_bytes(content)
            if name == RECORD and content is None:
                continue  # then it is somebody else's dataset
            with pytest.raises(BenchError) as caught:
                load(tmp_path, protocol=PIXELS)
            assert str(root / name) in one_line(caught.value)
            assert "run `vlarl-bench demos --suite libero_object --mode pixels`" in str(caught.value)
        (root / name).write_bytes(good)
    assert len(load(tmp_path, protocol=PIXELS)) == 1


def test_missing_and_too_few_name_the_command(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"run `vlarl-bench demos --suite libero_object"):
        load(tmp_path)
    write(tmp_path, [episode(0, 4)])
    with pytest.raises(BenchError, match=r"holds 1 .* 2 are wanted.*--episodes 2"):
        load(tmp_path, limit=2)
    with pytest.raises(BenchError, match=rf"holds 0 demonstrations of {OTHER.key}, 1 are wanted"):
        load(tmp_path, (OTHER,))


def test_states_kept_for_evaluation_are_refused(tmp_path: Path) -> None:
    write(tmp_path, [episode(0, 2), episode(25, 2)])
    with pytest.raises(BenchError, match=r"\[25\] are not train states"):
        load(tmp_path)


def test_another_protocol_seed_or_expert_is_refused_and_never_replaced(tmp_path: Path, monkeypatch) -> None:
    root = write(tmp_path, [episode(0, 2)])
    before = files(root)
    with pytest.raises(BenchError, match="protocol"):
        load(tmp_path, protocol=PIXELS)
    with pytest.raises(BenchError, match="protocol"):
        make_demonstrations(SUITE, [TASK], PIXELS, 1, tmp_path)
    with pytest.raises(BenchError, match="made with seed 0, not 1"):
        make_demonstrations(SUITE, [TASK], STATE, 1, tmp_path, seed=1)
    monkeypatch.setattr(SUITE, "expert_version", SUITE.expert_version + 1)
    with pytest.raises(BenchError, match="made with expert version"):
        make_demonstrations(SUITE, [TASK], STATE, 1, tmp_path)
    assert files(root) == before
    assert len(load(tmp_path)) == 1  # to learn from it is the user's choice


def test_a_group_of_suites_makes_what_its_members_make() -> None:
    group = registry.get("suite", "libero")
    for name in group.members:
        alone = registry.get("suite", name)
        assert demo_store._expert_version(group, name) == demo_store._expert_version(alone, name)


def test_another_suites_dataset_and_a_folder_of_other_things_are_refused(tmp_path: Path) -> None:
    root = write(tmp_path, [episode(0, 2)])
    root.rename(tmp_path / "moved")
    with pytest.raises(BenchError, match="holds demonstrations of libero_object, not of libero_spatial"):
        load(tmp_path / "moved", (dataclasses.replace(TASK, suite="libero_spatial"),))
    root.mkdir()
    (root / "precious.txt").write_text("mine")
    with pytest.raises(BenchError, match="not demonstrations of ours"):
        make_demonstrations(SUITE, [TASK], STATE, 1, tmp_path)
    assert files(root) == {"precious.txt": b"mine"}


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    root = tmp_path / SUITE.name
    with (
        writing(root, SUITE, SUITE.name, STATE, 0),
        pytest.raises(BenchError, match="another process is writing here"),
        writing(root, SUITE, SUITE.name, STATE, 0),
    ):
        pass


def test_who_may_wait_for_another_writer_finds_what_it_made(tmp_path: Path) -> None:
    waits, made = threading.Event(), []

    def second() -> None:
        made.extend(make_demonstrations(SUITE, [TASK], STATE, 1, tmp_path, on_wait=waits.set))

    root = tmp_path / SUITE.name
    with writing(root, SUITE, SUITE.name, STATE, 0) as first:
        thread = threading.Thread(target=second)
        thread.start()
        assert waits.wait(60)
        first.append(TASK, [0], [episode(0, 3)])
        before = files(root)
        assert not made
    thread.join(60)
    assert made == [root]
    assert files(root) == before


def test_what_an_interrupted_command_left_is_removed_and_a_damaged_batch_with_those_after_it(tmp_path: Path) -> None:
    root = write(tmp_path, [episode(0, 3)])
    one = files(root)
    write(tmp_path, [episode(0, 2, task=OTHER)])
    two = files(root)
    for name in two.keys() - one.keys():  # all of a batch was written, but the record was not replaced
        (root / name).write_bytes(two[name])
    for name in ("meta/info.json", "meta/stats.json", "meta/tasks.parquet"):
        (root / name).write_bytes(two[name])
    (root / RECORD).write_bytes(one[RECORD])
    (root / "meta/.info.123.tmp.json").write_text("half")
    with pytest.raises(BenchError, match=r"info.json: its content does not match its hash; run `vlarl-bench demos"):
        load(tmp_path)
    with writing(root, SUITE, SUITE.name, STATE, 0) as writer:
        assert [writer.record.count(task.name) for task in (TASK, OTHER)] == [1, 0]
        assert [writer.next_attempt(task) for task in (TASK, OTHER)] == [1, 0]
    assert files(root) == one
    write(tmp_path, [episode(0, 2, task=OTHER)])
    assert files(root) == two
    (root / "data/chunk-000/file-000.parquet").write_bytes(b"damaged")
    with writing(root, SUITE, SUITE.name, STATE, 0) as writer:
        assert [writer.record.count(task.name) for task in (TASK, OTHER)] == [0, 0]
    assert files(root).keys() == {RECORD}


def test_workers_make_only_what_is_missing_and_their_number_changes_nothing(tmp_path: Path) -> None:
    suite = FaultySuite()
    protocol, one, two = suite.protocol("state"), *suite.tasks[:2]
    made: list[int] = []

    def make(tasks, number, out, workers):
        made.clear()
        return make_demonstrations(suite, tasks, protocol, number, out, workers=workers, on_progress=made.append)

    def read(folder, task):
        return load_demonstrations(suite, folder, (task,), protocol)

    (root,) = make([one, two], 1, tmp_path, workers=2)
    assert made == [0, 0, 1, 1]
    good = files(root)
    (root / "data/chunk-000/file-001.parquet").write_bytes(b"damaged")
    kept = (root / "data/chunk-000/file-000.parquet").stat().st_mtime_ns
    make([one, two], 1, tmp_path, workers=1)
    assert made == [1, 0, 1]
    assert (root / "data/chunk-000/file-000.parquet").stat().st_mtime_ns == kept
    assert files(root) == good
    (first,) = read(tmp_path, one)
    make([one], 2, tmp_path, workers=1)  # more of a task: only those that are missing
    assert made == [1, 1]
    more = read(tmp_path, one)
    assert same(more[0], first)
    assert [episode.init_state for episode in more] == [0, 1]
    make([one], 2, tmp_path / "at once", workers=1)
    assert all(same(a, b) for a, b in zip(more, read(tmp_path / "at once", one), strict=True))


def test_a_worker_makes_demonstrations_of_libero_from_training_states(tmp_path: Path) -> None:
    protocol = dataclasses.replace(STATE, train_states=(3, 5))
    (root,) = make_demonstrations(SUITE, [TASK], protocol, 2, tmp_path, workers=1)
    made = load(tmp_path, (TASK,), protocol)
    assert len(made) == 2
    assert {episode.init_state for episode in made} <= {3, 5}
    assert root == tmp_path / SUITE.name


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """What two workers make of two tasks when nothing goes wrong."""
    suite = FaultySuite()
    (root,) = make_demonstrations(
        suite, suite.tasks[:2], suite.protocol("state"), 2, tmp_path_factory.mktemp("calm"), workers=2, seed=1
    )
    return files(root)


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("sleep", "faulty/two, attempt 1: the expert's worker gave no answer within 26 s"),
        ("raise", "faulty/two, attempt 1: the expert's worker raised ArithmeticError: the arm fell off, in _strike"),
        ("SIGKILL", "faulty/two, attempt 1: the expert's worker was killed by SIGKILL"),
        ("mistake", "init state: 7; it has 0 to 3"),
    ],
)
def test_a_worker_that_does_not_deliver_is_one_line_and_the_same_command_goes_on(tmp_path, kind, line, calm, capfd):
    fault = Fault(kind, "two", tmp_path, init_state=1)
    suite = FaultySuite(fault)
    protocol, tasks, out = suite.protocol("state"), suite.tasks[:2], tmp_path / "out"
    # Only what sleeps is waited for; the others' processes may be slow to start.
    patience = Patience(open=25.0, step=1.0, each=0.0) if kind == "sleep" else Patience()
    with pytest.raises(BenchError, match=f"^{re.escape(line)}") as caught:
        make_demonstrations(suite, tasks, protocol, 2, out, workers=1, seed=1, patience=patience)
    assert "Traceback" not in one_line(caught.value) + capfd.readouterr().err
    made: list[int] = []
    make_demonstrations(suite, tasks, protocol, 2, out, workers=1, seed=1, on_progress=made.append)
    assert made == [2, 0, 1, 1]  # the task before it is there, of its own nothing
    assert files(out / "faulty") == calm


def test_an_expert_that_solves_too_few_attempts_is_given_up(tmp_path: Path) -> None:
    suite = FaultySuite()
    protocol = suite.protocol("state")  # two states; each has one attempt of the seed that succeeds
    with pytest.raises(BenchError, match=r"^faulty/one: the expert solved 2 of 12 attempts, not 3; ask for fewer$"):
        make_demonstrations(suite, suite.tasks[:1], protocol, 3, tmp_path)
    made: list[int] = []
    make_demonstrations(suite, suite.tasks[:1], protocol, 2, tmp_path, on_progress=made.append)
    assert made == [0, 1, 1]


def test_object_names_are_those_that_a_simulator_shows() -> None:
    names = SUITE.object_names(SUITE.name)
    simulator = SUITE.open(TASK, STATE)
    try:
        simulator.reset(0)
        assert simulator.observe().objects.keys() < set(names)
    finally:
        simulator.close()
    one = OneTask(SUITE.name, "one task")
    assert set(Suite.object_names(one, SUITE.name)) == set(simulator.observe().objects)
    assert "floor" not in names


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BenchError, match="a file is where a folder should be"):
        write(tmp_path / "file", [episode(0, 2)])
