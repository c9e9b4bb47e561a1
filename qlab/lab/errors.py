"""Errors that speak to the caller: one line with what, where and the remedy."""


class UserError(Exception):
    """Bad input. The command line prints the message on one line and exits with `code`."""

    code = 2


class AllSeedsDiverged(UserError):
    """Every seed of an arm became non-finite."""

    code = 3


class Preempted(Exception):
    """A signal asked for a stop; the state is saved."""

    code = 75


def nearest(name: str, valid: list[str] | tuple[str, ...]) -> str:
    """'; did you mean X?' or '; one of X, Y, Z', ready to end an error line."""
    import difflib

    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; one of {', '.join(sorted(valid)[:12])}" if valid else ""
