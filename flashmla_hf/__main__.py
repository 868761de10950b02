"""The command line: ``flashmla COMMAND``, the same as ``python -m flashmla_hf COMMAND``."""

from __future__ import annotations

import argparse
import importlib
import sys

# Commands that read their own options -> the module whose main(argv) runs them, and a line for the help.
_TRAINING = {
    "finetune": ("flashmla_hf.training.finetune", "train a model, or a LoRA adapter, on long documents"),
    "max-length": ("flashmla_hf.training.finetune", "find the longest context whose training step fits"),
    "memory": ("flashmla_hf.training.memory", "measure memory and time of a training step"),
    "ledger": ("flashmla_hf.training.ledger", "predict the memory of a training step, term by term"),
}
_WITHOUT_EXTRA = ("ledger", "check")  # need Transformers alone


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns the exit code; without one, prints the help."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in _TRAINING:
        return _run_training(arguments[0], arguments[1:])
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command == "doctor":
        from flashmla_hf import doctor  # imports torch; the help does not wait for it

        return doctor.main(as_json=options.json)
    if options.command == "check":
        if _lacks_packages("check"):
            return 1
        from flashmla_hf import check_command

        return check_command.main(options.model)
    parser.print_help()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flashmla",
        description='Exact, memory-efficient attention for Hugging Face Transformers: attn_implementation="flashmla".',
        epilog="flashmla COMMAND --help describes a command. python -m flashmla_hf COMMAND is the same.",
    )
    commands = parser.add_subparsers(dest="command", title="commands", metavar="command")
    for name, (_, line) in _TRAINING.items():
        commands.add_parser(name, help=line, add_help=False)
    check = commands.add_parser(
        "check",
        help="which attention layers of a model use the kernel, and why others do not",
        description="Builds the model without its weights and reports which of its attention layers use the flashmla "
        "kernel, and why others do not. Exits with 0 if all do, with 1 otherwise.",
    )
    check.add_argument("model", metavar="MODEL", help="a folder with config.json, or a name on the Hub")
    doctor = commands.add_parser(
        "doctor",
        help="versions, what was built, what runs here, a self-test; exit code 0 if all is well",
        description="Reports versions, what was built, which implementations run here and why others do not, and "
        "whether they compute attention. Exits with 0 if all is well, with 1 if something is wrong.",
    )
    doctor.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser


def _lacks_packages(command: str) -> bool:
    """Whether packages that ``command`` needs are not installed; says which, and how to install them."""
    from flashmla_hf import training

    missing = training.missing_packages()
    needed = [name for name in missing if name == "transformers"] if command in _WITHOUT_EXTRA else missing
    if needed:
        print(f"flashmla {command}: not installed: {', '.join(needed)}. Run: {training.EXTRA}", file=sys.stderr)
    return bool(needed)


def _run_training(command: str, arguments: list[str]) -> int:
    if _lacks_packages(command):
        return 1
    try:
        module = importlib.import_module(_TRAINING[command][0])
    except KeyboardInterrupt:  # torch and Transformers take seconds
        print(f"flashmla {command}: interrupted before it began; nothing was read or written", file=sys.stderr)
        return 130
    if command == "max-length":
        module.main(arguments, command)
    else:
        module.main(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
