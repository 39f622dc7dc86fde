"""The project's pages say what its evidence.json says: every verdict, effect and interval is computed again here."""

import pytest
from evidence import publish

from llava_patch.tools.evidence import report, run

KEPT = publish.MEASURED / run.KEPT


@pytest.fixture(scope="module")
def values():
    return run.read(KEPT)


def test_the_page_is_what_the_results_give(values):
    every = report.sections(values)
    page = (publish.MEASURED / report.TEXT).read_text()
    drawn = {}
    for section in every:
        names = sorted(report.figures_of(section.study, values), key=lambda name: page.index(f"_{name}.png"))
        drawn[section.study.name] = [f"{report.FIGURES}/{section.study.name}_{name}.png" for name in names]
    assert report.text(values, every, drawn) == page
    assert all((publish.MEASURED / path).is_file() for paths in drawn.values() for path in paths)


def test_the_readme_shows_the_same(values):
    readme = (publish.ROOT / "README.md").read_text()
    assert publish.with_block(readme, values) == readme


def test_results_are_of_three_seeds_or_more_and_the_page_says_what_is_not_there(values):
    assert values["size"] == "cpu" and values["seeds"] >= 3
    page = (publish.MEASURED / report.TEXT).read_text()
    for section in report.sections(values):
        assert section.lacking.capitalize() in page
        assert section.findings or section.lacking


def test_a_changed_result_changes_the_page(values):
    results = values["runs"]["routing/late"]
    turned = [{**one, "stock": one["vtw"]["1"]} for one in results["results"]]
    other = {**values, "runs": {**values["runs"], "routing/late": {**results, "results": turned}}}
    assert publish.block(other) != publish.block(values)


def test_a_readme_without_its_block_is_refused(values):
    with pytest.raises(ValueError, match="has no"):
        publish.with_block("# llava_patch", values)
