"""Errors that a user caused and can correct, each one sentence with a next step."""


class UserError(Exception):
    """Bad input. The command line prints the message alone and exits with ``exit_code``.

    The message names what was given, what was expected and what to do next.
    """

    exit_code = 2


class UnknownName(UserError):
    """A name that no registry knows, with the nearest names that exist."""


class Busy(UserError):
    """Another process is writing the same result."""


class StorageError(UserError):
    """The result folder cannot be written (any more): no use in computing further cells."""


def did_you_mean(kind: str, name: str, known: list[str], *, hint: str = "") -> UnknownName:
    """Build the error for an unknown ``name``: the closest known names, else all of a short list."""
    from difflib import get_close_matches

    close = get_close_matches(name.lower(), [k.lower() for k in known], n=3, cutoff=0.6)
    by_lower = {k.lower(): k for k in known}
    if close:
        advice = "did you mean " + " or ".join(repr(by_lower[c]) for c in close) + "?"
    elif len(known) <= 12 or (kind.startswith("option") and not hint):  # of options there is no list elsewhere
        advice = "known: " + ", ".join(sorted(known)) + "."
    else:
        advice = hint or f"`vlmdefend list {kind}s` shows all {len(known)}."
    return UnknownName(f"unknown {kind} {name!r}; {advice}" + (f" {hint}" if hint and hint not in advice else ""))
