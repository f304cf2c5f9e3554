"""How many examples Hypothesis draws: all of them in the full run, else a quarter."""

from __future__ import annotations

from hypothesis import settings

_ALL, _QUARTER = 100, 25


def draw_fewer() -> None:
    """For the run without the tests marked ``full``, before tests are imported."""
    settings.register_profile("quarter", settings(), max_examples=_QUARTER)
    settings.load_profile("quarter")


def examples(count: int) -> int:
    """The ``max_examples`` of a test that draws ``count`` in the full run."""
    return max(1, count * min(settings().max_examples, _ALL) // _ALL)
