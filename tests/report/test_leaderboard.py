import functools
import html.parser
import json
import re
import shutil

import pytest

from vlarl_bench import cli, registry
from vlarl_bench.protocol import Protocol
from vlarl_bench.records import MetricsLog
from vlarl_bench.report.leaderboard import make_page, write_leaderboard
from vlarl_bench.report.published import read_published
from vlarl_bench.report.rows import Rows
from vlarl_bench.report.runs import read_run, read_runs

PUBLISHED = """
[[result]]
method = "Paper <b>M</b>"
kind = "RL"
algorithm = "fpo"
base_policy = "their base"
protocol = "theirs"
source = "a paper, Table I"
printed_average = 87.2
scores = { suite_a = 97.2, suite_b = 97.3, suite_c = 89.4, suite_d = 65.3 }
"""


def at_most(limit):
    return lambda task, state, repeat: 2 * (state - 4) + repeat < limit


@pytest.fixture
def runs(make_run):
    """Four seeds each of a strong and a weak method."""
    return read_runs([
        make_run(f"{name}{seed}", base=at_most(1), final=at_most(limit), seed=seed, algorithm=name,
                 train=((1, False), (1, True), (2, True), (2, True)))
        for seed, limits in enumerate([(8, 2), (7, 2), (8, 3), (7, 2)])
        for name, limit in zip(("strong", "weak"), limits, strict=True)
    ])  # fmt: skip


@pytest.fixture
def published(tmp_path):
    (tmp_path / "published.toml").write_text(PUBLISHED)
    return read_published(tmp_path / "published.toml")


