"""The README's snippets run, its commands are the ones that exist, and its tree is the tree."""

import itertools
import re
from pathlib import Path

import jax
import pytest
from flax import nnx

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("length", [1500, pytest.param(16384, marks=pytest.mark.slow)])
def test_snippets_run_from_top_to_bottom(length, capsys):
    namespace: dict[str, object] = {}
    with jax.numpy_dtype_promotion("standard"):  # what a reader has
        for number, snippet in enumerate(blocks("python")):
            short = snippet if length == 16384 else snippet.replace("=16384", f"={length}").replace("=2048", "=512")
            exec(compile(short, f"README.md, snippet {number}", "exec"), namespace)
            if number == 0:  # the reader's own tolerance leaves room for TF32
                assert abs(namespace["out"] - namespace["same"]).max() < 1e-5
    out = namespace["out"]
    assert isinstance(out, jax.Array) and bool(jax.numpy.isfinite(out).all())
    # Three turns over one document: each question after the first computes at most a fifth of what the first did.
    computed = [int(n.replace(",", "")) for n in re.findall(r"([\d,]+) computed", capsys.readouterr().out)]
    assert len(computed) == 3 and length - 100 < computed[0] < length
    assert max(computed[1:]) <= min(60, computed[0] / 5), "a question, and what of the answer nothing followed"


def test_an_ordinary_layer_takes_what_the_first_snippet_lays_out():
    namespace: dict[str, object] = {}
    with jax.numpy_dtype_promotion("standard"):
        exec(blocks("python")[0], namespace)
        tokens = jax.numpy.arange(1000)[None] % 50
        embed = nnx.Embed(50, 16, rngs=nnx.Rngs(0))
        found = namespace["cp"].from_layout(embed(namespace["cp"].to_layout(tokens)), 1000)
    assert (found == embed.embedding[...][tokens]).all()


def test_every_mesh_is_made_in_one_way():
    sources = [*(ROOT / "ring_jax").rglob("*.py"), *(ROOT / "examples").glob("*.py"), ROOT / "README.md"]
    calls = []
    for path in sources:
        text = path.read_text()
        calls += [(path.name, text[found.start() :][:400]) for found in re.finditer(r"make_mesh\(", text)]
    assert len(calls) >= 5
    for name, call in calls:
        depth = list(itertools.accumulate((c == "(") - (c == ")") for c in call[len("make_mesh") :]))
        assert "axis_types=" in call[: depth.index(0)], f"{name} makes a mesh without axis_types"


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
