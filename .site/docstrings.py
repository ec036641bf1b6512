"""Reads this package's docstrings as Google's style names their sections, and annotations as they are written."""

import re

import griffe

# Ours -> those that griffe knows.
_SECTIONS = {"Example:": "Examples:", "Fields:": "Attributes:"}
# "query, key: ..." and "name: one. other: two.": each name a line of its own.
_SEVERAL = re.compile(r"^ {4}(\w+(?:, \w+)+): (.*)$")
_NEXT = re.compile(r"(?<=[.;]) (?=[a-z_]\w*(?:, [a-z_]\w*)*: )")


class Docstrings(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_instance(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring is not None:
            obj.docstring.value = rewritten(obj.docstring.value)


def rewritten(text: str) -> str:
    """The docstring with section names, grouped arguments and continued lines as griffe understands them."""
    lines: list[str] = []
    section, scale = "", 0
    for line in text.splitlines():
        if re.fullmatch(r"[A-Z]\w+:", line):
            section, scale = line, 0
            line = _SECTIONS.get(line, line)
        elif line and not line.startswith(" "):
            section = ""
        if section in ("Args:", "Fields:", "Attributes:", "Raises:") and line.startswith(" "):
            indent = len(line) - len(line.lstrip())
            scale = scale or 4 // indent  # Flax's style indents by two
            first, *more = _NEXT.split(" " * scale * indent + line.lstrip())
            for item in (first, *(f"    {each}" for each in more)):
                lines += _items(item)
        else:
            lines.append(line)
    return "\n".join(lines)


def _items(line: str) -> list[str]:
    """One line for each name that an item describes together; what continues an item is indented below it."""
    if found := _SEVERAL.match(line):
        names, about = found[1].split(", "), found[2]
        return [*(f"    {name}: see `{names[-1]}`." for name in names[:-1]), f"    {names[-1]}: {about}"]
    return [line if re.match(r"    (\*{0,2}[\w.]+:|    |$)|\S|$", line) else f"    {line}"]
