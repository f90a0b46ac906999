"""Published folders through the command line, at widths that a test can run, in the real simulator."""

import dataclasses
import functools
import json

import pytest
from vlarl_bench.tasks.libero import suite

from vlarl_bench import registry
from vlarl_bench.cli import main
from vlarl_bench.policies import openvla_checkpoint, pi0_checkpoint, pi0_fast_checkpoint
from vlarl_bench.policies.octo import Octo
from vlarl_bench.policies.pi0_fast_published import PublishedPi0FastArchitecture
from vlarl_bench.policies.pi0_published import PublishedPi0Architecture
from vlarl_bench.policies.store import content_hash, save_policy
from vlarl_bench.records import read_rows

from .conformance.narrow import narrow
from .policies import pi0_fast_small, pi0_small
from .policies.openvla_tiny import SMALL
from .policies.test_openvla_checkpoint import FORMS
from .policies.test_openvla_checkpoint import publish as publish_openvla

TASK = "pick_up_the_milk_and_place_it_in_the_basket"
PLAY = ("eval", "--suite", "libero_object", "--tasks", TASK, "--states", "1", "--workers", "1", "--slots", "1")
SIZES = ("layers", "width", "heads", "mlp", "max_words", "dino", "siglip")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Episodes of one decision."""
    for name in ("openpi", "lerobot", "simplevla", "octo"):
        protocol = suite.PUBLISHED[name]
        monkeypatch.setitem(suite.PUBLISHED, name, dataclasses.replace(protocol, horizon=(protocol.execute,) * 5))


@pytest.fixture
def openvla(tmp_path, monkeypatch):
    """`openvla(form)`: a folder as OFT publishes it, and its policy."""
    narrow = {key: SMALL[key] for key in SIZES} | {"max_words": 64}
    monkeypatch.setattr(openvla_checkpoint, "PUBLISHED", {**openvla_checkpoint.PUBLISHED, **narrow})

    def make(form):
        made = publish_openvla(tmp_path / "published", {**form, "image_size": 224, "max_words": 64})
        return tmp_path / "published", made

    return make


@pytest.fixture
def pi0(tmp_path, monkeypatch):
    """A folder as lerobot publishes it."""
    narrow = functools.partial(PublishedPi0Architecture, **pi0_small.SIZES)
    monkeypatch.setattr(pi0_checkpoint, "PublishedPi0Architecture", narrow)
    made = pi0_small.publish(tmp_path / "published", chunk=10, image_size=224, max_words=48)
    return tmp_path / "published", made


@pytest.mark.parametrize(
    ("form", "protocol", "steps"), [(FORMS["oft"], "openpi", 5), (FORMS["simplevla"], "simplevla", 8)]
)
def test_openvla_plays_from_its_folder(form, protocol, steps, openvla, tmp_path, capsys):
    folder, made = openvla(form)
    options = ("--policy", "openvla-oft-7b", "--base", str(folder), "--protocol", protocol)
    out = tmp_path / "run"
    assert main([*PLAY, *options, "--unnorm-key", "libero_object", "--out", str(out)]) == 0, capsys.readouterr().err
    (row,) = read_rows(out / "episodes.jsonl")
    assert (row.policy, row.task, row.steps, row.checkpoint) == ("openvla-oft-7b", TASK, steps, content_hash(made))
    assert main([*PLAY, *options, "--unnorm-key", "bridge_orig"]) == 2
    assert "unnorm_key: 'bridge_orig'; the checkpoint has libero_object_no_noops" in capsys.readouterr().err


def test_octo_plays_from_what_its_converter_writes(tmp_path, capsys):
    spec, object_suite = registry.get("policy", "octo-small-1.5"), registry.get("suite", "libero_object")
    embodiment = object_suite.embodiment(object_suite.protocol("pixels", "octo"))
    small = narrow(spec, embodiment, [task.instruction for task in object_suite.tasks], 0)
    seen = {"image_size": 256, "camera_sizes": (256, 128), "chunk": 4}
    made = Octo(spec.name, dataclasses.replace(small.architecture, **seen), small.vocabulary)
    save_policy(tmp_path / "converted", made, {})
    out = tmp_path / "run"
    options = ("--policy", spec.name, "--base", str(tmp_path / "converted"), "--protocol", "octo", "--out", str(out))
    assert main([*PLAY, *options]) == 0, capsys.readouterr().err
    (row,) = read_rows(out / "episodes.jsonl")
    assert (row.steps, row.checkpoint) == (4, content_hash(made))


def test_pi0_plays_from_its_folder_and_resizes_what_it_sees(pi0, tmp_path, capsys):
    folder, made = pi0
    out = tmp_path / "run"
    options = ("--policy", "pi0-base", "--base", str(folder), "--protocol", "lerobot", "--out", str(out))
    assert main([*PLAY, *options]) == 0, capsys.readouterr().err
    (row,) = read_rows(out / "episodes.jsonl")
    assert (row.steps, row.checkpoint) == (10, content_hash(made))


def test_pi0_fast_plays_from_its_folder_and_tells_what_is_no_chunk(tmp_path, monkeypatch, capsys):
    narrow = functools.partial(PublishedPi0FastArchitecture, **pi0_fast_small.SIZES)
    monkeypatch.setattr(pi0_fast_checkpoint, "PublishedPi0FastArchitecture", narrow)
    made = pi0_fast_small.publish(tmp_path / "published", chunk=10, image_size=224)
    out = tmp_path / "run"
    options = ("--policy", "pi0-fast-base", "--base", str(tmp_path / "published"), "--protocol", "lerobot")
    assert main([*PLAY, *options, "--out", str(out)]) == 0
    told = capsys.readouterr()
    (row,) = read_rows(out / "episodes.jsonl")
    assert (row.steps, row.checkpoint) == (10, content_hash(made))
    assert "1 of 1 decisions spelled no action chunk" in told.out + told.err


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            ("openvla-7b",),
            "base: 'prior'; 'openvla-7b' needs --base FOLDER: openvla/openvla-7b or its LIBERO fine-tunes",
        ),
        (("pi0-base", "--base", "scratch"), "base: 'scratch'; 'pi0-base' needs --base FOLDER: lerobot/pi0_base"),
        (
            ("octo-small-1.5", "--base", "nowhere", "--protocol", "octo"),
            "base: 'nowhere'; there is no config.json; 'octo",
        ),
        (
            ("openvla-7b", "--protocol", "tiny"),
            "policy: 'openvla-7b' looks at agentview at 224 x 224, but protocol tiny",
        ),
    ],
)
def test_what_is_missing_is_told(options, line, capsys):
    assert main([*PLAY, "--protocol", "openpi", "--policy", *options]) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith(f"vlarl-bench: error: {line}")


def test_octo_s_own_checkpoint_must_be_converted_first(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    options = (
        "--policy",
        "octo-base-1.5",
        "--base",
        str(tmp_path),
        "--protocol",
        "octo",
        "--out",
        str(tmp_path / "x"),
    )
    assert main([*PLAY, *options]) == 2
    assert "has no hashes.json; octo-base-1.5 takes rail-berkeley/octo-base-1.5, after" in capsys.readouterr().err


def test_list_says_what_needs_a_folder(capsys):
    assert main(["list", "--json"]) == 0
    policies = {policy["name"]: policy["needs_base"] for policy in json.loads(capsys.readouterr().out)["policies"]}
    assert {name for name, needed in policies.items() if needed} == {
        "openvla-7b",
        "openvla-oft-7b",
        "pi0-base",
        "pi0-fast-base",
        "octo-small-1.5",
        "octo-base-1.5",
    }
