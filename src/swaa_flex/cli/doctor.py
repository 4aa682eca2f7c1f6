"""`swaa-flex doctor`: what a bug report needs to know about the machine.

The entry point runs it without this package, see `swaa_flex_doctor`; this is its place in the help.
"""

from __future__ import annotations

from typing import Annotated

import typer

from swaa_flex_doctor import report


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="The same as a JSON object.")] = False,
) -> None:
    """Print versions, devices and which backends can run here, ready to paste into a bug report.

    For a backend that cannot run, the line says what is missing and how to get it.
    Packages that are missing or broken do not keep it from running.

    [bold]Examples[/]

      swaa-flex doctor
      swaa-flex doctor --json > machine.json
    """
    typer.echo(report(as_json))
