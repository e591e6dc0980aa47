"""The tokenizer of the miniature: a token for every word of its captions, bytes for the rest.

It is a Unigram model of UMT5's structure. Its pieces are counted here and not trained: the trainer
of `tokenizers` differs in the last bits from run to run, and on so few different words it breaks
the common ones into pieces.
"""

import json
import math
import string
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from wan_jax.tokenizer import EOS, PAD, UNK
from wan_jax.training.miniature.networks import VOCABULARY

_SPACE = "▁"
_PLAIN = string.ascii_lowercase + string.digits + string.punctuation
_RARE = 10.0  # how much less likely a letter is than any word, so that words stay whole


def train_tokenizer(
    captions: Iterator[str], folder: Path, vocab_size: int = VOCABULARY
) -> Tokenizer:
    """Write tokenizer.json and tokenizer_config.json into the folder; the same for same captions.

    Ids: <pad> 0, </s> 1, <unk> 2, the 256 bytes, letters, then words, the most frequent first; at
    most vocab_size, with the rarest words left out. Case makes no difference, and every text can be
    encoded. Raises ValueError for a vocab_size with no room for bytes and letters, or no captions.
    """
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Lowercase()
    # Punctuation first, so that a word behind a hyphen begins as one behind a space does.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation(), pre_tokenizers.Metaspace()]
    )
    tokenizer.model = models.Unigram(
        _vocabulary(_words(tokenizer, captions), vocab_size), unk_id=2, byte_fallback=True
    )
    tokenizer.add_special_tokens([PAD, EOS, UNK])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", special_tokens=[(EOS, 1)]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()]
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "eos_token": EOS,
        "unk_token": UNK,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return tokenizer


def _words(tokenizer: Tokenizer, captions: Iterable[str]) -> Counter[str]:
    """How often each word is there, as the model is given it."""
    found: Counter[str] = Counter()
    for text in captions:
        plain = tokenizer.normalizer.normalize_str(text)
        found.update(word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(plain))
    return found


def _vocabulary(words: Counter[str], vocab_size: int) -> list[tuple[str, float]]:
    """(piece, log of its probability) by id."""
    if not words:
        raise ValueError("captions has no word; a tokenizer is made of some")
    letters = sorted({_SPACE, *_PLAIN, *"".join(words)})
    fixed = [PAD, EOS, UNK, *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    if vocab_size < len(fixed):
        raise ValueError(f"vocab_size is {vocab_size}; bytes and letters need {len(fixed)}")
    frequent = sorted(words, key=lambda word: (-words[word], word))
    kept = [word for word in frequent if word not in letters][: vocab_size - len(fixed)]
    total = words.total()
    # Rounded, as the last bits of a logarithm differ from machine to machine.
    scores = [round(math.log(words[word] / total), 4) for word in kept]
    least = round(min(scores, default=0.0) - _RARE, 4)
    return [*((piece, least) for piece in fixed), *zip(kept, scores)]
