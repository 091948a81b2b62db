"""The table in the documentation is the cost model's."""

from __future__ import annotations

from pathlib import Path

from foreshock.guard.consensus import Share
from tests.ranks.cost_model import COSTS, SHARE, table


def test_the_documentation_has_the_table() -> None:
    page = (Path(__file__).parents[2] / "docs" / "ranks.md").read_text()
    assert f"<!-- costs -->\n{table()}\n<!-- end -->" in page


def test_a_share_is_as_large_as_the_model_says() -> None:
    assert 8 * len(Share()) == SHARE


def test_only_what_names_a_rank_by_majority_or_by_pace_grows_with_the_ranks() -> None:
    grows = [c.what for c in COSTS if c.sizes(10_000, 1000) != c.sizes(2, 1000)]
    assert grows == ["rollback, copies that differ named", "step that tells of a slow rank"]
