"""The miniature as the package ships it: its tokenizer, its folders, and its doors."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from absl import flags
from PIL import Image
from safetensors.numpy import load_file

import wan_jax
from tests.random_miniature import write_networks
from tests.unit.test_cli import ROOT
from wan_jax import cli, jobs, loading, runner, shipped
from wan_jax.config import KINDS
from wan_jax.tasks import IMAGE_TASKS, TEXT_TASKS
from wan_jax.tokenizer import load_tokenizer, tokenize
from wan_jax.training.miniature import captions, files, networks, pack, text, world
from wan_jax.weights import sources

SMALL = ["--size", "32*32", "--frame_num", "5", "--sample_steps", "1", "--base_seed", "1"]


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("networks")
    write_networks(path)
    return path


@pytest.fixture(scope="module")
def packed(src: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("assets")
    pack.pack(src, path)
    return path


@pytest.fixture
def assets(packed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folders in the place of the package's, and a folder and a cache of the test's own."""
    monkeypatch.setattr(shipped, "ASSETS", packed)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return packed


def _files(path: Path) -> dict[str, str]:
    """{file: SHA-256, or where a link points} under a folder, links not followed."""
    return {
        item.relative_to(path).as_posix(): str(item.readlink())
        if item.is_symlink()
        else hashlib.sha256(item.read_bytes()).hexdigest()
        for item in sorted(path.rglob("*"))
        if item.is_symlink() or item.is_file()
    }


# The tokenizer.


