import io

import pytest

from vlarl_bench.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_plain_lines_when_piped():
    out, clock = io.StringIO(), Clock()
    with Progress(out, clock) as progress, progress.phase("base evaluation", total=8) as phase:
        for i in range(8):
            clock.now += 2
            phase.advance(episodes=1, successes=i % 2, steps=120)
    assert out.getvalue().splitlines() == [
        "base evaluation: 8 episodes",
        "base evaluation: 3/8 episodes · success 33% · 60 env steps/s · 0:10 left",
        "base evaluation: 6/8 episodes · success 50% · 60 env steps/s · 0:04 left",
        "base evaluation: 8 episodes · success 50% · 60 env steps/s · took 0:16",
    ]


def test_other_units_and_a_note():
    out, clock = io.StringIO(), Clock()
    with Progress(out, clock) as progress, progress.phase("supervised training", 2000, "updates") as phase:
        clock.now += 3700
        phase.advance(1000, note="loss 0.12")
    assert "1000/2000 updates · 0.3 updates/s · loss 0.12 · 1:01:40 left" in out.getvalue()


def test_a_terminal_gets_a_bar_and_keeps_the_summary(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    out, clock = Terminal(), Clock()
    with Progress(out, clock) as progress, progress.phase("base evaluation", total=2) as phase:
        progress.say("[not markup]")
        clock.now += 10
        phase.advance(episodes=2, successes=1, steps=100)
    text = out.getvalue()
    assert "\x1b[" in text
    assert "[not markup]" in text
    assert "base evaluation: 2 episodes · success 50% · 10 env steps/s · took 0:10" in text


def test_a_phase_that_fails_does_not_claim_to_be_done():
    out = io.StringIO()
    with pytest.raises(RuntimeError), Progress(out) as progress, progress.phase("training", total=2):
        raise RuntimeError
    assert out.getvalue().splitlines() == ["training: 2 episodes"]
