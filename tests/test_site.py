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


@pytest.mark.parametrize("script", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_those_of_their_scripts(script):
    cells = json.loads(script.with_suffix(".ipynb").read_text())["cells"]
    stored = [re.sub(r"\s+", "", "".join(cell["source"])) for cell in cells]
    body = script.read_text().split("# ---\n", 2)[2]
    parts = re.split(r"^# %%(?: \[markdown\])?\n", body, flags=re.M)[1:]
    scripted = [
        re.sub(r"\s+", "", re.sub(r"^# ?", "", x, flags=re.M) if stored[i] not in re.sub(r"\s+", "", x) else x)
        for i, x in enumerate(parts)
    ]
    assert scripted == stored
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output["output_type"] == "error" for output in outputs)
