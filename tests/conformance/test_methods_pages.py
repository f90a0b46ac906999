"""What docs/methods says of each method's settings: every one has a row, and the default in it is the code's."""

import dataclasses
import re

import pytest

from vlarl_bench import registry

from .test_algorithms import METHODS, ours

OURS = [name for name in registry.names("algorithm") if ours(name)]


def owner(name):
    """The method that the settings are of, whose page has them: `pi0-fast` has those of `sft`."""
    return registry.get("algorithm", name).Settings.__module__.rpartition(".")[2].replace("_", "-")


def fields(name):
    """Defaults by setting."""
    return {field.name: field.default for field in dataclasses.fields(registry.get("algorithm", name).Settings)}


def rows(page):
    """What the tables under Settings say: of each setting the text of its default, empty where that is not one of its
    own. A row may have several settings, with as many defaults; what follows them there explains."""
    text = (METHODS / f"{page}.md").read_text(encoding="utf-8")
    (section,) = re.findall(r"^## Settings\n(.*?)(?=^## |\Z)", text, flags=re.DOTALL | re.MULTILINE)
    found = {}
    for line in section.splitlines():
        if line.startswith("|"):
            _, settings, defaults, *_ = line.split("|")
            settings, defaults = re.findall(r"`(\w+)`", settings), defaults.strip().split(", ")
            found |= dict.fromkeys(settings, "") | dict(zip(settings, defaults, strict=False))
    return found


def shared(name):
    """The rows of README, which are about critics that are fitted to returns, for methods that have one."""
    return rows("README") if "critic_steps" in fields(name) else {}


def value(text):
    """The number, the `word` or the switch that the text begins with; None where it begins with anything else."""
    if number := re.match(r"-?\d[\d,]*(\.\d+)?(e-?\d+)?", text):
        return float(number[0].replace(",", ""))
    if word := re.match(r"`(\w+)`", text):
        return word[1]
    return {"on": True, "off": False}.get(re.split(r"\W", text)[0])


@pytest.mark.parametrize("name", OURS)
def test_each_setting_has_a_row_and_each_row_a_setting(name):
    known, told = fields(name), rows(owner(name)) | shared(name)
    assert [setting for setting in known if setting not in told] == []
    assert [setting for setting in told if setting not in known] == []
    assert owner(name) == name or f"({owner(name)}.md)" in (METHODS / f"{name}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", OURS)
def test_a_default_that_is_stated_is_the_codes(name):
    known, told = fields(name), shared(name) | rows(owner(name))
    stated = {setting: value(told.get(setting, "")) for setting in known}
    assert [(s, stated[s], known[s]) for s in known if stated[s] is not None and stated[s] != known[s]] == []
    numbers = [setting for setting, default in known.items() if type(default) in (int, float)]
    compared = [setting for setting in numbers if stated[setting] is not None]
    assert 2 * len(compared) >= len(numbers), f"of {numbers} only {compared} say a number"
