"""FAST tokens against the authors' public code, and against numbers worked out by hand."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vlarl_bench.errors import BenchError
from vlarl_bench.policies.fast_tokens import FastTokenizer

GOLDEN = json.loads((Path(__file__).parent / "fast_golden.json").read_text())


def waves(n, chunk, action_dim):
    """[n, chunk, action_dim] smooth chunks between -1 and 1: those that the golden numbers were made from."""
    i, t, d = np.meshgrid(np.arange(n), np.arange(chunk), np.arange(action_dim), indexing="ij")
    return np.sin(i * 0.7 + t * (1 + 0.2 * d) * 2 / chunk + d) * (0.3 + 0.7 * ((i + d) % 5) / 4)


def publish(folder, minimum=GOLDEN["published"]["min_token"], **changes):
    """A folder as the authors publish it."""
    settings = {"scale": 10, "min_token": minimum, "vocab_size": 200, "action_dim": None, **changes}
    (folder / "processor_config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.json").write_text(json.dumps(GOLDEN["published"]["tokenizer"]))
    return folder


def test_a_published_tokenizer_gives_the_authors_tokens(tmp_path):
    found, chunks = FastTokenizer.load(publish(tmp_path)), waves(5, 8, 7)
    assert found.encode(chunks) == GOLDEN["published"]["tokens"]
    decoded, valid = found.decode(GOLDEN["published"]["tokens"], 8, 7)
    assert valid.all()
    np.testing.assert_allclose(decoded[:2], GOLDEN["published"]["decoded"], atol=2e-6)


def test_a_tokenizer_fitted_here_gives_the_tokens_that_the_authors_code_gives_with_it():
    assert FastTokenizer.fit(waves(60, 8, 7), 10, 200).encode(waves(5, 8, 7)) == GOLDEN["fitted"]["tokens"]


def test_by_hand():
    """Two steps, two dimensions: the transform is (a + b) / sqrt(2), (a - b) / sqrt(2)."""
    chunk = np.array([[[1.0, 0.5], [0.0, 0.5]]])
    plain = FastTokenizer.plain(2, 10.0)
    assert (plain.minimum, plain.maximum, len(plain)) == (-15, 15, 31)
    # 7.07 and 7.07 at frequency 0 of both dimensions, then 7.07 and 0; one token a coefficient, counted from -15.
    assert plain.encode(chunk) == [[22, 22, 22, 15]]
    decoded, valid = plain.decode([[22, 22, 22, 15]], 2, 2)
    np.testing.assert_allclose(decoded[0], np.array([[1.4, 0.7], [0.0, 0.7]]) / np.sqrt(2), atol=1e-12)
    assert valid.all()
    assert plain.encode(9 * chunk) == [[30, 30, 30, 15]], "clipped to the range"


@pytest.mark.parametrize(("chunk", "action_dim", "scale"), [(8, 7, 10.0), (20, 14, 10.0), (20, 14, 40.0)])
def test_what_comes_back_is_what_rounding_leaves(chunk, action_dim, scale):
    """Each coefficient is at most half a step off, and the transform keeps lengths (Parseval)."""
    chunks = waves(80, chunk, action_dim)
    fitted = FastTokenizer.fit(chunks, scale, 1024)
    tokens = fitted.encode(chunks)
    decoded, valid = fitted.decode(tokens, chunk, action_dim)
    assert valid.all()
    assert (np.sqrt(((decoded - chunks) ** 2).sum((1, 2))) <= 0.5 / scale * np.sqrt(chunk * action_dim)).all()
    assert np.mean([len(ids) for ids in tokens]) < 0.6 * chunk * action_dim
    assert max(max(ids) for ids in tokens) < len(fitted) <= 1024
    lengths = fitted.lengths
    assert all(sum(lengths[i] for i in ids) == chunk * action_dim for ids in tokens)
    # All that fitting did not see can be said as well, within the range.
    others = np.random.default_rng(0).uniform(-1, 1, (20, chunk, action_dim))
    decoded, valid = fitted.decode(fitted.encode(others), chunk, action_dim)
    again, _ = fitted.decode(fitted.encode(decoded), chunk, action_dim)
    assert valid.all()
    np.testing.assert_allclose(again, decoded, atol=1e-12)


def test_fitting_is_deterministic():
    code = """