def data_of(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


def cells_of(page):
    return data_of(page)["cells"]


@pytest.fixture
def filmed(make_run, tmp_path):
    """A run of fpo, in a folder whose name is no address, that was filmed and timed; and the folder of its page."""
    folder = make_run("a #1: run", base=at_most(1), final=at_most(5), algorithm="fpo", train=((1, False), (2, True)),
                      config={"settings": {"lr": 0.5, "own": 1}})  # fmt: skip
    for name in ("before", "after"):
        (folder / f"{name}.mp4").write_bytes(b"a film")
    with MetricsLog(folder / "metrics.jsonl") as log:
        for iteration in (1, 2):
            log.append({"iteration": iteration, "seconds": 90.0 * iteration})
    return read_run(folder), tmp_path / "site"


def test_cells_carry_what_stands_behind_them(runs, published):
    cells = cells_of(make_page(runs, published))
    strong = next(cell for cell in cells if cell["method"] == "strong")
    assert (strong["successes"], strong["episodes"], strong["seeds"], strong["best"]) == (60, 64, [0, 1, 2, 3], True)
    assert strong["change"]["value"] == pytest.approx(60 / 64 - 1 / 8)
    assert strong["change"]["base"] == pytest.approx(1 / 8)
    assert strong["tasks"][0] == {
        "name": "pick_it_up", "all": [30, 32], "seeds": [[8, 8], [7, 8], [8, 8], [7, 8]], "base": [4, 32],
        "outcomes": ["1" * 8, "1" * 7 + "0"] * 2,
    }  # fmt: skip
    assert strong["curves"][0] == {"seed": 0, "steps": [200.0, 400.0], "rates": [0.5, 1.0]}
    assert strong["runs"][0]["command"] == "vlarl-bench run"
    assert {cell["noiseless"] for cell in cells if cell["kind"] == "measured"} == {None}
    assert len({cell["id"] for cell in cells}) == len(cells) == 3 + 4
    copied = [cell for cell in cells if cell["kind"] == "copied"]
    assert all(any("87.2" in finding for finding in cell["findings"]) for cell in copied)
    assert "seeds" not in copied[0]


def test_a_score_has_what_was_played_without_noise_beside_it(make_run):
    run = read_run(make_run("r", base=at_most(1), final=at_most(8), noiseless=(at_most(8), at_most(1))))
    base, fpo = cells_of(make_page([run], []))
    assert base["noiseless"] is None and fpo["noiseless"].startswith("8/8 to 2/8, -75.0 [")


def test_films_are_linked_to_where_they_are(filmed):
    run, site = filmed
    cells = cells_of(make_page([run], [], site))
    base, fpo = (next(cell for cell in cells if cell["method"] == name) for name in ("base policy", "fpo"))
    assert base["runs"][0]["films"] == {"before": "../a%20%231%3A%20run/before.mp4"}
    assert fpo["runs"][0]["films"] == {f"{n}": f"../a%20%231%3A%20run/{n}.mp4" for n in ("before", "after")}
    (run.folder / "after.mp4").unlink()
    assert list(next(c for c in cells_of(make_page([run], [], site)) if c["method"] == "fpo")["runs"][0]["films"]) == [
        "before"
    ]
    assert cells_of(make_page([run], []))[1]["runs"][0]["films"] == {}


def test_who_sent_a_run_is_on_the_page(filmed):
    run, _ = filmed
    object.__setattr__(run, "submitted", {"by": "a group"})
    shown = [entry for cell in cells_of(make_page([run], [])) for entry in cell["runs"]]
    assert [entry["submitted"] for entry in shown] == [{"by": "a group"}] * 2


def test_curves_have_the_seconds_that_were_logged(filmed, runs):
    (timed,) = (cell for cell in cells_of(make_page([filmed[0]], [])) if cell["method"] == "fpo")
    assert timed["curves"] == [{"seed": 0, "steps": [100, 200], "rates": [0, 1], "seconds": [90, 180]}]
    assert all("seconds" not in curve for cell in cells_of(make_page(runs, [])) for curve in cell["curves"])


def test_each_method_has_a_page(filmed, runs, published):
    pages = {page["name"]: page for page in data_of(make_page([filmed[0], *runs], published))["methods"]}
    assert {"fpo", "dppo", "sft", "strong", "weak"} <= pages.keys()  # registered ones, and those of the runs
    assert "Lyu et al." in pages["fpo"]["summary"]
    assert (pages["fpo"]["learns_from"], pages["fpo"]["notes"]) == ("rollouts", "docs/methods/fpo.md")
    assert "pi0-tiny" in pages["fpo"]["policies"]
    settings = {name: line for name, *line in pages["fpo"]["settings"]}
    defaults = registry.get("algorithm", "fpo").Settings()
    assert settings["lr"] == [str(defaults.lr), "0.5"]
    assert settings["epochs"] == [str(defaults.epochs), ""]
    assert settings["own"] == ["", "1"]  # of a version that had it
    assert "Not installed" in pages["strong"]["summary"]


def test_notes_are_linked_to_in_a_checkout(filmed, tmp_path, monkeypatch):
    (tmp_path / "docs" / "methods").mkdir(parents=True)
    (tmp_path / "docs" / "methods" / "fpo.md").write_text("notes")
    monkeypatch.chdir(tmp_path)
    write_leaderboard(filmed[1] / "index.html", [filmed[0]], [])
    pages = {page["name"]: page for page in data_of((filmed[1] / "index.html").read_text())["methods"]}
    assert pages["fpo"]["link"] == "../docs/methods/fpo.md"
    assert pages["dppo"]["link"] is None


def test_runs_of_several_protocols_are_kept_apart(runs, make_run):
    longer = Protocol("tiny-state", 2, "state", {"suite_a": 400}, 10, 8, (0, 1), (4, 5))
    other = read_run(make_run("other", base=at_most(1), final=at_most(8), algorithm="strong", protocol=longer))
    cells = [cell for cell in cells_of(make_page([*runs, other], [])) if cell["method"] == "strong"]
    assert [cell["seeds"] for cell in cells] == [[0, 1, 2, 3], [0]]


def test_the_order_of_runs_changes_nothing(runs, published):
    assert make_page(runs, published) == make_page(runs[::-1], published)


def test_the_page_is_whole_and_loads_nothing(runs, published):
    page = make_page(runs, published)
    assert len(page.encode()) < 100_000
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:,|#)""", page)
    assert "@import" not in page and "url(" not in page
    seen = []
    parser = html.parser.HTMLParser()
    parser.handle_starttag = lambda tag, attributes: seen.append(tag)
    parser.feed(page)
    assert {"b"} == {tag for tag in seen if tag == "b"} and seen.count("b") == 2  # no markup comes from data


def test_too_many_episodes_are_left_out(runs, monkeypatch):
    monkeypatch.setattr("vlarl_bench.report.leaderboard.MOST_EPISODES", 10)
    page = make_page(runs, [])
    assert "outcomes" not in cells_of(page)[0]["tasks"][0]
    assert "too many for one page" in page


def test_the_command(runs, tmp_path, capsys, monkeypatch):
    folders = [str(run.folder) for run in runs]
    assert cli.main(["leaderboard", *folders, "--published", "", "--out", str(tmp_path / "site")]) == 0
    assert "8 runs, 0 published results" in capsys.readouterr().out
    assert (tmp_path / "site" / "index.html").stat().st_size > 10_000
    monkeypatch.chdir(tmp_path)
    assert cli.main(["leaderboard", *folders, "--out", "b"]) == 0  # outside a checkout: nobody's numbers
    assert "8 runs, 0 published results" in capsys.readouterr().out
    assert cli.main(["leaderboard", *folders, "--published", "elsewhere"]) == 2
    assert "elsewhere" in capsys.readouterr().err
    assert cli.main(["leaderboard", "--published", ""]) == 2
    assert "name at least one run folder" in capsys.readouterr().err


# In a real browser. It needs the package playwright and a Chromium of the system.

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SIZES = {"desktop": {"width": 1280, "height": 800}, "phone": {"width": 390, "height": 844}}


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install playwright"
    )
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser, runs, published, tmp_path):
    """Opens the page; whatever the console says or the page asks of the network fails the test. `strong` was timed, and
    its first seed filmed."""
    for run in runs:
        if run.manifest["algorithm"] == "strong":
            with MetricsLog(run.folder / "metrics.jsonl") as log:
                for iteration in (1, 2):
                    log.append({"iteration": iteration, "seconds": 90.0 * iteration})
    for name in ("before", "after"):
        (tmp_path / "strong0" / f"{name}.mp4").write_bytes(b"a film")
    path = tmp_path / "index.html"
    path.write_text(make_page(runs, published, tmp_path), encoding="utf-8")
    problems, contexts = [], []

    def open_page(size="desktop", scheme="light", address=""):
        context = browser.new_context(viewport=SIZES[size], color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else problems.append(r.url))
        page.goto(f"{path.as_uri()}{address}")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []


