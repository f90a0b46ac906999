import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlarl_bench.errors import BenchError
from vlarl_bench.records import EpisodeLog, EpisodeRow, LostLog, MetricsLog, is_torn, read_metrics, read_rows


def row(**changes: object) -> EpisodeRow:
    values = {
        "run": "r", "phase": "train", "iteration": 1, "algorithm": "fpo", "policy": "pi0-tiny",
        "checkpoint": "0123456789ab", "suite": "libero_object", "task": "pick", "init_state": 3, "repeat": 0, "seed": 0,
        "decoding": "sampled", "observation": "state", "success": True, "steps": 80, "return_": 1.0,
        "protocol": "abcdefabcdef", "fingerprint": "fedcba987654", "code": "0.1.0",
        "env_steps": 400, "gradient_steps": 30, "flops": 10**15,
    }  # fmt: skip
    return EpisodeRow(**(values | changes))  # type: ignore[arg-type]


def rows(n: int) -> list[EpisodeRow]:
    return [row(init_state=i, iteration=1 + i // 2) for i in range(n)]


def test_rows_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "run" / "episodes.jsonl"
    with EpisodeLog(path) as log:
        log.append(rows(3)[0])
        log.append_all(rows(3)[1:])
    with EpisodeLog(path) as log:
        assert log.rows == tuple(rows(3))
        assert rows(3)[1].key in log
        assert row(init_state=99).key not in log
    assert read_rows(path) == rows(3)


def test_a_line_has_exactly_the_documented_fields(tmp_path):
    with EpisodeLog(tmp_path / "e.jsonl") as log:
        log.append(row())
    line = json.loads((tmp_path / "e.jsonl").read_text())
    assert line.keys() == {
        "run", "phase", "iteration", "algorithm", "policy", "checkpoint", "suite", "task", "init_state", "repeat",
        "seed", "decoding", "observation", "success", "steps", "return", "protocol", "fingerprint", "code", "crc",
        "env_steps", "gradient_steps", "flops",
    }  # fmt: skip


@settings(max_examples=30)
@given(text=st.text(), value=st.floats(allow_nan=False, allow_infinity=False), number=st.integers())
def test_any_content_round_trips(tmp_path_factory, text, value, number):
    path = tmp_path_factory.mktemp("log") / "e.jsonl"
    odd = row(task=text, return_=value, steps=number)
    with EpisodeLog(path) as log:
        log.append(odd)
    assert read_rows(path) == [odd]


@pytest.mark.parametrize("kept", range(1, 60, 7))
def test_a_torn_last_line_is_dropped_and_the_rest_kept(tmp_path, kept):
    path = tmp_path / "e.jsonl"
    with EpisodeLog(path) as log:
        log.append_all(rows(3))
    whole = path.read_bytes()
    second_end = whole.index(b"\n", whole.index(b"\n") + 1) + 1
    path.write_bytes(whole[: second_end + kept])
    assert read_rows(path) == rows(2)
    assert path.stat().st_size == second_end + kept, "a reader leaves the file alone"
    with EpisodeLog(path) as log:
        assert log.rows == tuple(rows(2))
        log.append(rows(3)[2])
    assert path.read_bytes() == whole


def test_a_torn_last_line_is_told(tmp_path):
    path = tmp_path / "e.jsonl"
    with EpisodeLog(path) as log:
        assert log.torn == 0
        assert not is_torn(path)
        log.append_all(rows(2))
    assert not is_torn(path)
    path.write_bytes(path.read_bytes()[:-1])
    assert is_torn(path)
    with EpisodeLog(path) as log:
        assert log.torn == len(path.read_bytes()) - 1 > 100
    assert not is_torn(path)


@pytest.mark.parametrize("how", ["moved", "removed", "replaced"])
def test_a_file_that_is_no_longer_in_its_place_is_not_written(tmp_path, how):
    path = tmp_path / "run" / "e.jsonl"
    log = EpisodeLog(path)
    log.append(rows(2)[0])
    path.parent.rename(tmp_path / "moved")
    if how == "removed":
        shutil.rmtree(tmp_path / "moved")
    if how == "replaced":
        EpisodeLog(path).close()
    with pytest.raises(BenchError, match=r"e\.jsonl: moved, removed or unmounted .* continue with --resume"):
        log.append(rows(2)[1])
    log.close()
    assert path.exists() == (how == "replaced")
    if how == "moved":
        (tmp_path / "moved").rename(path.parent)
        with EpisodeLog(path) as log:
            log.append(rows(2)[1])
        assert read_rows(path) == rows(2)


def test_every_flipped_byte_is_named_by_file_and_line(tmp_path):
    path = tmp_path / "e.jsonl"
    with EpisodeLog(path) as log:
        log.append_all(rows(3))
    whole = path.read_bytes()
    first_end = whole.index(b"\n") + 1
    for position in range(first_end, whole.index(b"\n", first_end)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        for read in (read_rows, EpisodeLog):
            with pytest.raises(BenchError, match=rf"{path}:2: damaged line"):
                read(path)


def test_a_repeated_row_is_ignored_and_a_contradicting_one_refused(tmp_path):
    path = tmp_path / "e.jsonl"
    with EpisodeLog(path) as log:
        log.append(row())
        log.append(row())
        with pytest.raises(BenchError, match="already recorded with other content"):
            log.append_all([row(init_state=4), row(success=False)])
        assert log.rows == (row(),), "a refused batch leaves nothing behind"
        log.append(row(init_state=4, success=False))
    assert read_rows(path) == [row(), row(init_state=4, success=False)]
    path.write_bytes(path.read_bytes() + path.read_bytes().splitlines(keepends=True)[0])
    assert len(read_rows(path)) == 2


def test_a_contradiction_on_disk_is_refused(tmp_path):
    for name, success in (("a", True), ("b", False)):
        with EpisodeLog(tmp_path / name) as log:
            log.append(row(success=success))
    path = tmp_path / "both"
    path.write_bytes((tmp_path / "a").read_bytes() + (tmp_path / "b").read_bytes())
    for read in (read_rows, EpisodeLog):
        with pytest.raises(BenchError, match=rf"{path}:2: .*already recorded"):
            read(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"phase": "test"}, "phase is 'test'"),
        ({"success": 1}, "success is 1"),
        ({"return_": 1}, "return is 1"),
        ({"steps": True}, "steps is True"),
    ],
)
def test_a_row_of_wrong_type_cannot_be_made(changes, message):
    with pytest.raises(ValueError, match=message):
        row(**changes)


