import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torture import count

from vlarl_bench.checkpoint import checkpoints, load_checkpoint, load_latest, save_checkpoint
from vlarl_bench.errors import BenchError


def same(a: object, b: object) -> bool:
    """Equal in type, structure and bits."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        bits = [t.reshape(-1).contiguous().view(torch.uint8) if t.numel() else t for t in (a, b)]
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)
    if isinstance(a, dict) and isinstance(b, dict):
        typed = [[(type(k), k) for k in d] for d in (a, b)]
        return typed[0] == typed[1] and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return (math.isnan(a) and math.isnan(b)) or a.hex() == b.hex()
    return a == b


DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
]  # fmt: skip


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    raw = torch.randint(0, 256, [*shape, torch.empty((), dtype=dtype).element_size()], dtype=torch.uint8)
    if dtype == torch.bool:
        raw %= 2
    tensor = raw.view(dtype)[..., 0]
    return tensor.T if len(shape) == 2 and draw(st.booleans()) else tensor


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | tensors()
states = st.dictionaries(
    st.text(max_size=4) | st.integers(0, 9),
    st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.lists(inner, max_size=3).map(tuple)
            | st.dictionaries(st.text(max_size=2) | st.integers(0, 2), inner, max_size=3)
        ),
        max_leaves=8,
    ),
    max_size=5,
)


@settings(max_examples=80, deadline=None)
@given(state=states)
def test_any_state_comes_back_bitwise(tmp_path_factory, state):
    folder = tmp_path_factory.mktemp("c")
    save_checkpoint(folder, 7, state)
    restored = load_latest(folder)
    shutil.rmtree(folder)
    assert restored is not None
    assert restored.iteration == 7
    assert same(restored.state, state)


def test_names_that_look_alike_stay_apart(tmp_path):
    state = {0: torch.tensor(1), "0": torch.tensor(2), "a/b": torch.tensor(3), "a": {"b": torch.tensor(4)}}
    save_checkpoint(tmp_path, 1, state)
    assert same(load_checkpoint(tmp_path / "000001")[1], state)


def test_training_continues_bitwise(tmp_path):
    def make() -> tuple[torch.nn.Linear, torch.optim.Optimizer, torch.Generator]:
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        model.register_parameter("tied", model.weight)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1), torch.Generator().manual_seed(5)

    def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> None:
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(8, 4, generator=generator)).square().sum().backward()
            optimizer.step()

    model, optimizer, generator = make()
    train(model, optimizer, generator)
    state = {"model": dict(model.state_dict()), "optimizer": optimizer.state_dict(), "rng": generator.get_state()}
    save_checkpoint(tmp_path, 3, state)
    train(model, optimizer, generator)

    other, other_optimizer, other_generator = make()
    _, loaded = load_checkpoint(tmp_path / "000003")
    other.load_state_dict(loaded["model"])
    other_optimizer.load_state_dict(loaded["optimizer"])
    other_generator.set_state(loaded["rng"])
    train(other, other_optimizer, other_generator)
    assert same(dict(other.state_dict()), dict(model.state_dict()))
    assert same(other_optimizer.state_dict(), optimizer.state_dict())


def test_the_last_two_are_kept_and_a_repeated_iteration_is_replaced(tmp_path):
    for iteration in range(1, 5):
        save_checkpoint(tmp_path, iteration, {"x": torch.tensor(iteration)})
    save_checkpoint(tmp_path, 4, {"x": torch.tensor(40)})
    assert sorted(os.listdir(tmp_path)) == ["000003", "000004"]
    restored = load_latest(tmp_path)
    assert restored is not None
    assert restored.state["x"].item() == 40
    save_checkpoint(tmp_path, 5, {}, keep=1, also=3)
    assert [path.name for path in checkpoints(tmp_path)] == ["000005", "000003"]
    save_checkpoint(tmp_path, 6, {}, keep=1)
    assert [path.name for path in checkpoints(tmp_path)] == ["000006"]


def test_nothing_there_is_none(tmp_path):
    assert load_latest(tmp_path / "checkpoints") is None
    assert load_latest(tmp_path) is None


@pytest.mark.parametrize("value", [object(), {1, 2}, b"x", {1.5: 1}])
def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path, value):
    with pytest.raises(TypeError, match="checkpoint"):
        save_checkpoint(tmp_path, 1, {"bad": value})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "hashes.json"])
def test_every_flipped_byte_is_named(tmp_path, name):
    path = save_checkpoint(tmp_path, 1, {"w": torch.arange(3.0), "step": 5})
    good = (path / name).read_bytes()
    for position in range(len(good)):
        for bit in (1, 32):
            (path / name).write_bytes(good[:position] + bytes([good[position] ^ bit]) + good[position + 1 :])
            with pytest.raises(BenchError) as caught:
                load_checkpoint(path)
            assert str(caught.value).startswith(f"{path / name}: ")
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "hashes.json"])
def test_truncated_missing_and_foreign_files_are_named(tmp_path, name):
    path = save_checkpoint(tmp_path, 1, {"w": torch.arange(3.0), "step": 5})
    good = (path / name).read_bytes()
    for content, words in ((good[:-1], ""), (b"", ""), (b"PK\x03\x04 a torch.save file", ""), (None, "no such file")):
        (path / name).unlink()
        if content is not None:
            (path / name).write_bytes(content)
        with pytest.raises(BenchError, match=rf"{name}.*{words}"):
            load_checkpoint(path)
        (path / name).write_bytes(good)
    (path / "hashes.json").write_text('{"format": "another tool", "files": {}}')
    with pytest.raises(BenchError, match="format is 'another tool', expected 'vlarl-bench checkpoint 1'"):
        load_checkpoint(path)


def test_a_damaged_newest_falls_back_and_says_so(tmp_path):
    for iteration in (1, 2):
        save_checkpoint(tmp_path, iteration, {"x": iteration})
    (tmp_path / "000002" / "state.json").write_text("{")
    restored = load_latest(tmp_path)
    assert restored is not None
    assert (restored.iteration, restored.state) == (1, {"x": 1})
    assert len(restored.problems) == 1
    assert "000002/state.json" in restored.problems[0]
    (tmp_path / "000001" / "hashes.json").unlink()
    with pytest.raises(BenchError, match=r"no checkpoint can be used: .*000002/state.json.*000001/hashes.json"):
        load_latest(tmp_path)


# Forks so that torch is imported once; each child saves until it is killed.
KILL = """
import os, random, signal, sys, time
import torch
from vlarl_bench.checkpoint import load_latest, save_checkpoint
torch.set_num_threads(1)
rng = random.Random(0)
folder, newest, seen = sys.argv[1], 3, set()
begun = time.monotonic()
for iteration in (1, 2, 3):
    save_checkpoint(folder, iteration, {"w": torch.full((200_000,), float(iteration)), "n": iteration})
seconds = (time.monotonic() - begun) / 3  # of one, on this machine and under its load
for attempt in range(int(sys.argv[2])):
    child = os.fork()
    if child == 0:
        iteration = newest
        while True:
            iteration += 1
            save_checkpoint(folder, iteration, {"w": torch.full((200_000,), float(iteration)), "n": iteration})
    time.sleep(rng.uniform(0, 4 * seconds))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    seen |= {name[-4:] for name in os.listdir(folder)}
    restored = load_latest(folder)
    assert not restored.problems, restored.problems
    assert restored.iteration >= newest, (restored.iteration, newest)
    newest = restored.iteration
    assert restored.state["n"] == newest and bool((restored.state["w"] == newest).all())
assert newest > 6 and ".tmp" in seen, (newest, seen)
"""


@pytest.mark.torture
def test_kill_9_never_leaves_a_half_checkpoint(tmp_path, record_property):
    kills = count(20, 200)
    command = [sys.executable, "-c", KILL, str(tmp_path / "c"), str(kills)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record_property("torture", f"{kills} kills inside the writer; the newest checkpoint was whole each time")
