"""The package's rooms stand on floors: none imports from its own floor or from above, under TYPE_CHECKING and in functions too."""

import ast
import pathlib

import ring_jax

PACKAGE = pathlib.Path(ring_jax.__file__).parent
# From the ground up; a room is a folder of the package, or a file beside them.
FLOORS = [
    {"_hardware", "_arrays", "_checks", "_device", "_vma", "_repr"},
    {"_mesh", "layout", "mosaic"},
    {"mask"},
    {"flash"},
    {"context"},
    {"gdn", "moe"},
    {"nn"},
    {"models", "data"},
    {"inference"},
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


def test_the_check_sees_arrows():
    """Also those inside functions."""
    found = {other for path in (PACKAGE / "commands").glob("*.py") for other in imports(path)}
    assert {"models", "inference"} <= found
