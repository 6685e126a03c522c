"""The page of `ltts trace` in a browser: no complaint, nothing fetched, keys, clicks, a phone, light and dark."""

import pytest
from browser import browser, chromium

pytestmark = pytest.mark.slow
PROGRAM = chromium()
needs_chromium = pytest.mark.skipif(PROGRAM is None, reason="no Chromium (apt-get install chromium)")


@pytest.fixture
def opened(ltts, tmp_path):
    """A page of two questions with a hostile name, open in a browser, and its path."""
    assert PROGRAM is not None
    name = "</script><script>document.title = 'gone'; throw 1</script>"
    line = ["task=arith", "task.limit=2", f"model.name='{name}'".replace("'gone'", r"\'gone\'"), "schedule=speculative"]
    made = ltts("trace", *line, "n=6", "directions=2")
    assert made.code == 0, made.err
    with browser(PROGRAM, tmp_path / "profile") as page:
        yield page, made.last.resolve()
        assert not page.complaints
        assert page.requests == [made.last.resolve().as_uri()] * len(page.requests)


def pressed(page, question=0) -> list[str]:
    """What is pressed: the step of the map, and the rollout."""
    here = f"document.querySelector('#question-{question} "
    return [page.run(f"{here}{place} [aria-pressed=true]').textContent") for place in (".controls .group", ".rollouts")]


@needs_chromium
def test_figures_are_drawn_and_texts_stay_texts(opened):
    page, path = opened
    page.open(path, 1400, 1000)
    assert page.run("document.title").startswith("Trace: </script><script>")
    for name, least in {"map": 40, "lens": 30, "scores": 12, "spread": 24, "timeline": 30, "graph": 12}.items():
        figure = f"document.querySelector('#question-1 [data-figure={name}]')"
        assert page.run(f"{figure}.querySelectorAll('*').length") >= least, name
    assert page.run(
        "[...document.querySelectorAll('svg *')].every((each) => !/NaN|undefined|Infinity/.test(each.outerHTML))"
    )
    assert page.run("document.querySelectorAll('script').length") == 2


@needs_chromium
def test_every_column_is_in_sight_on_a_desktop(opened):
    page, path = opened
    page.open(path, 1280, 900)
    hidden = "[...document.querySelectorAll('.scroll')].map((each) => each.scrollWidth - each.clientWidth)"
    lens, spells, rollouts = page.run(hidden)[:3]
    assert lens <= 0
    assert spells <= 0
    assert rollouts > 0  # of two questions side by side
    page.run("document.querySelector('#question-1').remove()")
    assert max(page.run(hidden)) <= 0


@needs_chromium
def test_keys_and_clicks_choose_rollouts_latents_and_questions(opened):
    page, path = opened
    page.open(path, 1400, 1000)
    before = pressed(page)
    assert before[0] == "all"
    page.press("g", "ArrowRight", "ArrowRight")
    assert pressed(page) == ["2", "greedy"]
    status = "document.querySelector('#question-0 .status').textContent"
    assert page.run(status).startswith("deterministic rollout: ")
    page.press("ArrowDown")
    assert pressed(page) == ["2", "0"]
    page.press("ArrowUp", "ArrowUp")
    assert pressed(page) == ["2", "5"]
    rings = "document.querySelectorAll('#question-0 [data-figure=map] .ring').length"
    assert page.run(rings) == 6
    page.press("a")
    assert page.run(rings) == 0
    page.press("n", "ArrowLeft")
    assert pressed(page) == ["2", "5"]
    assert pressed(page, 1)[0] == "6"
    page.run("document.querySelector('#question-1 .rollouts tr[data-rollout=\"4\"] td').click()")
    assert pressed(page, 1) == ["6", "4"]
    page.run("document.querySelector('#question-1 .bar button:last-child').click()")
    assert pressed(page, 1) == ["6", "5"]


@needs_chromium
def test_everything_can_be_reached_by_tab_and_is_named(opened):
    page, path = opened
    page.open(path, 1400, 1000)
    page.press("Tab")
    assert page.run("document.activeElement.textContent") == "Skip to the questions"
    seen = set()
    for _ in range(60):
        page.press("Tab")
        seen.add(
            page.run("document.activeElement.closest('article, .bar')?.className ?? document.activeElement.tagName")
        )
    assert {"bar", "card map", "card lens", "card rollouts", "SUMMARY"} <= seen
    named = "document.querySelectorAll('svg[role=img], [role=region], .controls [role=group]')"
    assert page.run(f"[...{named}].every((each) => each.getAttribute('aria-label'))")


@needs_chromium
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_a_phone_light_and_dark(opened, dark):
    page, path = opened
    page.open(path, 390, 844, dark=dark)
    assert page.run("document.documentElement.scrollWidth") <= 390
    heights = "[...document.querySelectorAll('.controls button')].map((each) => each.getBoundingClientRect().height)"
    assert min(page.run(heights)) >= 30
    colours = page.run("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]")
    brightness = [sum(map(int, colour[4:-1].split(", "))) for colour in colours]
    assert (brightness[0] < brightness[1]) == dark


@needs_chromium
def test_a_page_of_many_latents_fits_too(ltts, tmp_path):
    assert PROGRAM is not None
    made = ltts("trace", "--example", "model=demo_pccot24", "n=2", "scorer=none")
    assert made.code == 0, made.err
    with browser(PROGRAM, tmp_path / "profile") as page:
        for width in (1280, 390):
            page.open(made.last.resolve(), width, 900)
            assert page.run("document.documentElement.scrollWidth") <= width
            inside = "[...document.querySelectorAll('.controls button')].every((each) => each.scrollHeight < 40)"
            assert page.run("document.querySelectorAll('.controls [data-step]').length") == 25
            assert page.run(inside), "numbers are not broken into lines"
        assert not page.complaints
