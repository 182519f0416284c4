"""What all commands share: a parser made from a config dataclass, logging, exit codes.

Exit codes: 0 done; 1 anything else; 2 bad usage or config; 3 too many clips quarantined;
4 cache does not match; 75 stopped by SIGTERM; 130 interrupted from the keyboard.
"""

import argparse
import dataclasses
import difflib
import logging
import os
import re
import signal
import sys
import textwrap
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from ..shards.errors import DeltatokError, Stopped, UsageError
from ..shards.interrupts import StopRequest
from .config import apply_settings, build_config, field_docs, read_yaml

Config = TypeVar("Config")
SHORT_FLAGS = {"num_windows": "--windows"}
"""Fields whose flag is shorter than their name; the long one works too."""
MAX_USAGE_LINES = 5
"""Of a usage that is printed behind an error."""
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class Parser(argparse.ArgumentParser):
    """argparse, but a usage error is a UsageError like every other one."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of exiting, so that one place prints errors and picks the exit code."""
        usage = self.format_usage().strip()
        if usage.count("\n") >= MAX_USAGE_LINES:  # the message would scroll out of sight
            usage = ""
        lines = [f"{message}{self._nearest(message)}", usage, f"try: {self.prog} --help"]
        raise UsageError("\n".join(filter(None, lines)))

    def _nearest(self, message: str) -> str:
        """The flag that an unknown one may have been meant for."""
        unknown = re.search(r"^unrecognized arguments: (--[\w-]+)", message)
        near = difflib.get_close_matches(unknown[1], self._option_string_actions) if unknown else ()
        return f"; did you mean {near[0]}?" if near else ""


def run_command(body: Callable[[], None]) -> int:
    """Run one command's body; print its error, if any, and give the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("httpx", "accelerate", "matplotlib", "fontTools"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        # From the first import on; what a run may not be torn out of takes the signal itself.
        with StopRequest(signals=(signal.SIGTERM,)) as stop, stop.at_once():
            body()
    except (DeltatokError, Stopped) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # `deltatok-shards info DIR | head` is no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def run_subcommand(
    prog: str, kinds: Mapping[str, Callable[[list[str]], None]], usage: str, words: list[str]
) -> None:
    """Run the one of `kinds` that the first word names with the words after it."""
    if not words or words[0] in ("-h", "--help"):
        print(usage)
    elif words[0] in kinds:
        kinds[words[0]](words[1:])
    else:
        raise UsageError(f"{prog} {words[0]}: wanted one of {', '.join(kinds)}\n{usage}")


def example_help(*lines: str) -> dict[str, Any]:
    """What a parser is told to end its help with these example commands."""
    epilog = "\n  ".join(("example:" if len(lines) == 1 else "examples:", *lines))
    return {"epilog": epilog, "formatter_class": argparse.RawDescriptionHelpFormatter}


def config_parser(prog: str, config_type: type, *, summary: str, example: str) -> Parser:
    """A parser with one flag for every top-level field of `config_type`, and --config, --set."""
    parser = Parser(prog=prog, description=summary, **example_help(example))
    add_config_flags(parser, config_type)
    return parser


def add_config_flags(parser: argparse.ArgumentParser, config_type: type) -> None:
    """Add --config, --set and a flag for each field; nested dataclasses are reached by --set."""
    parser.add_argument("--config", metavar="FILE", help="YAML file with the same names")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY.SUB=VALUE",
        help="any setting, also nested",
    )
    docs, hints = field_docs(config_type), typing.get_type_hints(config_type)
    # What must be given comes first, wherever in the dataclasses it stands.
    fields = sorted(dataclasses.fields(config_type), key=_has_default)
    for field in fields:
        hint, flags = hints[field.name], [f"--{field.name.replace('_', '-')}"]
        if field.name in SHORT_FLAGS:
            flags.insert(0, SHORT_FLAGS[field.name])
        text = f"{docs.get(field.name, '')}{shown_default(field)}".replace("%", "%%")
        if hint is bool:
            action: Any = argparse.BooleanOptionalAction
            parser.add_argument(*flags, dest=field.name, action=action, default=None, help=text)
        elif dataclasses.is_dataclass(hint):
            parser.epilog = f"{parser.epilog or ''}\n\n{nested_help(field, hint)}"
        else:
            many = typing.get_origin(hint) is tuple
            parser.add_argument(
                *flags,
                dest=field.name,
                nargs="+" if many else None,
                default=None,
                metavar=_choices(hint) or field.name.upper(),
                help=text,
            )


def shown_default(field: "dataclasses.Field[Any]") -> str:
    """The default in brackets, as one would type it; nothing where it is None."""
    if not _has_default(field):
        return " [required]"
    if field.default is None or field.default is dataclasses.MISSING:
        return ""
    if isinstance(field.default, tuple):
        items = (f"{item:.4g}" if isinstance(item, float) else str(item) for item in field.default)
        return f" [{' '.join(items) or 'none'}]"
    return f" [{field.default}]"


def nested_help(field: "dataclasses.Field[Any]", config_type: Any) -> str:
    """The settings of a config within a config, which --set reaches: name, meaning, default."""
    docs = field_docs(config_type)
    lines = [f"settings of {field.name}, by --set {field.name}.KEY=VALUE or a config file:"]
    for inner in dataclasses.fields(config_type):
        text = f"{docs.get(inner.name, '')}{shown_default(inner)}"
        indent = " " * 24
        wrapped = textwrap.fill(text, 80, initial_indent=indent, subsequent_indent=indent)
        name = f"  {inner.name}"
        fits = len(name) < len(indent) - 1
        lines.append(name + wrapped[len(name) :] if fits else f"{name}\n{wrapped}")
    return "\n".join(lines)


def _choices(hint: Any) -> str | None:
    """ "{a,b}" for a Literal, and "{true,false}" for a bool that may be None; else None."""
    inner = [part for part in typing.get_args(hint) if part is not type(None)]
    if typing.get_origin(hint) is typing.Literal:
        return f"{{{','.join(map(str, inner))}}}"
    if inner == [bool]:
        return "{true,false}"
    return _choices(inner[0]) if len(inner) == 1 else None


def _has_default(field: "dataclasses.Field[Any]") -> bool:
    missing = dataclasses.MISSING
    return field.default is not missing or field.default_factory is not missing


def config_from_arguments(config_type: type[Config], arguments: argparse.Namespace) -> Config:
    """The config that defaults, --config, flags and --set make together (later wins)."""
    values = read_yaml(Path(arguments.config)) if arguments.config else {}
    for field in dataclasses.fields(config_type):  # type: ignore[arg-type]
        given = getattr(arguments, field.name, None)
        if given is not None:
            values[field.name] = given
    apply_settings(values, arguments.set)
    return build_config(config_type, values, where=arguments.config or "command line")


def parse_config(
    config_type: type[Config], argv: Sequence[str], *, prog: str, summary: str, example: str
) -> Config:
    """Parse `argv` straight into a `config_type`."""
    parser = config_parser(prog, config_type, summary=summary, example=example)
    return config_from_arguments(config_type, parser.parse_args(argv))
