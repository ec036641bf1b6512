"""The package's rooms stand on floors: none imports from its own floor or from above, under TYPE_CHECKING and in functions too;
and inside a room no file imports itself by way of others."""

import ast
import pathlib

import ring_jax

PACKAGE = pathlib.Path(ring_jax.__file__).parent
# From the ground up; a room is a folder of the package, or a file beside them.
FLOORS = [
    {"_hardware", "_arrays", "_checks", "_device", "_vma", "_repr", "_progress"},
    {"_html"},
    {"_mesh", "_mask_terms", "_segment_ids", "distributed", "layout", "mosaic"},
    {"mask"},
    {"flash", "plot"},
    {"context"},
    {"gdn", "moe", "pages"},
    {"nn"},
    {"models", "data"},
    {"inference", "plan", "training"},
    {"bench", "cli"},
    {"commands"},
    {"__main__"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# What `import ring_jax` gives: it names the rooms, and none of them asks for more of it than the version.
TOP = "__init__"


def room_of(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: pathlib.Path):
    """The rooms that a file imports from, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "ring_jax":
            names = [f"ring_jax.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("ring_jax."))


def test_every_room_has_a_floor():
    assert {room_of(path) for path in PACKAGE.rglob("*.py")} - {TOP} == set(FLOOR)


def test_no_arrow_runs_up():
    wrong = {
        f"{path.relative_to(PACKAGE)} -> {other}"
        for path in PACKAGE.rglob("*.py")
        if (room := room_of(path)) != TOP
        for other in imports(path)
        if other in FLOOR and other != room and FLOOR[other] >= FLOOR[room]
    }
    assert not wrong, wrong


def module_of(path: pathlib.Path) -> str:
    parts = ("ring_jax", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """The modules that each module imports, wherever in it; of a package that it takes names from, the package."""
    found: dict[str, set[str]] = {}
    for module, text in sources.items():
        names = found[module] = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom):
                names |= {
                    f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in sources else node.module or ""
                    for a in node.names
                }
            elif isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
        names &= sources.keys() - {module}
    return found


def circles(arrows: dict[str, set[str]]) -> set[str]:
    """The modules that reach themselves."""

    def reached(module: str) -> set[str]:
        seen: set[str] = set()
        ahead = [module]
        while ahead:
            new = arrows[ahead.pop()] - seen
            seen |= new
            ahead += new
        return seen

    return {module for module in arrows if module in reached(module)}


# A convenience that calls upward, imported where it is called: `ContextParallel.attention_fn()`.
UPWARD = "ring_jax.context.parallel", "ring_jax.context.attention_fn"


def test_no_file_imports_itself():
    arrows = graph({module_of(path): path.read_text() for path in PACKAGE.rglob("*.py")})
    arrows[UPWARD[0]].remove(UPWARD[1])
    found = circles(arrows)
    assert not found, sorted(found)


def test_the_check_sees_circles():
    """Under TYPE_CHECKING too."""
    sources = {
        "a.b": "if TYPE_CHECKING:\n    from a.c import C",
        "a.c": "def f():\n    from a import d",
        "a.d": "import a.b",
        "a.e": "import a.b",
    }
    assert circles(graph(sources | {"a": ""})) == {"a.b", "a.c", "a.d"}


def test_the_check_sees_arrows():
    """Also those inside functions."""
    found = {other for path in (PACKAGE / "commands").glob("*.py") for other in imports(path)}
    assert {"models", "inference"} <= found