def methods(page):
    return page.locator("#table tbody button.open").all_inner_texts()


def test_sorting(visit):
    page = visit()
    # what is copied has higher scores, and stays below what was measured
    assert methods(page) == ["strong", "weak", "base policy", *["Paper <b>M</b> [RL]"] * 4]
    success = page.locator("#table thead th[data-key=rate]")
    assert success.get_attribute("aria-sort") == "descending"
    success.locator("button").click()
    assert success.get_attribute("aria-sort") == "ascending"
    assert methods(page)[:3] == ["base policy", "weak", "strong"]
    page.locator("#table thead th[data-key=change] button").click()
    assert methods(page)[:3] == ["strong", "weak", "base policy"]  # the base has no change, and comes last
    assert success.get_attribute("aria-sort") is None
    assert "sort=change" in page.url
    page.locator("#table thead th[data-key=suite] button").click()
    assert page.locator("#table tr[data-id] td:nth-child(2)").all_inner_texts()[-2:] == ["suite_c", "suite_d"]


def test_suites_and_protocols_stand_apart_and_only_clear_changes_are_coloured(browser, runs, make_run, tmp_path):
    longer = Protocol("tiny-state", 2, "state", {"suite_a": 400}, 10, 8, (0, 1), (4, 5))
    trial = Protocol("tiny-state-tuning", 2, "state", {"suite_a": 400}, 10, 8, (0, 1), (4, 5))
    same = make_run("same", base=at_most(1), final=at_most(1), algorithm="same")
    other = make_run("other", base=at_most(1), final=at_most(3), algorithm="strong", protocol=longer)
    part = make_run("part", base=at_most(1), final=at_most(8), algorithm="part", protocol=longer, skip=(4,))
    trials = [
        make_run(f"trial{i}", base=at_most(1), final=at_most(8), algorithm=f"t{i}", protocol=trial) for i in range(9)
    ]
    path = tmp_path / "groups.html"
    path.write_text(make_page([*runs, *map(read_run, (same, other, part, *trials))], []), encoding="utf-8")
    page = browser.new_page()
    page.goto(path.as_uri())
    heads = page.locator("#table tr.group").all_inner_texts()
    measured, trials = "Measured here", "Trials to choose settings, on training states"  # last, though the most
    assert [head.split(" (")[0] for head in heads] == [
        f"{kind}: suite_a, 2 of 20 tasks of suite, protocol tiny-state{which}"
        for kind, which in ((measured, "@1"), (measured, "@2"), (trials, "-tuning@2"))
    ]
    assert methods(page)[:2] == ["strong", "weak"] and methods(page)[4:7] == ["part", "strong", "base policy"]

    def change(method):
        return page.locator("#table tr[data-id]", has=page.locator(f"text=/^{method}$/")).first.locator("td").nth(2)

    assert change("strong").locator(".up").count() == 1 and "p = 0.0002" in change("strong").inner_text()
    assert change("same").locator(".up, .down").count() == 0 and "p = 1.0000" in change("same").inner_text()
    assert change("part").locator(".up, .down").count() == 0
    assert "incomplete: no interval" in change("part").inner_text()
    page.locator("#table button.open", has_text="part").click()
    assert "points; no interval: episodes are missing" in page.locator("dialog[open]").inner_text()
    page.close()


