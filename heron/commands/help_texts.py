"""How argparse's help looks: its defaults, its width, and the brief help of the verbs with many flags."""

from __future__ import annotations

import argparse
import copy
import textwrap

from heron.config.groups import FIRST

EVERY_FLAG = "all"


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Adds each default that is a value; where there is none, the flag's own text says what happens without it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        no_value = action.default is None or action.default is False or action.default in ("", [])
        return action.help if no_value else super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names = super()._format_action_invocation(action)
        if len(names) <= self._width - self._current_indent:
            return names
        indent = " " * self._current_indent
        lines = textwrap.wrap(names, self._width - self._current_indent, break_on_hyphens=False)
        return f"\n{indent}".join(lines)


class _BriefHelp(Help):
    """Leaves the names with a prefix out."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names = super()._format_action_invocation(action).split(", ")
        return ", ".join(name for name in names if "--model." not in name)


class HelpInTwoSizes(argparse.Action):
    """--help shows the flags that most runs need and those of the verb itself; --help all shows every flag."""

    def __init__(self, option_strings, dest, **options):
        super().__init__(option_strings, argparse.SUPPRESS, nargs="?", default=argparse.SUPPRESS, **options)

    def __call__(self, parser, namespace, values, option_string=None):
        if values not in (None, EVERY_FLAG):
            raise argparse.ArgumentError(self, f"wanted {EVERY_FLAG} or nothing, got {values!r}")
        (parser if values == EVERY_FLAG else _shortened(parser)).print_help()
        parser.exit()


def _shortened(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """A copy that shows the usual settings and the verb's own flags alone."""
    parser = copy.deepcopy(parser)
    verb_flags = [*parser._optionals._group_actions, *parser._positionals._group_actions]
    for group in parser._action_groups:
        group.description = None
        for action in group._group_actions:
            if action not in verb_flags and action.dest not in FIRST:
                action.help = argparse.SUPPRESS
    parser.formatter_class = _BriefHelp
    also = ", RWKV-LM's names too" if any(action.dest.startswith("rwkv_lm.") for action in parser._actions) else ""
    parser.epilog = f"`{parser.prog} --help {EVERY_FLAG}` lists every flag{also}"
    return parser
