"""What comes with the package: the trained miniatures, and a picture and prompts to begin with."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from wan_jax.config import KINDS
from wan_jax.tokenizer import clean_prompt, load_tokenizer

ASSETS = Path(__file__).parent / "assets"
PICTURE = ASSETS / "picture.png"
PROMPT = "A large red circle moves to the right on a plain dark background."
PICTURE_PROMPT = "A large yellow star moves to the right on a dark gradient background."
MINIATURES = {f"mini-{kind}": kind for kind in KINDS}
KNOWS = (
    "one or two shapes (circle, square, triangle, star, ring, cross; small, medium, large) in red, "
    "orange, yellow, green, cyan, blue, purple or pink that move (right, left, up, down, "
    "diagonally), orbit, bounce, grow, shrink, stay still, appear or disappear on plain, gradient "
    "or checkered backgrounds (dark, grey, light)"
)


def default(images: int = 0) -> str:
    """The name of what runs where no checkpoint is given; images: 0, 1 or 2."""
    return f"mini-{KINDS[images]}"


def folder(path: str | os.PathLike[str]) -> Path | None:
    """The folder of the trained checkpoint that this names; None for any other path.

    A file or folder of the name comes before the miniature.
    """
    text = os.fspath(path)
    if text not in MINIATURES or Path(text).exists():
        return None
    return ASSETS / MINIATURES[text]


def is_miniature(path: object) -> bool:
    """Whether this is the folder of a trained checkpoint that comes with the package."""
    return isinstance(path, Path) and path.parent == ASSETS and path.name in KINDS


def unknown_words(path: Path, prompts: Iterable[str]) -> list[str]:
    """The words of the prompts that the miniature at `path` has no token for, each once."""
    tokenizer = load_tokenizer(path / "tokenizer")
    words = [word for text in prompts for word in re.findall(r"[^\W_]+", clean_prompt(text))]
    known = {word: len(tokenizer.encode(word, add_special_tokens=False)) == 1 for word in words}
    return [word for word, is_known in known.items() if not is_known]