def test_filters(visit):
    page = visit()
    page.select_option("select[name=kind]", "measured")
    assert sorted(methods(page)) == ["base policy", "strong", "weak"]
    assert page.locator("#count").inner_text() == "3 of 7 scores: 3 measured, 0 copied"
    page.fill("input[name=find]", "stro")
    assert methods(page) == ["strong"]
    page.click("text=Show all")
    page.locator("#table tr[data-id]").nth(6).wait_for()
    assert page.locator("#table tr[data-id]").count() == 7
    page.select_option("select[name=suite]", "suite_d")
    assert page.locator("#table tr[data-id]").count() == 1
    assert visit(address=page.url.partition("index.html")[2]).locator("#table tr[data-id]").count() == 1


def test_a_cell_opens_by_keyboard_and_by_link(visit, tmp_path):
    page = visit()
    page.locator("#table button.open", has_text="strong").focus()
    page.keyboard.press("Enter")
    dialog = page.locator("dialog[open]")
    text = dialog.inner_text()
    for words in (
        "strong, suite_a",
        "]: 95%, resamples seeds; p = 0.0002",
        "60 successes of 64",
        "pick it up",
        "Seed 3",
        "vlarl-bench run",
        "tiny-state@1",
    ):
        assert words in text
    assert [svg.locator("path.seed").count() for svg in dialog.locator("svg").all()] == [4, 4]  # steps, wall time
    assert "depend on the machine" in text
    assert "3.0 min" in dialog.locator("svg").last.text_content()
    films = [a.evaluate("a => a.href") for a in dialog.locator("a.film").all()]
    assert films == [(tmp_path / "strong0" / f"{name}.mp4").as_uri() for name in ("before", "after")]
    link = page.url.partition("index.html")[2]
    assert "cell=strong-suite_a-" in link
    page.keyboard.press("Escape")
    assert page.locator("dialog[open]").count() == 0
    assert "cell=" not in page.url
    assert "strong, suite_a" in visit(address=link).locator("dialog[open]").inner_text()
    page.locator("#table button.open", has_text="Paper").first.click()
    assert "does not follow from its parts" in page.locator("dialog[open]").inner_text()


def test_a_method_page_opens_by_keyboard_and_by_link(visit):
    page = visit(address="#suite=suite_d&method=fpo")
    dialog = page.locator("dialog[open]")
    text = dialog.inner_text()
    for words in (
        "Lyu et al.",
        "clip_eps",
        "Nothing yet.",
        "Paper <b>M</b> [RL], suite_a",
        "97.2%",
        "docs/methods/fpo.md",
    ):
        assert words in text
    dialog.locator("button.open", has_text="suite_b").click()
    assert "cell=paper" in page.url and "method=" not in page.url
    dialog.locator("button.open", has_text="About fpo").press("Enter")
    assert "method=fpo" in page.url and "suite=suite_d" in page.url  # the filter stays
    assert dialog.locator("#close").evaluate("b => b === document.activeElement")
    page.keyboard.press("Escape")
    page.wait_for_url(lambda url: "method=" not in url)
    page.locator("#methods button", has_text="strong").press("Enter")
    assert "93.8%" in dialog.inner_text()


def test_the_theme_is_chosen(visit):
    page = visit(scheme="light")
    colour = functools.partial(page.evaluate, "getComputedStyle(document.body).backgroundColor")
    light = colour()
    page.click("#theme")
    page.click("#theme")
    assert page.locator("#theme").inner_text() == "Theme: dark"
    assert colour() != light
    page.reload()
    assert colour() != light


def test_nothing_is_wider_than_a_phone(visit):
    page = visit("phone")
    for opened in ("#table button.open >> text=strong", "#methods button >> text=/^fpo$/"):
        page.locator(opened).click()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert page.evaluate("document.querySelector('dialog').scrollWidth") <= 390
        page.click("#close")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", list(SIZES))
def test_it_is_accessible(visit, size, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install axe-playwright-python")
    page = visit(size, scheme)
    for opened in ("", "#table button.open >> text=strong", "dialog button.open >> text=About strong"):
        if opened:
            page.locator(opened).click()
        found = axe.Axe().run(page)
        assert found.violations_count == 0, found.generate_report()


def test_many_rows_are_never_read_one_by_one(runs, tmp_path, monkeypatch):
    """A million objects take longer than the whole page may; as columns they are read in a moment."""

    def refuse(self):
        raise AssertionError("rows were read one by one")

    monkeypatch.setattr("vlarl_bench.report.leaderboard.MOST_EPISODES", 0)
    monkeypatch.setattr(Rows, "__iter__", refuse)
    assert len(cells_of(make_page(runs, (), tmp_path))) == 3
