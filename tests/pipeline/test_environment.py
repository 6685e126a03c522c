"""What a result depends on besides its config."""

from importlib import metadata

import pytest

from latent_tts.pipeline import code, environment


@pytest.fixture
def not_installed(monkeypatch):
    """A checkout that runs without being installed."""

    known = metadata.distributions
    for module in (environment, code):
        monkeypatch.setattr(module, "distributions", lambda name: known(name=name) if name != "latent-tts" else [])
    for cached in (environment.versions, code._own_libraries):
        cached.cache_clear()
    yield
    for cached in (environment.versions, code._own_libraries):
        cached.cache_clear()


@pytest.mark.usefixtures("not_installed")
def test_a_checkout_runs_without_being_installed(run):
    assert run("n=2", "sampler=gaussian", "scorer=none").code == 0
    assert environment.versions(quantized=False)["latent-tts"] == "not installed"
    assert code._own_libraries() == frozenset()
