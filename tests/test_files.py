"""Files are whole or not there; a folder has one writer; what the system refuses is told in one line."""

import errno
import os
import threading

import pytest

from vlarl_bench.errors import BenchError
from vlarl_bench.files import atomic_file, explain_oserror, read_json, sole_writer, write_json_atomic


def test_a_full_disk_is_explained(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    with pytest.raises(OSError, match="No space") as caught, open("/dev/full", "wb", buffering=0) as full:
        full.write(b"x")
    assert "disk is full; free some space" in str(explain_oserror(caught.value, tmp_path))


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.EROFS, "read-only"), (errno.EACCES, "denied"), (errno.EDQUOT, "full"), (errno.ENOENT, "no such file")],
)
def test_oserrors_say_what_to_do(number, words):
    text = str(explain_oserror(OSError(number, os.strerror(number)), "some/path"))
    assert text.startswith("some/path: ")
    assert words in text
    assert "\n" not in text


def test_what_may_not_be_read_is_no_matter_of_where_to_write():
    """The same words must serve for both."""
    assert "--out" not in str(explain_oserror(OSError(errno.EACCES, "denied"), "rows"))


def test_json_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "config.json"
    write_json_atomic(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json_atomic(path, {"a": float("nan")})
    with pytest.raises(UnicodeEncodeError), atomic_file(path) as temporary:
        temporary.write_text("half \ud800", encoding="utf-8")
    assert read_json(path) == {"a": 1}
    assert os.listdir(tmp_path) == ["config.json"]


@pytest.mark.parametrize("content", [b'{"a": ', b"\xff\xfe", b""])
def test_damaged_json_is_named(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(BenchError, match=r"config\.json: not valid JSON"):
        read_json(tmp_path / "config.json")
    with pytest.raises(BenchError, match=r"nothing\.json: no such file"):
        read_json(tmp_path / "nothing.json")


def test_a_folder_has_one_writer_and_whoever_may_wait_comes_after_it(tmp_path):
    folder, order, waits = tmp_path / "made", [], threading.Event()

    def later():
        with sole_writer(folder, waits.set):
            order.append("second")

    with sole_writer(folder):
        with pytest.raises(BenchError, match="another process is writing here"), sole_writer(folder):
            pass
        thread = threading.Thread(target=later)
        thread.start()
        assert waits.wait(60)
        order.append("first")
    thread.join(60)
    assert order == ["first", "second"]
