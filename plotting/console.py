"""What klac-figures, klac-curves and klac-landscape do, and `python -m plotting.figures` and its siblings."""

import importlib
import sys


def run(command: str, main, args: type) -> None:
    """Calls main with the flags of the command line; what is wrong with them is one line, and the exit status 2."""
    import tyro  # not above: load() says it if it is not installed

    try:
        main(tyro.cli(args))
    except (ValueError, OSError) as error:
        print(f"{command}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def load(name: str) -> None:
    try:
        module = importlib.import_module(f".{name}", __package__)
    except ModuleNotFoundError as error:
        print(f"klac-{name}: {error.name} is not installed: pip install 'klac[plot]'", file=sys.stderr)
        sys.exit(2)
    run(f"klac-{name}", module.main, module.Args)


def figures() -> None:
    load("figures")


def curves() -> None:
    load("curves")


def landscape() -> None:
    sys.path.insert(0, "")  # as with python -m: a task may be of a module in the current folder
    load("landscape")
