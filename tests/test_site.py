"""The API pages of the documentation name what is public and there; every notebook is stored with its script, executed."""

import importlib
import inspect
import json
import pathlib
import re

import pytest

import ring_jax

ROOT = pathlib.Path(__file__).parents[1]
NAMES = [
    name for page in (ROOT / "docs" / "api").glob("*.md") for name in re.findall(r"^::: (\S+)$", page.read_text(), re.M)
]
NOTEBOOKS = [path for path in (ROOT / "examples" / "notebooks").glob("*.py") if path.stem != "execute"]


@pytest.mark.parametrize("name", NAMES)
def test_what_the_pages_name_is_there_and_documented(name):
    module, _, last = name.rpartition(".")
    found = getattr(importlib.import_module(module), last)
    assert inspect.getdoc(found)


def test_everything_public_has_an_entry():
    public = [name for name in ring_jax.__all__ if not inspect.ismodule(getattr(ring_jax, name))]
    assert {f"ring_jax.{name}" for name in public} <= set(NAMES)
    packages = {name.split(".")[1] for name in NAMES if name.count(".") > 1}
    assert set(ring_jax.__all__) - set(public) - {"data", "plot"} <= packages


def cells_of(script: pathlib.Path) -> list[tuple[str, str]]:
    """(kind, source) of the cells of a script in jupytext's percent format; white space does not count."""
    parts = re.split(r"^# %%( \[markdown\])?\n", script.read_text(), flags=re.M)[1:]
    found = []
    for marker, body in zip(parts[::2], parts[1::2], strict=True):
        text = re.sub(r"^# ?", "", body, flags=re.M) if marker else body
        found.append(("markdown" if marker else "code", "".join(text.split())))
    return found


@pytest.mark.parametrize("script", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_those_of_their_scripts(script):
    cells = json.loads(script.with_suffix(".ipynb").read_text())["cells"]
    assert [(cell["cell_type"], "".join("".join(cell["source"]).split())) for cell in cells] == cells_of(script)
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output["output_type"] == "error" for output in outputs)
