"""The command line: ``python -m flashmla_hf doctor``."""

from __future__ import annotations

import argparse
import sys


def main(arguments: list[str] | None = None) -> int:
    """Runs one subcommand and returns the exit code; without one, prints the help."""
    parser = argparse.ArgumentParser(
        prog="python -m flashmla_hf",
        description='Exact, memory-efficient attention for Hugging Face Transformers: attn_implementation="flashmla".',
    )
    commands = parser.add_subparsers(dest="command", title="commands", metavar="")
    doctor = commands.add_parser(
        "doctor",
        help="versions, what was built, what runs here, a self-test; exit code 0 if all is well",
        description="Reports versions, what was built, which implementations run here and why others do not, and "
        "whether they compute attention; exits with 0 if all is well, with 1 if something is wrong.",
    )
    doctor.add_argument("--json", action="store_true", help="print the report as JSON")
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0

    from flashmla_hf import doctor as command  # imports torch, which --help does not need

    return command.main(as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
