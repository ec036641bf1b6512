"""The pass-key task: a number hidden somewhere in a long text, asked for at the end.

The training script and ``ring-jax generate`` share these words: the bundled model knows no others. Texts are ASCII, so
that a character is a byte is a token.

Source: Mohtashami and Jaggi, Landmark Attention (arXiv 2305.16300), section 4.2.
"""

import ast
import dataclasses
import functools
import sysconfig
from pathlib import Path

import numpy as np

from ring_jax._checks import check_count, check_instance, check_number, describe

DIGITS = 5
NEEDLE = "\n\nThe pass key is {key}. Remember it.\n\n"
QUESTION = "\n\nWhat is the pass key? The pass key is "
ANSWER = "{key}."
MODEL = Path(__file__).parent / "passkey"  # the checkpoint that was trained for it; it comes with the package
HELD_OUT = 0.25  # of the help topics: what training never sees
# Not part of the standard library, or not written in sentences.
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "pydoc_data", "encodings", "lib2to3"}


@dataclasses.dataclass(frozen=True)
class PassKeyText:
    """A text and what has to follow it.

    Fields:
        prompt: long text with the key inside and the question at the end, ASCII.
        key: the digits. answer: the key as the model should write it, before it ends the text.
    """

    prompt: str
    key: str
    answer: str


def pass_key_text(key: str, length: int, depth: float, *, text: str | None = None, start: int = 0) -> PassKeyText:
    """Hides a key in a stretch of text.

    Args:
        key: what to hide, five digits for the bundled model.
        length: characters (bytes, tokens) of the prompt, exactly.
        depth: where the key is, 0 (beginning) to 1 (right before the question); moved back to the space before.
        text: to hide it in, repeated as needed; default: the part of Python's help that training never saw.
        start: where in `text` to begin.

    Raises:
        ValueError: a length too short for the question, a depth outside 0 ... 1, an empty or non-ASCII text.

    Example:
        >>> found = pass_key_text("48151", 200, 0.5)
        >>> len(found.prompt), "The pass key is 48151." in found.prompt, found.answer
        (200, True, '48151.')
    """
    _check(length=length, depth=depth)
    check_count("start", start)
    text = held_out_text() if text is None else _ascii_text("text", text)
    _ascii_text("key", key)
    needle, question = NEEDLE.format(key=key), QUESTION
    room = length - len(needle) - len(question)
    if room < 0:
        raise ValueError(f"length must be at least {length - room} to hold the key and the question, got {length}")
    hay = _cut(text, start, room)
    place = round(depth * room)
    if place < room:
        place = hay.rfind(" ", 0, place) + 1
    return PassKeyText(hay[:place] + needle + hay[place:] + question, key, ANSWER.format(key=key))


def random_text(random: np.random.Generator, length: int, depth: float | None = None, *, text: str) -> PassKeyText:
    """A random key at a random (or given) depth of a random stretch of `text`; `length` as in `pass_key_text`."""
    check_instance("random", random, np.random.Generator, "a numpy.random.Generator")
    _check(length=length, depth=0.0 if depth is None else depth)
    _ascii_text("text", text)
    key = "".join(map(str, random.integers(0, 10, DIGITS)))
    depth = float(random.random()) if depth is None else depth
    return pass_key_text(key, length, depth, text=text, start=int(random.integers(len(text))))


def training_row(random: np.random.Generator, length: int, asked: int, *, text: str, end: str) -> tuple[str, list[int]]:
    """A whole text to train on, and where its answers begin.

    The question comes 1 to `asked` times, each time with the answer and `end`: once at the end of the text, the others
    anywhere behind the key. While a model does not know yet what to look for, that gives it more to learn from.

    Args:
        length: characters in all, `end` counts as one.
        end: one character that stands for the token that ends a text.

    Example:
        >>> row, answers = training_row(np.random.default_rng(0), 300, 3, text="so many words ", end="$")
        >>> len(row), [row[place : place + 7] for place in answers]
        (300, ['65230.$', '65230.$', '65230.$'])
    """
    check_instance("random", random, np.random.Generator, "a numpy.random.Generator")
    _check(length=length)
    check_count("asked", asked, 1)
    _ascii_text("text", text)
    if len(_ascii_text("end", end, any_character=True)) != 1:
        raise ValueError(f"end must be one character, got {end!r}")
    more = int(random.integers(asked))
    answer_size = len(ANSWER.format(key="0" * DIGITS) + end)
    room = length - answer_size - more * (len(QUESTION) + answer_size)
    found = random_text(random, room, text=text)
    answer = found.answer + end
    needle, last = NEEDLE.format(key=found.key), len(found.prompt) - len(QUESTION)
    behind = found.prompt.index(needle) + len(needle)
    places = [*sorted(random.integers(behind, last + 1, more)), last]
    pieces, answers, size = [], [], 0
    for start, stop in zip([0, *places[:-1]], places, strict=True):
        pieces += [found.prompt[start:stop], QUESTION, answer]
        size += stop - start + len(QUESTION) + len(answer)
        answers.append(size - len(answer))
    return "".join(pieces), answers


def _check(*, length: int, depth: float = 0.0) -> None:
    check_count("length", length, 1)
    check_number("depth", depth, low=0, high=1)


def _ascii_text(name: str, text: str, *, any_character: bool = False) -> str:
    check_instance(name, text, str, "text")
    if not text or not (any_character or text.isascii()):
        raise ValueError(f"{name} must be ASCII and not empty: a character must be one byte, got {describe(text)}")
    return text


@functools.cache
def held_out_text() -> str:
    """The last quarter of Python's help topics, about 120,000 characters."""
    topics = _help_topics()
    return topics[-int(HELD_OUT * len(topics)) :]


@functools.cache
def training_text() -> str:
    """The rest of the help topics and the standard library's docstrings, about 2,000,000 characters. Takes seconds."""
    topics = _help_topics()
    return topics[: -int(HELD_OUT * len(topics))] + "\n\n" + _docstrings()


def _help_topics() -> str:
    from pydoc_data.topics import topics

    return _ascii("\n\n".join(topics[name] for name in sorted(topics)))


def _docstrings() -> str:
    library = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in sorted(library.glob("**/*.py")):
        if _SKIPPED & set(path.relative_to(library).parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                found.append(ast.get_docstring(node) or "")
    return _ascii("\n\n".join(filter(None, found)))


def _ascii(text: str) -> str:
    return text.encode("ascii", "ignore").decode("ascii")


def _cut(text: str, start: int, length: int) -> str:
    start %= len(text)
    piece = text[start : start + length]
    while len(piece) < length:
        piece += text[: length - len(piece)]
    return piece
