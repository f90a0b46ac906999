import json
import os
import shutil
import threading

import pytest

from vlarl_bench.errors import BenchError
from vlarl_bench.files import write_json_atomic
from vlarl_bench.sealed import read_sealed, write_sealed

CONTENT = {"name": "fpo", "lr": 1e-4, "tasks": ["a", "b"], "video": False}


def test_what_was_written_comes_back_without_its_digest(tmp_path):
    write_sealed(tmp_path / "x.json", CONTENT)
    assert read_sealed(tmp_path / "x.json") == CONTENT
    assert list(json.loads((tmp_path / "x.json").read_text()))[-1] == "sha256"


def test_files_of_earlier_versions_have_no_digest(tmp_path):
    write_json_atomic(tmp_path / "x.json", CONTENT)
    assert read_sealed(tmp_path / "x.json", older=True) == CONTENT
    with pytest.raises(BenchError, match=r"x\.json: damaged"):
        read_sealed(tmp_path / "x.json")


@pytest.mark.parametrize("older", [False, True])
def test_every_flipped_byte_and_every_truncation_is_named(tmp_path, older):
    """Also one that hits the name of the digest, which must not make it a file that never had one."""
    path = tmp_path / "x.json"
    write_sealed(path, CONTENT)
    whole = path.read_bytes()
    for i in range(len(whole)):
        for damaged in (whole[:i], *(whole[:i] + bytes([whole[i] ^ 1 << bit]) + whole[i + 1 :] for bit in range(8))):
            path.write_bytes(damaged)
            with pytest.raises(BenchError, match=r"x\.json: ") as error:
                read_sealed(path, older)
            assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["[1, 2]", "[]", "3", "null", '"x"', "[[1, 2]]"])
def test_what_is_no_object_is_named(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(BenchError, match=r"x\.json: "):
        read_sealed(tmp_path / "x.json", older=True)


def test_a_file_that_is_replaced_while_it_is_read_is_whole(tmp_path):
    """As an attempt's is when it ends, while somebody asks for the status."""
    path, over = tmp_path / "x.json", threading.Event()
    for name in ("a", "b"):
        write_sealed(tmp_path / name, {**CONTENT, "name": name * 50})

    def replace():
        while not over.is_set():
            for name in ("a", "b"):
                shutil.copy(tmp_path / name, tmp_path / "new")
                os.replace(tmp_path / "new", path)

    write_sealed(path, CONTENT)
    thread = threading.Thread(target=replace)
    thread.start()
    try:
        for _ in range(500):
            assert read_sealed(path).keys() == CONTENT.keys()
    finally:
        over.set()
        thread.join()
