"""Prompt cleaning, token ids, and the byte tokenizer of the miniatures."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from wan_jax import tokenizer as tokenizer_module
from wan_jax.config import NEGATIVE_PROMPT
from wan_jax.tokenizer import clean_prompt, load_tokenizer, tokenize, write_byte_tokenizer

CHINESE = "两只拟人化的猫，在聚光灯下的舞台上打拳。🐈"


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    write_byte_tokenizer(tmp_path)
    return load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", ""),
        (" \n\t ", ""),
        ("a cat", "a cat"),
        ("  a \n\n cat\t\u3000 sits\r\n", "a cat sits"),
        ("a\u00a0cat\u2003here", "a cat here"),
        ("cafÃ©", "café"),
        ("âœ” No problems", "✔ No problems"),
        ("“curly”", '"curly"'),
        ("ｆｕｌｌ　ｗｉｄｔｈ，", "full width,"),
        ("salt &amp; pepper", "salt & pepper"),
        ("salt &amp;amp; pepper", "salt & pepper"),
        ("a &lt;b&gt; c", "a <b> c"),
        ("a&nbsp;&#32; b", "a b"),
        ("bell\x07 and unit\x1fs", "bell and units"),
        ("Two_Cats, BOXING!", "Two_Cats, BOXING!"),
    ],
)
def test_cleaning(prompt: str, expected: str) -> None:
    assert clean_prompt(prompt) == expected


def test_full_width_punctuation_of_the_negative_prompt() -> None:
    """ftfy makes full-width commas narrow, as it does in the original."""
    assert clean_prompt(NEGATIVE_PROMPT) == NEGATIVE_PROMPT.replace("，", ",")


def test_end_mark_padding_and_mask(tokenizer: Tokenizer) -> None:
    ids, mask = tokenize(tokenizer, ["ab"], length=6)
    assert ids.dtype == mask.dtype == np.int32
    np.testing.assert_array_equal(ids, [[3 + 97, 3 + 98, 1, 0, 0, 0]])
    np.testing.assert_array_equal(mask, [[1, 1, 1, 0, 0, 0]])


@pytest.mark.parametrize("length", [1, 2, 5, 6, 7])
def test_truncation_keeps_the_end_mark(tokenizer: Tokenizer, length: int) -> None:
    ids, mask = tokenize(tokenizer, ["abcde"], length=length)
    whole = [100, 101, 102, 103, 104]
    expected = [*whole[: length - 1], 1]
    np.testing.assert_array_equal(ids[0, : len(expected)], expected)
    assert mask.sum() == len(expected)
    assert not ids[0, len(expected) :].any()


def test_batch_equals_its_members(tokenizer: Tokenizer) -> None:
    prompts = ["a cat", CHINESE, "", "x" * 300]
    ids, mask = tokenize(tokenizer, prompts, length=80)
    assert ids.shape == mask.shape == (4, 80)
    for row, prompt in enumerate(prompts):
        alone = tokenize(tokenizer, [prompt], length=80)
        np.testing.assert_array_equal((ids[row], mask[row]), [array[0] for array in alone])
    assert tokenize(tokenizer, [], length=8)[0].shape == (0, 8)


def test_empty_prompt_is_an_end_mark(tokenizer: Tokenizer) -> None:
    ids, mask = tokenize(tokenizer, ["", "  \n"], length=3)
    np.testing.assert_array_equal(ids, [[1, 0, 0]] * 2)
    np.testing.assert_array_equal(mask, [[1, 0, 0]] * 2)


def test_arguments(tokenizer: Tokenizer) -> None:
    with pytest.raises(TypeError, match="one string"):
        tokenize(tokenizer, "a cat", length=8)
    with pytest.raises(ValueError, match="length is 0"):
        tokenize(tokenizer, ["a cat"], length=0)


def test_byte_tokenizer_knows_every_text(tokenizer: Tokenizer) -> None:
    text = clean_prompt(CHINESE)
    ids, mask = tokenize(tokenizer, [CHINESE], length=512)
    tokens = ids[0, : mask.sum()]
    np.testing.assert_array_equal(tokens[:-1] - 3, list(text.encode()))
    assert tokens[-1] == 1
    assert tokens.max() < 384
    assert tokenizer.decode(tokens.tolist()) == text


def test_byte_tokenizer_needs_room(tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path / "new" / "folder", vocab_size=259)
    with pytest.raises(ValueError, match=r"vocab_size is 258; .* 259"):
        write_byte_tokenizer(tmp_path, vocab_size=258)


def test_folder_without_the_file(tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes(b"")
    with pytest.raises(ValueError, match=r"has no tokenizer\.json; needed: .*umt5-xxl") as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("text", ["", "{", '{"model": {"type": "none"}}'])
def test_broken_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=r"cannot be read .*umt5-xxl") as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_tokenizer_of_another_model(tmp_path: Path) -> None:
    other = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    other.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="appends no </s>"):
        load_tokenizer(tmp_path)


def _unigram() -> Tokenizer:
    """A small tokenizer of UMT5's kind: pieces, Metaspace, byte fallback, sentinels, end mark."""
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocab += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    vocab += [("▁", -2.0), ("▁cat", -3.0), ("s", -3.0), ("c", -4.0), ("a", -4.0), ("t", -4.0)]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=2, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>", "<extra_id_0>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return tokenizer


def test_a_files_own_padding_and_truncation_are_overruled(tmp_path: Path) -> None:
    tokenizer = _unigram()
    tokenizer.enable_padding(length=5)
    tokenizer.enable_truncation(3)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ids, mask = tokenize(load_tokenizer(tmp_path), ["cat cats cat"], length=8)
    np.testing.assert_array_equal(ids, [[260, 260, 261, 260, 1, 0, 0, 0]])
    np.testing.assert_array_equal(mask, [[1, 1, 1, 1, 1, 0, 0, 0]])


def test_rare_characters_fall_back_to_bytes(tmp_path: Path) -> None:
    """AutoTokenizer of transformers 5 gives <unk> here: it rebuilds the pipeline."""
    _unigram().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    ids, _ = tokenize(load_tokenizer(tmp_path), ["cat 猫"], length=7)
    np.testing.assert_array_equal(ids, [[260, 259, *(3 + b for b in "猫".encode()), 1, 0]])


_FRESH = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("tokenizer", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert not {"ftfy", "tokenizers", "etils"} & set(sys.modules), "imported before it is used"
module.tokenize(module.load_tokenizer(sys.argv[2]), ["a cat"], length=8)
assert not {"jax", "torch", "transformers", "wan_jax"} & set(sys.modules), "no business here"
"""


def test_imports_little_and_warns_of_nothing(tmp_path: Path) -> None:
    """The file by itself in a fresh interpreter, with warnings as errors."""
    write_byte_tokenizer(tmp_path)
    command = [sys.executable, "-W", "error", "-c", _FRESH, tokenizer_module.__file__, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
