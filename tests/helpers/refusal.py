"""What a command says to a mistake of the user's."""


def check(result, *words: str) -> None:
    """One to four lines that hold `words`, exit 2, no table."""
    assert result.code == 2, result.err
    log = ("INFO", "WARNING", "Error executing job")
    lines = [line for line in result.err.splitlines() if line and not line.startswith(log)]
    assert 1 <= len(lines) <= 4, result.err
    assert "Traceback" not in result.err
    assert "metrics.csv" not in result.out
    for word in words:
        assert word in " ".join(lines), f"{word!r} not in {lines}"
