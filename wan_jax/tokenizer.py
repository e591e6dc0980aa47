"""Prompts to token ids.

The tokenizer.json that ships with every Wan2.1 checkpoint is run as it stands by the `tokenizers`
library, which is what transformers 4 did and the model was trained on. Later transformers must not
stand in between: AutoTokenizer 5 rebuilds the pipeline for tokenizer_class "T5Tokenizer" and loses
the byte fallback, so a rare character becomes one <unk> in place of its bytes.
"""

import html
import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # imported where they are used: `import wan_jax` stays fast
    from tokenizers import Tokenizer

PAD, EOS, UNK = "<pad>", "</s>", "<unk>"
_FILE = "tokenizer.json"


def clean_prompt(prompt: str) -> str:
    """The prompt with mojibake and HTML entities undone and whitespace runs made one space."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return " ".join(text.split())


def load_tokenizer(folder: str | os.PathLike[str]) -> "Tokenizer":
    """The tokenizer in a folder, local or gs://, that holds tokenizer.json.

    Raises ValueError that names the folder and what it needs: the file, <pad>, and an end mark
    after every text.
    """
    from etils import epath
    from tokenizers import Tokenizer

    path = epath.Path(folder) / _FILE
    needed = f"the {_FILE} of google/umt5-xxl, as in the tokenizer folder of a Wan2.1 checkpoint"
    if not path.exists():
        raise ValueError(f"tokenizer folder {os.fspath(folder)!r} has no {_FILE}; needed: {needed}")
    try:
        tokenizer = Tokenizer.from_str(path.read_text())
    except Exception as error:  # the library raises bare Exception
        raise ValueError(
            f"{os.fspath(path)!r} cannot be read ({error}); needed: {needed}"
        ) from error
    # A file can carry settings of its own; tokenize() pads and truncates.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if tokenizer.token_to_id(PAD) is None or tokenizer.encode("").tokens[-1:] != [EOS]:
        raise ValueError(f"{os.fspath(path)!r} has no {PAD} or appends no {EOS}; needed: {needed}")
    return tokenizer


def tokenize(
    tokenizer: "Tokenizer", prompts: Sequence[str], *, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask of the cleaned prompts, each int32 [b, length].

    A text that is too long is cut before its end mark; the mask is 1 up to and including the mark.
    """
    if isinstance(prompts, str):
        raise TypeError("prompts is one string; a sequence of strings is needed")
    if length < 1:
        raise ValueError(f"length is {length}; at least 1 is needed, for the end mark")
    ids = np.full((len(prompts), length), tokenizer.token_to_id(PAD), np.int32)
    mask = np.zeros((len(prompts), length), np.int32)
    for row, prompt in enumerate(prompts):  # encode_batch starts threads, which warn after a fork
        tokens = tokenizer.encode(clean_prompt(prompt)).ids
        if len(tokens) > length:
            tokens = tokens[: length - 1] + tokens[-1:]
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
    return ids, mask


def write_byte_tokenizer(folder: str | os.PathLike[str], *, vocab_size: int = 384) -> None:
    """Write a tokenizer folder whose tokens are <pad> 0, </s> 1, <unk> 2 and byte b at 3 + b.

    For miniatures: it has the structure of UMT5's and knows every text. AutoTokenizer of
    transformers loads the folder too. Raises ValueError where vocab_size has no room for the bytes.
    """
    from etils import epath
    from tokenizers import Tokenizer, decoders, models, processors

    special = (PAD, EOS, UNK)
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    if vocab_size < len(tokens):
        raise ValueError(f"vocab_size is {vocab_size}; a byte tokenizer needs {len(tokens)}")
    vocab = [(token, 0.0) for token in tokens]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=tokens.index(UNK), byte_fallback=True))
    tokenizer.add_special_tokens(list(special))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", special_tokens=[(EOS, tokens.index(EOS))]
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "eos_token": EOS,
        "unk_token": UNK,
    }
    path = epath.Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    (path / _FILE).write_text(tokenizer.to_str(pretty=True))
    (path / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