import hashlib, sys
sys.path.insert(0, {folder!r})
from test_fast_tokens import FastTokenizer, waves
print(hashlib.sha256(FastTokenizer.fit(waves(60, 8, 7), 10, 200).json.encode()).hexdigest())
"""
    command = [sys.executable, "-c", code.format(folder=str(Path(__file__).parent))]
    found = {subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(3)}
    assert len(found) == 1


def test_restored_it_is_the_same():
    fitted = FastTokenizer.fit(waves(60, 8, 7), 10, 200)
    again = FastTokenizer.restore(json.loads(json.dumps(fitted.config)))
    assert again.encode(waves(60, 8, 7)) == fitted.encode(waves(60, 8, 7))
    assert again.config == fitted.config
    assert len(again) == len(fitted) == 200


def test_what_spells_no_chunk_is_told_and_made_one():
    plain = FastTokenizer.plain(2, 10.0)
    whole = [22, 20, 18, 16]
    tokens = [whole, whole[:3], [*whole, 1, 2], []]
    decoded, valid = plain.decode(tokens, 2, 2)
    assert valid.tolist() == [True, False, False, False]
    np.testing.assert_allclose(decoded[1], plain.decode([[22, 20, 18, 15]], 2, 2)[0][0])  # the last coefficient is 0
    np.testing.assert_allclose(decoded[2], decoded[0])
    assert not decoded[3].any()


@pytest.mark.parametrize("factor", [1.3, 4])
def test_a_published_tokenizer_spells_chunks_beyond_what_it_was_fitted_on(tmp_path, factor):
    """It says only where its coefficients begin; they end where its characters do, here after 48 of them."""
    found, chunks = FastTokenizer.load(publish(tmp_path)), waves(60, 8, 7)
    assert (found.minimum, found.maximum) == (-23, 24)
    tokens = found.encode(factor * chunks)
    decoded, valid = found.decode(tokens, 8, 7)
    assert valid.all()
    # What is told is the chunk with its coefficients clipped: said again, it is the same.
    again, _ = found.decode(found.encode(decoded), 8, 7)
    np.testing.assert_allclose(again, decoded, atol=1e-12)
    policy = FastTokenizer.restore({**found.config, "maximum": 60000})  # as a folder of before has it
    assert policy.encode(factor * chunks) == tokens


def test_a_coefficient_without_a_token_becomes_the_nearest_that_has_one():
    """A byte that the authors' fit did not see leaves a gap among the characters."""
    stored = json.loads(FastTokenizer.plain(2, 10.0).json)
    stored["model"]["vocab"] = {chr(0x4E00 + i) if i in (21, 22) else c: i for c, i in stored["model"]["vocab"].items()}
    gap = FastTokenizer(json.dumps(stored), 10, -15)
    assert (gap.minimum, gap.maximum) == (-15, 15)
    chunks = np.array([4, 5, 6, 7, 8, 99]).reshape(-1, 1, 1) / 10  # of one number, so a tenth of their coefficient
    assert gap.encode(chunks) == [[19], [20], [20], [23], [23], [30]]


def test_a_tokenizer_that_spells_no_coefficient():
    with pytest.raises(BenchError, match=r"tokenizer.json: spells none of the characters 0 to 0 .*must be FAST's"):
        FastTokenizer(json.dumps({"version": "1.0", "model": {"type": "BPE", "vocab": {"x": 0}, "merges": []}}), 10, 0)


def test_bytes_that_are_no_character_are_no_coefficient():
    """A byte-level tokenizer can spell half a character; the authors' code takes it for a coefficient of 65510."""
    stored = json.loads(json.dumps(GOLDEN["published"]["tokenizer"]))
    half = len(stored["model"]["vocab"])
    assert "\u00c3" not in stored["model"]["vocab"], "the formula's coefficients all are single bytes"
    stored["model"]["vocab"]["\u00c3"] = half  # how such tokenizers write byte 195, which begins a character of two
    found = FastTokenizer(json.dumps(stored), 10, GOLDEN["published"]["min_token"])
    tokens = GOLDEN["published"]["tokens"][0]
    decoded, valid = found.decode([tokens[:-1] + [half], [half] * 56], 8, 7)
    assert not valid.any()
    assert np.abs(decoded).max() < 10


def test_more_coefficients_than_tokens():
    chunks = waves(60, 8, 7)
    chunks[3, 2, 1] = 40
    with pytest.raises(BenchError, match=r"actions: their coefficients span -?\d+ to \d+, more than 128 tokens"):
        FastTokenizer.fit(chunks, 10, 128)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": "ten"}, r"processor_config.json: scale: 'ten'; it must be a number"),
        ({"scale": 0}, r"scale: 0; it must be above 0"),
        ({"minimum": None}, r"processor_config.json: min_token: None"),
        ({"minimum": 1.5}, r"processor_config.json: min_token: 1.5"),
    ],
)
def test_a_wrong_entry_is_named(tmp_path, changes, message):
    with pytest.raises(BenchError, match=message):
        FastTokenizer.load(publish(tmp_path, **changes))


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(BenchError, match=r"tokenizer: cannot read .*tokenizer.json: No such file"):
        FastTokenizer.load(tmp_path)
    publish(tmp_path)
    (tmp_path / "processor_config.json").write_text("{")
    with pytest.raises(BenchError, match="not JSON"):
        FastTokenizer.load(tmp_path)
    publish(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BenchError, match=r"tokenizer.json: not a tokenizer"):
        FastTokenizer.load(tmp_path)
