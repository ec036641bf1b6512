"""Executes the notebooks from their scripts and writes them with what they print and draw.

`python examples/notebooks/execute.py [NAME ...]`; needs the extra `docs`. With `--check` nothing is written:
it fails where a cell raises, or where a notebook is not the one of its script.
"""

import argparse
import os
import time
from pathlib import Path

import jupytext
import nbclient

HERE = Path(__file__).parent
NAMES = sorted(path.stem for path in HERE.glob("*.py") if path.stem != "execute")


def executed(name: str):
    """The notebook of a script, run from the top in a process of its own."""
    notebook = jupytext.read(HERE / f"{name}.py")
    os.environ.setdefault("XLA_FLAGS", "")
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute(cwd=str(HERE))
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of day
    return notebook


def problems(name: str, notebook) -> list[str]:
    """What is wrong with a stored notebook beside the one that just ran."""
    path = HERE / f"{name}.ipynb"
    if not path.exists():
        return [f"{path.name} is missing"]
    stored, found = jupytext.read(path), []
    pairs = list(zip(stored.cells, notebook.cells, strict=False))
    if len(stored.cells) != len(notebook.cells) or any(a.source != b.source for a, b in pairs):
        found.append(f"{path.name} is not what {name}.py says: run examples/notebooks/execute.py {name}")
    drawn = [cell for cell in stored.cells if "image/png" in str(cell.get("outputs", ""))]
    return found + ([] if drawn else [f"{path.name} shows no picture"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=NAMES, metavar="NAME", help=f"of {', '.join(NAMES)} (default: all)")
    parser.add_argument("--check", action="store_true", help="write nothing, fail where a notebook is not up to date")
    args = parser.parse_args()
    failed = 0
    for name in args.names:
        begin = time.perf_counter()
        notebook = executed(name)
        wrong = problems(name, notebook) if args.check else []
        if not args.check:
            jupytext.write(notebook, HERE / f"{name}.ipynb")
        failed += len(wrong)
        print(f"{name}: {'; '.join(wrong) or 'passed'} ({time.perf_counter() - begin:.0f} s)", flush=True)
    print(f"{len(args.names)} passed, {failed} failed" if not failed else f"{failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
