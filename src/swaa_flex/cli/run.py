"""`swaa-flex run`: any Python program, with swaa_flex registered and a recipe for the models that it loads."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import runpy
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer
from transformers import PreTrainedConfig

from ..errors import ConfigError
from ..hf.config import RECIPE_VARIABLE, default_recipe
from . import made, paths


def run(
    context: typer.Context,
    program: Annotated[str, typer.Argument(help="A Python script, or after -m a module.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="The program's own, handed on as they are.")] = None,
    module: Annotated[bool, typer.Option("-m", help="PROGRAM is a module, as in 'python -m'.")] = False,
    swaa: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE",
            help="For models under swaa_flex that bring none of their own: a recipe's name, or the fields of a "
            "SWAAConfig as a .json file or as JSON.",
        ),
    ] = None,
) -> None:
    """Run a Python program that loads models with attn_implementation="swaa_flex".

    The name is registered before the program starts, so programs need not know
    of this library. A checkpoint with a recipe in its config.json runs that one,
    without attn_implementation. Models that the program loads in another way run
    as ever; a warning at the end names those that did not run --swaa.
    Options come before PROGRAM; what follows it is the program's. Its exit code
    and its exceptions are passed on.

    [bold]Examples[/]

      swaa-flex run --swaa quality -m lm_eval --model hf ...
      swaa-flex run --swaa '{"sliding_window": 512}' script.py --its-own option
      accelerate launch -m swaa_flex run --swaa fast -m lm_eval ...
    """
    if swaa is not None:
        _set_recipe(swaa)
    else:
        default_recipe()  # refuses what is no recipe before the program starts
    given = arguments or []
    sys.path.insert(0, os.getcwd() if module else str(Path(program).resolve().parent))  # as Python does
    if module:
        _refuse_missing(program)
        if program.partition(".")[0] == "lm_eval":
            given = _for_lm_eval(given)
    elif not Path(program).is_file():
        raise ConfigError(f"{program}: expected a Python script; a module takes -m: swaa-flex run -m {program}")
    sys.argv = [program, *given]
    context.find_root().params["debug"] = True  # from here on errors are the program's, with their traceback
    asked_for = os.environ.get(RECIPE_VARIABLE)
    named = f"{RECIPE_VARIABLE}={asked_for}" if swaa is None else f"--swaa {swaa}"
    with nullcontext() if asked_for is None else made.missed(default_recipe(), named):
        if module:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(program, run_name="__main__")


def _set_recipe(swaa: str) -> None:
    if swaa.endswith(".json"):
        paths.read_file("--swaa", Path(swaa))
    try:
        os.environ[RECIPE_VARIABLE] = Path(swaa).read_text() if swaa.endswith(".json") else swaa
        default_recipe()
    except (UnicodeDecodeError, ConfigError) as error:
        raise ConfigError(f"--swaa {swaa}: {str(error).removeprefix(f'{RECIPE_VARIABLE}: ')}") from error


def _refuse_missing(module: str) -> None:
    try:
        spec = importlib.util.find_spec(module)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{module}.__main__")
    except ImportError as error:
        raise ConfigError(f"-m {module}: cannot be run ({error})") from error
    if spec is None:
        raise ConfigError(f"-m {module}: expected a module, or a package with __main__.py, that Python finds here")


def _for_lm_eval(arguments: Sequence[str]) -> list[str]:
    """Registers the model `swaa_flex` with lm-evaluation-harness and takes it where `hf` would run under swaa_flex."""
    import lm_eval.models  # noqa: F401  # lm_eval registers its own only while there are none
    from lm_eval.api.registry import model_registry

    model_registry.register("swaa_flex", target="swaa_flex.evaluation.harness:HarnessLM")
    chosen = harness_model(arguments)
    if chosen is None:
        return list(arguments)
    if int(os.environ.get("RANK", 0)) == 0:
        typer.echo(f"--model {chosen} does not say where prompts end: --model swaa_flex takes its place", err=True)
    return [*arguments, "--model", "swaa_flex"]  # of an option given twice the last counts


def harness_model(arguments: Sequence[str]) -> str | None:
    """The name under which the arguments of lm_eval ask for a Hugging Face model under swaa_flex, if they do."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model", "-M", default="hf")
    model: str = parser.parse_known_args(list(arguments))[0].model
    asked_for = [argument for argument in arguments if "attn_implementation" in argument]
    swaa_flex = any("swaa_flex" in argument for argument in asked_for) or (
        not asked_for and any(map(_brings_recipe, arguments))
    )
    return model if swaa_flex and model in ("hf", "hf-auto", "huggingface") else None


def _brings_recipe(model_args: str) -> bool:
    """Whether lm_eval's --model_args, `key=value,...` or JSON, name a recipe or a checkpoint that has one."""
    given = dict(re.findall(r"""\b(pretrained|swaa)["']?\s*[=:]\s*["']?([^,"'}]*)""", model_args))
    if "swaa" in given:
        return True
    try:
        return (
            "pretrained" in given and PreTrainedConfig.get_config_dict(given["pretrained"])[0].get("swaa") is not None
        )
    except (OSError, ValueError):
        return False  # no such checkpoint, which lm_eval will say
