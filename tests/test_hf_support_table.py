"""The support table says what the parity suite proved, for the families it has today."""

import json

import support_table
from families import FAMILIES


def test_the_results_are_of_todays_families():
    results = json.loads(support_table.RESULTS.read_text())
    assert set(results["families"]) == {family.name for family in FAMILIES}
    assert len(FAMILIES) >= 30
    for family in FAMILIES:
        features = set(results["families"][family.name]["features"])
        assert {f"padding {padding}" for padding in family.paddings} <= features
        assert {f"fails with {name}" for name in family.wrong} <= features
        assert not family.generates or {"generate dynamic", "generate beams"} <= features


def test_the_page_shows_the_results():
    text = support_table.PAGE.read_text()
    table = support_table.render(json.loads(support_table.RESULTS.read_text()))
    assert support_table.block(text) == table, "run: python tests/support_table.py"
