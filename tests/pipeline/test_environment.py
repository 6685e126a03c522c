"""What a result depends on besides its config."""

from importlib import metadata

import pytest

from latent_tts.pipeline import code, environment


@pytest.fixture
def not_installed(monkeypatch):
    """A checkout that runs without being installed."""

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    known = metadata.version
    monkeypatch.setattr(environment, "version", lambda name: missing(name) if name == "latent-tts" else known(name))
    monkeypatch.setattr(code, "requires", missing)
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
