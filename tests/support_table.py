"""The support table of docs/support.md, from the results of the parity suite.

    FLASHMLA_SUPPORT_JSON=tests/support.json python -m pytest tests/test_hf_parity.py    # measures, writes the JSON
    python tests/support_table.py                                                       # writes the table into
    docs/support.md

tests/test_hf_support_table.py fails when the families, the JSON and the page disagree.
"""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "tests" / "support.json"
PAGE = ROOT / "docs" / "support.md"
BEGIN, END = "<!-- support:begin -->", "<!-- support:end -->"


def render(results: dict) -> str:
    """The table as Markdown, one row per family in the order of families.py."""
    from families import FAMILIES

    lines = [
        f"Measured with transformers {results['transformers']}, torch {results['torch']} on {results['device']}, fp32: "
        f"{len(results['families'])} families equal eager attention (tolerance {results['tolerance']:g}) in logits, "
        f"loss and "
        "the gradient of every parameter, and in every generated token. *Calls* are those of one forward pass that the "
        "fused kernel answers, of all.",
        "",
        "| family | padding | generation | packed rows | calls | remarks |",
        "|---|---|---|---|---|---|",
    ]
    for family in FAMILIES:
        result = results["families"][family.name]
        features, calls = result["features"], result["calls"]

        def named(prefix, features=features):
            return (
                ", ".join(f.removeprefix(prefix) for f in features if f.startswith(prefix) and "none" not in f) or "–"
            )

        kernel = sum(calls.get(name, 0) for name in ("cpu", "sm90", "torch_flash", "flex"))
        packed = "yes" if "packed" in features else "–"
        lines.append(
            f"| {family.name} | {named('padding ')} | {named('generate ')} | {packed} | {kernel} of "
            f"{sum(calls.values())} | "
            f"{family.note or ''} |"
        )
    return "\n".join(lines)


def block(text: str) -> str:
    """The text between the markers."""
    return text.split(BEGIN, 1)[1].split(END, 1)[0].strip()


def main() -> None:
    text = PAGE.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"{PAGE} has no markers {BEGIN} and {END}")
    head, rest = text.split(BEGIN, 1)
    tail = rest.split(END, 1)[1]
    PAGE.write_text(f"{head}{BEGIN}\n{render(json.loads(RESULTS.read_text()))}\n{END}{tail}")


if __name__ == "__main__":
    main()
