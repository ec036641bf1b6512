"""The README's snippets run, its commands are the ones that exist, and its tree is the tree."""

import re
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_snippets_run_from_top_to_bottom():
    namespace: dict[str, object] = {}
    with jax.numpy_dtype_promotion("standard"):  # what a reader has
        for number, snippet in enumerate(blocks("python")):
            exec(compile(snippet, f"README.md, snippet {number}", "exec"), namespace)
    out = namespace["out"]
    assert isinstance(out, jax.Array) and bool(jax.numpy.isfinite(out).all())


def test_exactly_two_set_up_commands():
    commands = [line for block in blocks("bash") for line in block.splitlines() if line]
    assert [re.findall(r"'\.\[(\w+)\]'", command) for command in commands] == [["cli"], ["test"]]
    assert all(command.startswith("python3 -m venv .venv && ") for command in commands)


def test_tree_matches():
    tree = re.search(r"```\n(ring_jax/.*?)```", README, re.DOTALL)[1]
    for line in tree.splitlines():
        name = line.split()[0]
        path = (ROOT / "ring_jax" if line.startswith(" ") else ROOT) / name
        assert path.exists(), f"README's tree names {path.relative_to(ROOT)}, which is not there"


@pytest.mark.parametrize("name", re.findall(r"\]\(([A-Z_]+(?:\.md)?)\)", README))
def test_links(name):
    assert (ROOT / name).exists()