def test_every_word_of_the_captions_is_a_token(tmp_path: Path) -> None:
    text.train_tokenizer(captions.corpus(3000, 0), tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.get_vocab_size() < networks.VOCABULARY
    texts = list(captions.corpus(300, 5))
    for caption in texts:
        words = re.findall(r"\w+|[^\w\s]", caption)
        assert len(tokenizer.encode(caption).ids) == len(words) + 1, caption
    assert max(len(tokenizer.encode(caption).ids) for caption in texts) <= networks.TEXT_TOKENS
    one, other = (tokenizer.encode(t).ids for t in ("A Red circle", "a red CIRCLE"))
    assert one == other and one[-1] == 1 and not set(one) & {0, 2}


def test_any_text_has_tokens(packed: Path) -> None:
    tokenizer = load_tokenizer(packed / "t2v" / "tokenizer")
    for odd in ("Zürich 猫 🙂", "a\x00b", "𝔘", "it's 42% <b>"):
        ids, mask = tokenize(tokenizer, [odd], length=64)
        assert not np.isin(2, ids)
        assert mask.sum() > 2
    assert tokenizer.decode(tokenizer.encode("zürich 猫 🙂").ids) == "zürich 猫 🙂"
    assert [tokenizer.id_to_token(i) for i in (0, 1, 2, 3, 258)] == [
        "<pad>", "</s>", "<unk>", "<0x00>", "<0xFF>",
    ]  # fmt: skip


def test_the_tokenizer_is_the_same_every_time(tmp_path: Path) -> None:
    texts = list(captions.corpus(300, 0))
    for name, order in (("a", texts), ("b", texts[::-1])):
        text.train_tokenizer(iter(order), tmp_path / name)
    assert _files(tmp_path / "a") == _files(tmp_path / "b")


def test_the_vocabulary_has_a_size(tmp_path: Path) -> None:
    few = text.train_tokenizer(captions.corpus(300, 0), tmp_path, vocab_size=340)
    assert few.get_vocab_size() == 340
    with pytest.raises(ValueError, match="vocab_size is 300; bytes and letters need"):
        text.train_tokenizer(captions.corpus(300, 0), tmp_path, vocab_size=300)
    with pytest.raises(ValueError, match="captions has no word"):
        text.train_tokenizer(iter(()), tmp_path)


# The folders.


def test_what_is_packed(packed: Path, src: Path) -> None:
    links = {name: value for name, value in _files(packed).items() if value.startswith("..")}
    shared = ("scheduler", "text_encoder", "tokenizer", "vae")
    assert links == {
        f"{kind}/{name}": f"../t2v/{name}" for kind in ("i2v", "flf2v") for name in shared
    } | {f"flf2v/image_{name}": f"../i2v/image_{name}" for name in ("encoder", "processor")}
    for kind in KINDS:
        config = sources.open_folder(packed / kind).config
        assert config.dit == networks.DITS[kind]
        assert config.defaults == networks.DEFAULTS
        assert (config.vae, config.umt5) == (networks.VAE, networks.UMT5)
        assert config.clip == (None if kind == "t2v" else networks.CLIP)
        for file in (packed / kind).rglob("*.safetensors"):
            kinds = {array.dtype.name for array in load_file(file).values()}
            assert kinds == {"bfloat16"}
    wanted, _ = files.read(src / "vae.safetensors")
    (conv,) = (a for n, a in wanted.items() if n == "decoder.conv_in.kernel")
    found = load_file(packed / "t2v" / "vae" / "diffusion_pytorch_model.safetensors")
    np.testing.assert_allclose(
        np.sort(found["decoder.conv_in.weight"].astype(np.float32), None),
        np.sort(conv, None),
        rtol=2**-8,
    )


def test_the_same_networks_give_the_same_bytes(src: Path, packed: Path, tmp_path: Path) -> None:
    sizes = pack.pack(src, tmp_path / "assets")
    again = pack.pack(src, tmp_path / "assets")  # over what is there
    assert again == sizes
    assert _files(tmp_path / "assets") == _files(packed)
    total = sum(p.stat().st_size for p in packed.rglob("*") if p.is_file() and not p.is_symlink())
    assert sum(sizes.values()) <= total  # which follows links to files, of which there are none
    assert {"t2v/vae", "i2v/image_encoder", "flf2v/transformer"} <= sizes.keys()
    assert "i2v/vae" not in sizes
    assert sum(sizes.values()) <= pack.LIMIT
    assert sorted(path.name for path in (tmp_path / "assets").iterdir()) == sorted(KINDS)


def test_what_is_there_is_packed(src: Path, tmp_path: Path) -> None:
    some = tmp_path / "some"
    some.mkdir()
    for name in ("vae.safetensors", "umt5.safetensors", "t2v.safetensors", "tokenizer"):
        (some / name).symlink_to(src / name)
    pack.pack(some, tmp_path / "assets")
    assert [path.name for path in (tmp_path / "assets").iterdir()] == ["t2v"]
    (some / "i2v.safetensors").symlink_to(src / "i2v.safetensors")
    with pytest.raises(ValueError, match=r"clip\.safetensors does not exist; run the stage 'i2v'"):
        pack.pack(some, tmp_path / "assets")
    assert [path.name for path in (tmp_path / "assets").iterdir()] == ["t2v"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("none", "has no DiT; needed is one of t2v, i2v, flf2v"),
        ("kind", "i2v.safetensors is of the kind t2v; i2v is needed"),
        ("lost", "wrong: the umt5 lacks "),
        ("nan", "of the vae holds NaN"),
        ("tokenizer", "tokenizer does not exist; run the stage 'tokenizer' before"),
    ],
)
def test_networks_that_do_not_fit(change: str, words: str, src: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    for item in src.iterdir():
        if change != "none" and (change, item.name) != ("tokenizer", "tokenizer"):
            (wrong / item.name).symlink_to(item)
    name = {"lost": "umt5", "nan": "vae"}.get(change)
    if name is not None:
        arrays, config = files.read(src / f"{name}.safetensors")
        first = sorted(arrays)[0]
        arrays = {k: a for k, a in arrays.items() if change == "nan" or k != first}
        if change == "nan":
            arrays[first].flat[0] = np.nan
        (wrong / f"{name}.safetensors").unlink()
        files.write(wrong / f"{name}.safetensors", arrays, config)
    if change == "kind":
        (wrong / "i2v.safetensors").unlink()
        (wrong / "i2v.safetensors").symlink_to(src / "t2v.safetensors")
    with pytest.raises(ValueError, match=words):
        pack.pack(wrong, tmp_path / "assets")
    assert not list((tmp_path / "assets").glob("*"))


def test_a_folder_of_somebody_else_stays(src: Path, tmp_path: Path) -> None:
    (tmp_path / "i2v").mkdir()
    (tmp_path / "i2v" / "mine").touch()
    with pytest.raises(ValueError, match="i2v is there and no checkpoint; give another folder"):
        pack.pack(src, tmp_path)
    assert (tmp_path / "i2v" / "mine").exists()


# The doors.


def test_the_picture_and_the_prompts_are_of_the_world(tmp_path: Path) -> None:
    assert pack.draw_picture(tmp_path / "picture.png") == shipped.PICTURE_PROMPT
    with Image.open(tmp_path / "picture.png") as one, Image.open(shipped.PICTURE) as other:
        assert other.size in world.FRAME_SIZES
        difference = np.asarray(one).astype(int) - np.asarray(other)
    assert np.abs(difference).max() <= 1  # rounded on another machine
    known = re.findall(r"\w+", shipped.KNOWS)
    for word in (*world.SHAPES, *world.COLOURS, *world.KINDS, *world.TONES, *world.SIZES):
        assert word in known, word


@pytest.mark.parametrize("kind", KINDS)
def test_the_miniature_has_names(assets: Path, kind: str) -> None:
    said: list[str] = []
    wan = wan_jax.load(f"mini-{kind}", offload=True, notify=said.append)
    assert wan.config.dit == networks.DITS[kind]
    assert said[0].startswith(
        "running the miniature, a small trained Wan; it knows one or two shapes"
    )
    assert "converting" in said[1]
    assert loading.fetch(f"mini-{kind}") == assets / kind
    assert loading.known_digest(assets / kind, dtype="bfloat16") == wan.digest
    assert shipped.default(KINDS.index(kind)) == f"mini-{kind}"
    if kind == "t2v":
        again: list[str] = []
        assert wan_jax.load(offload=True, notify=again.append).digest == wan.digest
        assert again == said[:1]


def test_installed_anew_it_is_not_converted_again(
    assets: Path, src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wan_jax.load("mini-t2v", offload=True)
    pack.pack(src, tmp_path / "elsewhere")
    monkeypatch.setattr(shipped, "ASSETS", tmp_path / "elsewhere")
    said: list[str] = []
    wan_jax.load("mini-t2v", offload=True, notify=said.append)
    assert len(said) == 1
    assert [p.name[:18] for p in (tmp_path / "home/wan_jax").iterdir()] == ["mini-t2v-bfloat16-"]


def test_a_folder_of_its_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert loading.is_small("mini-i2v")
    Path("mini-i2v").mkdir()
    assert loading.fetch("mini-i2v") == tmp_path / "mini-i2v"
    assert not loading.is_small("mini-i2v")


def _parse(*arguments: str, images: bool) -> flags.FlagValues:
    values = flags.FlagValues()
    cli.define_flags(IMAGE_TASKS if images else TEXT_TASKS, values, images=images)
    values(["run", *SMALL, *arguments])
    return values


def _plan(*arguments: str, images: bool = False) -> jobs.Plan:
    return jobs.plan(_parse(*arguments, images=images), ROOT / "configs")


def test_without_any_flag_there_is_a_prompt(
    assets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in ((), ("--ckpt_dir", "mini-t2v"), ("--ckpt_dir", "nano-t2v")):
        (job,) = _plan(*arguments).jobs
        assert job.settings["prompt"] == shipped.PROMPT
        said = capsys.readouterr().err
        assert "warning" not in said
        real = "--task t2v-1.3B --ckpt_dir Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
        assert (real in said) == (not arguments)
    assert job.request.negative == "blurry, static"
    plan = _plan("--ckpt_dir", str(assets / "t2v"))
    assert "cats" in plan.jobs[0].settings["prompt"]  # as the reference has it
    defaults = _plan().jobs[0]
    assert defaults.request.negative == captions.NEGATIVE_PROMPT
    assert defaults.request.guidance == networks.DEFAULTS.guidance


@pytest.mark.parametrize(
    ("arguments", "kind", "prompt", "real"),
    [
        ((), "i2v", shipped.PICTURE_PROMPT, "--task i2v-14B --ckpt_dir Wan-AI/Wan2.1-I2V-14B-720P"),
        (("--prompt", "A star grows."), "i2v", "A star grows.", "--task i2v-14B"),
        (("--image", "a.png", "--prompt", "x"), "i2v", "x", "--task i2v-14B"),
        (
            ("--first_frame", "a.png", "--last_frame", "a.png", "--prompt", "x"),
            "flf2v",
            "x",
            "--task flf2v-14B --ckpt_dir Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers",
        ),
    ],
)
def test_the_images_choose_the_miniature(
    arguments: tuple[str, ...],
    kind: str,
    prompt: str,
    real: str,
    assets: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Image.new("RGB", (32, 32)).save("a.png")
    plan = _plan(*arguments, images=True)
    assert plan.source == assets / kind
    (job,) = plan.jobs
    assert job.settings["prompt"] == prompt
    assert (job.images[0] == str(shipped.PICTURE)) == ("a.png" not in arguments)
    assert real in capsys.readouterr().err


def test_unknown_words_are_told(assets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _plan("--prompt", "Two cats box, 猫 and a RED circle's cats.")
    said = capsys.readouterr().err
    assert "warning: the miniature was not taught these words: cats, box, 猫, s\n" in said
    _plan("--prompt", " ".join(f"word{i}" for i in range(20)))
    assert "word7 and 12 more" in capsys.readouterr().err
    _plan("--prompt", "Two cats", "--ckpt_dir", "nano-t2v")
    assert "taught" not in capsys.readouterr().err


def test_a_task_needs_its_checkpoint(assets: Path) -> None:
    with pytest.raises(ValueError, match=r"--task t2v-1\.3B needs --ckpt_dir: .*T2V-1\.3B-Diff"):
        _plan("--task", "t2v-1.3B")


@pytest.mark.parametrize("images", [False, True])
def test_the_scripts_run_alone(assets: Path, images: bool) -> None:
    values = _parse("--save_file", "v.npz", images=images)
    runner.execute(values, jobs.plan(values, ROOT / "configs"))
    record = json.loads(Path("v.npz.json").read_text())
    assert record["checkpoint"] is None
    assert record["prompt"] == (shipped.PICTURE_PROMPT if images else shipped.PROMPT)
    assert record.get("images", []) == [str(shipped.PICTURE)] * images
    with np.load("v.npz") as saved:
        assert saved["frames"].shape[0] == 5
