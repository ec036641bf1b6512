"""Renders one chat template, in a process of its own: standard input is what to render, standard output the text.

A template comes with a checkpoint, from anyone. Jinja's sandbox keeps it from Python, but not from running or growing
without end, and inside one process nothing could stop that. `tokenizer.py` starts this file as a script, which imports
nothing of ring_jax, and ends it after its time.
"""

import datetime
import json
import sys
from typing import Any


def render(request: "dict[str, Any]") -> str:
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    loops = ["jinja2.ext.loopcontrols"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=loops)
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    environment.globals["raise_exception"] = refuse
    pieces, size = [], 0
    for piece in environment.from_string(request["template"]).generate(**request["variables"]):
        size += len(piece)
        if size > request["characters"]:
            raise ValueError(f"it wrote more than {request['characters']:,} characters")
        pieces.append(piece)
    return "".join(pieces)


def main() -> None:
    request = json.load(sys.stdin)
    sys.path[:] = request["path"]
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (request["bytes"], request["bytes"]))
    except (ImportError, OSError, ValueError):  # the time limit remains
        pass
    try:
        answer = {"text": render(request)}
    except MemoryError:
        answer = {"error": f"it needed more than {request['bytes'] >> 20:,} MiB"}
    except Exception as error:  # whatever the template did, its author is told
        answer = {"error": f"{error or type(error).__name__}"}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
