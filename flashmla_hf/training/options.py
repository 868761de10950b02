"""Options of the commands: numbers with a least value, and YAML files of options."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Iterable
from pathlib import Path

LARGEST_COUNT = 2**63 - 1  # of torch; far below what a float takes


def at_least(least: int) -> Callable[[str], int]:
    """For argparse: a whole number of at least ``least`` that a tensor could have as its size."""

    def whole_number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"expected at least {least}, got {value}")
        if value > LARGEST_COUNT:
            raise argparse.ArgumentTypeError(f"expected at most {LARGEST_COUNT}, got a number of {len(text)} digits")
        return value

    return whole_number


def unknown_option(name: str, known: Iterable[str]) -> str:
    """The sentence about an option that is not one of ``known``, with the nearest of them if one is near."""
    known = [*known]
    longer = [other for other in known if other.startswith(name)]
    near = longer or difflib.get_close_matches(name, known, 1)
    if near:
        return f"unknown option {name!r}; did you mean {near[0]!r}? --help lists the options"
    return f"unknown option {name!r}; --help lists the options"


def check_names(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    """Raises ValueError, one sentence, for the first ``--option`` of ``argv`` that ``parser`` does not have.

    argparse would name an option that is missing first, and HfArgumentParser lists words without a hint.
    """
    known = parser._option_string_actions
    for word in argv:
        name = word.partition("=")[0]
        if word.startswith("--") and name not in known:
            # Each option is also known with dashes inside: as the caller writes it.
            alike = [option for option in known if ("-" in option[2:]) <= ("-" in name[2:])]
            raise ValueError(unknown_option(name, alike))


def set_defaults(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    """Makes the options of the YAML file that ``--config`` names in ``argv`` the defaults of ``parser``.

    Options with such a default are no longer required. Raises ValueError, one sentence, if the file cannot be read or a
    value is not one that the command line would accept.
    """
    # The file must be known before the parser can tell what is missing.
    config_only = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config_only.add_argument("--config")
    path = config_only.parse_known_args(argv)[0].config
    if path is None:
        return
    import yaml  # of the extra; only a file needs it

    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise ValueError(f"--config {path}: expected lines of 'option: value', got {type(found).__name__}")
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    for name, value in found.items():
        if name not in actions:
            raise ValueError(f"--config {path}: {unknown_option(name, actions)}")
        action = actions[name]
        try:
            action.default = _value(action, value)
        except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
            raise ValueError(f"--config {path}: {name}: {error}") from None
        action.required = False


def _value(action: argparse.Action, value: object) -> object:
    """``value`` as the command line would read it."""
    if value is None:
        if action.default is not None or action.required:
            raise ValueError("expected a value, got none")
        return None
    if action.nargs in ("+", "*"):
        return [_one(action, item) for item in (value if isinstance(value, list) else [value])]
    if action.nargs == 0:  # a switch
        if not isinstance(value, bool):
            raise ValueError(f"expected true or false, got {value!r}")
        return value
    return _one(action, value)


def _one(action: argparse.Action, value: object) -> object:
    if not isinstance(value, (str, int, float)):
        raise ValueError(f"expected one value, got {value!r}")
    # YAML reads 2e-4 as a string and 1 as an integer: the option's own type decides.
    try:
        converted = action.type(str(value)) if action.type else str(value)
    except ValueError:
        raise ValueError(f"expected {getattr(action.type, '__name__', 'a value')}, got {value!r}") from None
    if action.choices is not None and converted not in action.choices:
        raise ValueError(f"expected one of {', '.join(map(str, action.choices))}, got {value!r}")
    return converted
