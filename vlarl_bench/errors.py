"""The exceptions that a user is meant to see."""


class BenchError(Exception):
    """A mistake that the user can mend.

    Its text is one line that names the field, the value and what would be right. The command line prints that line
    and exits with status 2; any other exception is a bug of ours.
    """


class Diverged(BenchError):
    """Training has destroyed the policy. A run stops there, and that is its result: it is scored as it last was."""


def install(extra: str) -> str:
    """What to run where the packages of one of this project's extras are missing."""
    return f"run, in the checkout: pip install -c constraints.txt -e '.[{extra}]'"
