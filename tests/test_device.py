"""Which device a policy is put on. Where there is no GPU, torch is told that there are some."""

import pytest
import torch

from vlarl_bench import device, provenance
from vlarl_bench.cli import main
from vlarl_bench.config import EvalConfig
from vlarl_bench.device import find_device
from vlarl_bench.errors import BenchError


@pytest.fixture
def gpus(monkeypatch):
    """`gpus(n)`: torch finds so many."""

    def found(n):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: n > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: n)
        monkeypatch.setattr(torch.cuda, "set_device", lambda number: None)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"GPU {number}")
        monkeypatch.setattr(provenance, "_gpu", {})

    return found


def test_without_a_gpu_it_is_one_line_and_nothing_begins(gpus, tmp_path, monkeypatch, capsys):
    gpus(0)
    monkeypatch.chdir(tmp_path)
    for command in (["run", "--algo", "fpo"], ["eval"]):
        assert main([*command, "--suite", "libero", "--device", "cuda"]) == 2
        line = capsys.readouterr().err
        assert line.startswith(f"vlarl-bench: error: device: 'cuda'; torch {torch.__version__} finds no GPU here")
        assert line.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_processes_of_a_machine_take_its_gpus_in_turn_and_fingerprints_name_them(gpus, monkeypatch):
    gpus(2)
    before = provenance.fingerprint()
    assert find_device("cpu") == torch.device("cpu")
    assert provenance.fingerprint() == before
    for process, number in ((0, 0), (1, 1), (2, 0)):
        monkeypatch.setenv("LOCAL_RANK", str(process))
        assert find_device("cuda") == torch.device("cuda", number)
        assert provenance.fingerprint() == before | {"gpu": f"GPU {number}, CUDA {torch.version.cuda}"}
        assert find_device("cuda:1") == torch.device("cuda", 1)
    assert find_device("cpu") == torch.device("cpu")
    assert provenance.fingerprint() == before
    monkeypatch.setattr(device, "world_size", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(BenchError, match=r"^LOCAL_RANK: ''; it must say which process"):
        find_device("cuda")
    with pytest.raises(BenchError, match=r"^device: 'cuda:2'; the GPUs here are cuda:0 to cuda:1$"):
        find_device("cuda:2")


@pytest.mark.parametrize("name", ["", "gpu", "CUDA", "cuda:", "cuda:-1", "cuda:1x", "mps"])
def test_what_names_no_device_is_refused(name):
    with pytest.raises(BenchError, match=r"^device: .*; it must be cpu, cuda, or one GPU such as cuda:1$"):
        EvalConfig("libero", "pi0-tiny", "x", device=name)
