"""The arithmetic of maps, drift and dependency chains, and the page: what it holds, and that texts stay texts."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from traces import LATENTS, WIDTH, made, rollouts

from latent_tts.results.trace import draw_map, drift_and_spread, principal_components
from latent_tts.results.trace_page import json_in_html, render_page

HOSTILE = [
    "</script><script>alert(1)</script>", "<!--<script>", "<img src=x onerror=alert(1)>", "{{ 7 * 7 }}", "{% raw %}",
    "\" onmouseover='x'", "&lt;b&gt; & \u2028\u2029", "</title></style>", "\x1b[31m", "https://example.org/",
]  # fmt: skip


class Parsed(HTMLParser):
    """The elements of a page with their attributes, and the texts in them."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.texts, self.open = [], {}, []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.open.append(len(self.elements) - 1)

    def handle_data(self, data):
        here = self.open[-1] if self.open else None
        self.texts[here] = self.texts.get(here, "") + data

    def handle_endtag(self, tag):
        while self.elements[self.open.pop()][0] != tag:
            pass

    def named(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def everything(self):
        return "\n".join(self.texts.values())

    @property
    def data(self):
        [place] = [place for place, (_, attributes) in enumerate(self.elements) if attributes.get("id") == "trace-data"]
        return json.loads(self.texts[place])


@given(arrays(np.float64, st.tuples(st.integers(1, 7), st.integers(1, 5)), elements=st.floats(-9, 9, width=16)))
def test_axes_are_the_eigenvectors_of_largest_variance(values):
    points, explained = principal_components(values)
    np.testing.assert_allclose(points.mean(0), 0, atol=1e-12)
    covariance = (values - values.mean(0)).T @ (values - values.mean(0))
    highest = [*np.linalg.eigvalsh(covariance)[::-1], 0][:2]
    np.testing.assert_allclose(np.square(points).sum(0), highest, atol=1e-8)
    total = np.trace(covariance)
    np.testing.assert_allclose(explained, np.array(highest) / total if total else [0, 0], atol=1e-8)


def test_a_map_leaves_out_what_a_rollout_does_not_have():
    own = [rollouts("a", 3), rollouts("b", 1, seed=1)]
    everything, second = draw_map("pca", own), draw_map("pca", own, 2)
    assert [points.shape for points in everything.points] == [(3, LATENTS, 2), (1, LATENTS, 2)]
    assert np.isnan(everything.points[0][1, 2]).all()
    assert np.isfinite(np.delete(everything.points[0].reshape(-1, 2), 5, 0)).all()
    assert [points.shape for points in second.points] == [(3, 1, 2), (1, 1, 2)]
    flat = np.concatenate([each.latents_NTD.reshape(-1, WIDTH)[: each.steps_N.sum()] for each in own[1:]])
    points = everything.points[1].reshape(-1, 2)
    for one in range(LATENTS):  # a projection never makes distances larger
        for other in range(LATENTS):
            assert np.linalg.norm(points[one] - points[other]) <= np.linalg.norm(flat[one] - flat[other]) + 1e-6


def test_neighbours_stay_neighbours_and_nothing_is_random():
    pytest.importorskip("sklearn")
    far = replace(rollouts("a", 12), steps_N=np.full(12, LATENTS))
    far.latents_NTD[:] = (
        0.01 * np.random.default_rng(0).normal(size=far.latents_NTD.shape) + np.arange(12).reshape(-1, 1, 1) // 6 * 50
    )
    one, other = (draw_map("tsne", [far]).points[0] for _ in range(2))
    np.testing.assert_array_equal(one, other)
    left, right = one[:6].reshape(-1, 2), one[6:].reshape(-1, 2)
    across = np.linalg.norm(left[:, None] - right[None], axis=-1).min()
    assert across > 0.5 * max(np.linalg.norm(side - side.mean(0), axis=1).max() for side in (left, right))
    assert draw_map("tsne", [far]).explained_2 is None


def test_drift_is_free_of_the_chance_of_few_rollouts():
    generator, anchor = np.random.default_rng(0), np.ones((1, 50))
    steps = np.ones(8, dtype=int)
    found = []
    for _ in range(400):
        noise = generator.normal(size=(8, 1, 50))
        unmoved, spread = drift_and_spread(anchor + noise, steps, anchor)
        moved, _ = drift_and_spread(anchor + noise + 0.5, steps, anchor)
        found.append([unmoved[0] ** 2, moved[0] ** 2, spread[0] ** 2])
    unmoved, moved, spread = np.mean(found, axis=0)
    assert spread == pytest.approx(1, rel=0.02)
    assert moved == pytest.approx(0.25, rel=0.05)
    assert unmoved < 0.02  # the plain distance of the means would be 1 / 8
    nothing = drift_and_spread(np.ones((1, 1, 50)), np.ones(1, dtype=int), anchor)
    assert np.isnan(nothing).all()


@given(st.recursive(st.text() | st.sampled_from(HOSTILE), lambda inner: st.lists(inner, max_size=3)))
def test_data_in_a_script_can_neither_end_it_nor_begin_another(value):
    written = json_in_html(value)
    assert not set("<>&\u2028\u2029") & set(written)
    assert json.loads(written) == value


@pytest.mark.every_other
@pytest.mark.parametrize("text", HOSTILE)
def test_texts_are_texts_on_the_page(text):
    harmless, hostile = Parsed(render_page(made())), Parsed(render_page(made(text)))
    assert [tag for tag, _ in hostile.elements] == [tag for tag, _ in harmless.elements]
    for _, attributes in hostile.elements:
        assert not [name for name in attributes if name.startswith("on")]
    assert hostile.data["vocabulary"]["0"] == text
    assert hostile.data["questions"][0]["samplers"][0]["name"] == f"{text} 0"
    assert hostile.everything.count(text) >= 8


def test_the_page_loads_nothing():
    page = render_page(made())
    assert not re.findall(r"https?:|//\w+\.\w+|@import|url\(|fetch\(|XMLHttpRequest|innerHTML|eval\(", page)
    parsed = Parsed(page)
    assert not [each for _, each in parsed.elements if {"src", "srcset", "action"} & set(each)]
    assert {each["href"] for _, each in parsed.elements if "href" in each} == {"#questions"}
    assert not {"link", "img", "iframe", "object", "embed", "form", "base"} & {tag for tag, _ in parsed.elements}
    [policy] = [each["content"] for each in parsed.named("meta") if "http-equiv" in each]
    assert policy.startswith("default-src 'none';")
    assert re.search(r"script-src 'sha256-[\w+/]+=*';", policy)


def test_the_page_holds_every_view_and_a_row_per_rollout():
    parsed = Parsed(render_page(made()))
    figures = {attributes["data-figure"] for _, attributes in parsed.elements if "data-figure" in attributes}
    assert figures == {"map", "lens", "scores", "spread", "timeline", "graph"}
    rows = [each for each in parsed.named("tr") if "data-rollout" in each]
    assert [(each["data-sampler"], each["data-rollout"]) for each in rows] == [
        ("2", "0"),
        *(("0", str(i)) for i in range(4)),
    ]
    assert len([each for each in parsed.named("button") if each.get("aria-pressed") == "false"]) == 5
    [question] = parsed.data["questions"]
    assert question["samplers"][0]["tokens"][1] == [[0, 1], [0, 1], [-1, -1]]
    assert question["samplers"][0]["stepScores"][1][2] is None
    assert question["selected"] == 0
    assert "in colour the critical path, 3 of 3 latents" in " ".join(parsed.everything.split())
    assert "votes: 0 (2), 1 (2)" in {each.get("aria-label") for each in parsed.named("div")}


def test_the_page_says_what_there_is_not():
    trace = made(gold=None, scored=False)
    question = replace(trace.questions[0], dependencies=None, maps=[])
    parsed = Parsed(render_page(replace(trace, questions=[question], no_dependencies="directions=0", scorer=None)))
    assert "No scorer, so no scores." in parsed.everything
    assert "directions=0" in parsed.everything
    assert "right answer" not in parsed.everything
    assert {each.get("class") for each in parsed.named("span")} - {None, "result"} == {"vote voted", "vote other"}
