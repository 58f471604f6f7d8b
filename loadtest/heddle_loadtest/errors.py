"""The errors that keep a load test from starting. Knows no option names: the command line adds those.

    LoadTestError        the run cannot start: which setting, what is wrong, what to do
    ├── SpecError        a setting is wrong whatever the target
    └── TargetError      the target is down, is no OpenAI server, or lacks what the run asks for

A request that fails during a run is no exception: it is a `RequestError` inside its `RequestResult`.
"""


class LoadTestError(Exception):
    """Base of all errors of this package."""

    def __init__(self, field: str, value: object, problem: str, remedy: str) -> None:
        """`value` is None where showing it would be wrong (an API key)."""
        self.field = field
        self.value = value
        self.problem = problem
        self.remedy = remedy
        super().__init__(self.describe(field))

    def describe(self, name: str) -> str:
        """The whole message, the setting called `name` (a field's name, or the option's name on a command line)."""
        shown_value = "" if self.value is None else f" {str(self.value)!r}"
        return printable(f"{name}{shown_value}: {self.problem}. {self.remedy}")


class SpecError(LoadTestError):
    """A setting is wrong whatever the target."""


class TargetError(LoadTestError):
    """The target is down, is no OpenAI server, or lacks what the run asks for."""


def printable(text: str) -> str:
    """Names and messages may come from a target: none may steer the terminal."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text)
