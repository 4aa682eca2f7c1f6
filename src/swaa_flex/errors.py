"""The exceptions of the library, and what their messages share.

```
SWAAError
├── ConfigError              (ValueError)    a setting is wrong
├── MaskError                (ValueError)    a mask, or what is asked of it, is wrong
├── BackendUnavailableError  (RuntimeError)  this machine cannot run the backend asked for
├── DoesNotFitError          (RuntimeError)  this machine has too little memory for what was asked
└── UnsupportedModelError    (RuntimeError)  this model cannot be adapted
```
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class SWAAError(Exception):
    """Base of every exception that the library raises on purpose."""


class ConfigError(SWAAError, ValueError):
    """A setting has a value that the library cannot honour."""


class MaskError(SWAAError, ValueError):
    """A mask is malformed, or does not fit the tensors it is used with."""


class BackendUnavailableError(SWAAError, RuntimeError):
    """The backend asked for cannot run here: a package, a device or a feature is missing."""


class DoesNotFitError(SWAAError, RuntimeError):
    """The device has too little memory for the length and batch size asked for."""


class UnsupportedModelError(SWAAError, RuntimeError):
    """The model has an attention that the library cannot adapt without changing its results."""


def did_you_mean(name: object, choices: Iterable[str]) -> str:
    """Return the end of an error message that suggests the choice nearest to `name`.

    Examples:
        >>> did_you_mean("tritn", ["flash", "triton"])
        "; did you mean 'triton'?"
        >>> did_you_mean("banana", ["flash", "triton"])
        ''
    """
    nearest = get_close_matches(str(name).lower(), choices, n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def listed(heading: str, lines: Sequence[str], shown: int = 5) -> str:
    """Return a heading with the first lines under it, and how many more there are.

    Examples:
        >>> print(listed("3 rows are left out:", ["row 1: empty", "row 4: empty", "row 5: empty"], shown=2))
        3 rows are left out:
          row 1: empty
          row 4: empty
          and 1 more
    """
    more = [f"and {len(lines) - shown} more"] if len(lines) > shown else []
    return "\n  ".join([heading, *lines[:shown], *more])