def test_rewind_forgets_what_followed_the_checkpoint(tmp_path):
    path = tmp_path / "e.jsonl"
    with EpisodeLog(path) as log:
        log.append_all(rows(6))  # iterations 1 1 2 2 3 3
        assert log.rewind(3) == 0
        assert log.rewind(1) == 4
        again = [dataclasses.replace(r, fingerprint="another one!") for r in rows(6)[2:]]
        log.append_all(again)
    assert read_rows(path) == rows(2) + again


def test_two_writers_are_refused(tmp_path):
    with EpisodeLog(tmp_path / "e.jsonl"), pytest.raises(BenchError, match="another process is writing"):
        EpisodeLog(tmp_path / "e.jsonl")
    EpisodeLog(tmp_path / "e.jsonl").close()


def test_metrics_round_trip_and_non_finite_values_become_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.append({"iteration": 1, "loss": 0.1})
        log.append({"iteration": 2, "loss": float("nan")})
    with MetricsLog(path) as log:
        assert log.lines == ({"iteration": 1, "loss": 0.1}, {"iteration": 2, "loss": None})
        log.rewind(1)
    assert read_metrics(path) == [{"iteration": 1, "loss": 0.1}]


FILL_THE_DISK = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_records import rows
from vlarl_bench.errors import BenchError
from vlarl_bench.records import EpisodeLog
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path = Path(sys.argv[1])
log = EpisodeLog(path)
log.append_all(rows(2))
resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 300, resource.RLIM_INFINITY))
try:
    log.append_all(rows(9)[2:])
except BenchError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.append_all(rows(9)[2:])
"""


def test_a_write_that_fails_half_way_loses_nothing(tmp_path):
    path = tmp_path / "e.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", FILL_THE_DISK, str(path), str(Path(__file__).parent)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "File too large" in done.stdout
    assert read_rows(path) == rows(9)


def test_a_file_in_place_of_the_folder_is_explained(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(BenchError, match="a file is where a folder should be"):
        EpisodeLog(tmp_path / "run" / "episodes.jsonl")


def test_losses_are_numbered_also_over_a_resume(tmp_path):
    path = tmp_path / "lost.jsonl"
    for number in (1, 2):
        with LostLog(path) as log:
            assert log.append({"task": "pick", "why": "was killed by SIGKILL"}) == number
    with open(path, "ab") as file:
        file.write(b'{"crc":"0')  # torn by a crash
    with LostLog(path) as log:
        assert [line["number"] for line in log.lines] == [1, 2]
    assert [json.loads(line)["why"] for line in path.read_text().splitlines()] == ["was killed by SIGKILL"] * 2
