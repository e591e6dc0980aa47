"""A checkpoint as people have it on disk: which files hold which network, and its sizes."""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from wan_jax.clip import CLIP
from wan_jax.config import (
    PARTS,
    CLIPConfig,
    Defaults,
    DiTConfig,
    UMT5Config,
    VAEConfig,
    WanConfig,
    default_settings,
)
from wan_jax.dit import DiT
from wan_jax.tokenizer import load_tokenizer
from wan_jax.umt5 import UMT5
from wan_jax.vae import VAE
from wan_jax.weights import clip, dit, quantization, repacks, trees, umt5, vae
from wan_jax.weights.facts import one_line, read_json
from wan_jax.weights.hashes import FileHashes
from wan_jax.weights.layouts import Search
from wan_jax.weights.readers import FileReader
from wan_jax.weights.rules import Shape, Table

DEFAULTS_FILE = "wan_jax.json"
CONFIG_FILE = "config.json"
PartConfig = DiTConfig | VAEConfig | UMT5Config | CLIPConfig
TABLES: dict[str, ModuleType] = {"dit": dit, "vae": vae, "umt5": umt5, "clip": clip}

TOKENIZERS = ("tokenizer", "google/umt5-xxl")
_MAX_SIZE = 2**20  # no dimension of a network is larger; UMT5's vocabulary has 256384


@dataclasses.dataclass(frozen=True)
class Source:
    """The files of one network, the naming they use, and the network's configuration."""

    part: str
    naming: str
    reader: FileReader
    config: PartConfig
    table: Table


@dataclasses.dataclass(frozen=True)
class Folder:
    """Parts of a checkpoint in PyTorch files: only those that were asked for.

    path: the folder, or the one file. sources: {part: source}. tokenizer: its folder, with "umt5"
    only. defaults: with "dit" only.
    """

    path: Path
    sources: dict[str, Source]
    tokenizer: Path | None
    defaults: Defaults | None

    @property
    def missing(self) -> list[str]:
        """What a whole checkpoint has and was not asked for; its DiT says what that is."""
        if "dit" not in self.sources:
            return ["dit"]
        return [part for part in _needed(self.sources["dit"]) if part not in self.sources]

    @property
    def config(self) -> WanConfig:
        """The whole configuration; ValueError if the parts do not fit or one was not asked for."""
        if self.missing or self.defaults is None:
            raise ValueError(f"{self.path} was opened without {self.missing}; the config needs all")
        parts: dict[str, Any] = {part: source.config for part, source in self.sources.items()}
        try:
            return WanConfig(**parts, defaults=self.defaults)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error

    def key(self, facts: Sequence[str], *, contents: bool) -> str:
        """A short name for what converting this folder as these facts say would give.

        contents: by the files' contents, so that all machines agree; else by their places, sizes
        and times, which are known at once.
        """
        assert self.tokenizer is not None
        found = list(facts)
        files = [file for source in self.sources.values() for file in source.reader.files]
        files = [*dict.fromkeys(files), self.tokenizer / "tokenizer.json"]
        if contents:
            with FileHashes(files) as hashes:
                found += [hashes.of(file) for file in files]
        else:
            found.append(str(self.path.resolve()))
            for file in files:
                status = file.stat()
                found.append(f"{file.resolve()} {status.st_size} {status.st_mtime_ns}")
        return hashlib.sha256("\n".join(found).encode()).hexdigest()[:12]


@functools.cache
def sizes(
    config: WanConfig,
    dtype: jnp.dtype,
    vae_dtype: jnp.dtype = jnp.float32,
    kind: str | None = None,
) -> dict[str, int]:
    """{network: bytes of its weights on a device}; dtypes and kind as abstract_part() has them."""

    def size(part: str) -> int:
        network = abstract_part(getattr(config, part), dtype, vae_dtype, kind)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(network))

    return {part: size(part) for part in config.dit.parts}


def abstract_part(
    config: PartConfig,
    dtype: jnp.dtype,
    vae_dtype: jnp.dtype = jnp.float32,
    kind: str | None = None,
) -> Any:
    """The network of this configuration with shapes in place of arrays.

    dtype is the compute dtype asked for. The VAE has its own, and by default float32 in either
    mode, as in the reference. kind: in which way the DiT is quantised, None for none.
    """
    made = _abstract_part(config, jnp.dtype(dtype), jnp.dtype(vae_dtype), kind)
    return jax.tree.map(lambda leaf: leaf, made)  # the caller's own


@functools.cache
def _abstract_part(
    config: PartConfig, dtype: jnp.dtype, vae_dtype: jnp.dtype, kind: str | None
) -> Any:
    """To trace a network's making takes up to a second."""
    if isinstance(config, DiTConfig):
        whole = trees.abstract(lambda: DiT(config, rngs=nnx.Rngs(0), dtype=dtype))
        return quantization.abstract(whole, kind)
    if isinstance(config, UMT5Config):
        return trees.abstract(lambda: UMT5(config, rngs=nnx.Rngs(0), dtype=dtype))
    if isinstance(config, CLIPConfig):
        # In float16, as in the original, its error is 1e-3; it would be 7e-3 in bfloat16.
        half = jnp.dtype("float16") if dtype == jnp.bfloat16 else dtype
        return trees.abstract(lambda: CLIP(config, rngs=nnx.Rngs(0), dtype=half))
    return trees.abstract(lambda: VAE(config, rngs=nnx.Rngs(0), dtype=vae_dtype))


def part_table(config: PartConfig) -> Table:
    """The rules of the network of this configuration."""
    if isinstance(config, DiTConfig):
        return dit.table(config)
    if isinstance(config, UMT5Config):
        return umt5.table(config)
    return clip.table(config) if isinstance(config, CLIPConfig) else vae.table(config)


def open_folder(path: Path, parts: Sequence[str] | None = None) -> Folder:
    """Find the parts asked for in a folder or one file, whoever arranged it.

    path: a folder in the Diffusers, the original or ComfyUI's layout or a mixture of them, or a
    file that holds every part asked for. parts: None is the DiT and what it needs, so CLIP if it
    takes an image. Only headers are read. Raises ValueError naming what is missing and where it
    was looked for, or what is wrong with a file.
    """
    unknown = [part for part in parts or () if part not in PARTS]
    if unknown:
        raise ValueError(f"a checkpoint has no parts {unknown}; it has {list(PARTS)}")
    try:
        search = Search(path)
        sources = {"dit": _open(search, "dit")} if parts is None else {}
        for part in _needed(sources["dit"]) if parts is None else parts:
            if part not in sources:
                sources[part] = _open(search, part)
        tokenizer = _tokenizer(search, sources["umt5"]) if "umt5" in sources else None
        defaults = _defaults(search.base, sources["dit"].config) if "dit" in sources else None
    except OSError as error:  # such as a folder that may not be entered
        raise ValueError(f"{path} cannot be read: {one_line(error)}") from error
    return Folder(path, sources, tokenizer, defaults)


def _needed(source: Source) -> tuple[str, ...]:
    """The parts of a checkpoint with this DiT."""
    assert isinstance(source.config, DiTConfig)
    return source.config.parts


def _open(search: Search, part: str) -> Source:
    unit, place = search.find(part)
    naming = unit.claims[part].naming
    reader = repacks.take(unit.reader, unit.claims, part)
    repacks.check_precision(reader)
    shapes = {name: shape for name, (shape, _) in reader.shapes().items()}
    file = reader.files[0]
    if part == "dit":
        repacks.check_task(shapes, file)
    described = file.parent / CONFIG_FILE
    values = _description(search, part, described, own=place != "")
    config = _configured(
        file if values is None else described, part, shapes, naming=naming, values=values
    )
    return Source(part, naming, reader, config, part_table(config))


def _description(search: Search, part: str, file: Path, *, own: bool) -> dict[str, Any] | None:
    """What the config.json beside a network's files says, or None if there is none of it.

    own: the folder is this network's alone. Raises ValueError if a Diffusers folder lacks it.
    """
    if not file.is_file():
        if own and (search.path / "model_index.json").is_file():
            raise ValueError(f"{file} is missing; it holds the network's dimensions")
        return None
    values = read_json(file)
    others = {
        "vae": values.get("_class_name") == "AutoencoderKLWan" or "base_dim" in values,
        "umt5": values.get("model_type") == "umt5" or "d_model" in values,
        "clip": values.get("model_type") == "clip_vision_model" or "hidden_size" in values,
    }
    kind = next((name for name, found in others.items() if found), "dit")
    return values if own or kind == part else None


def _configured(
    file: Path,
    part: str,
    shapes: Mapping[str, Shape],
    *,
    naming: str,
    values: Mapping[str, Any] | None,
) -> PartConfig:
    """From config.json where there is one, else from the shapes; ValueError naming the file."""
    try:
        config = _read_config(part, shapes, naming=naming, values=values)
        _check_sizes(config, len(shapes))
        return config
    except (KeyError, IndexError) as error:
        text = f"{file} lacks {one_line(error)}, a dimension of the network"
        raise ValueError(text) from error
    except (TypeError, ArithmeticError) as error:
        raise ValueError(f"{file} has a value of the wrong type: {one_line(error)}") from error
    except ValueError as error:
        raise ValueError(f"{file}: {one_line(error)}") from error


def _read_config(
    part: str, shapes: Mapping[str, Shape], *, naming: str, values: Mapping[str, Any] | None
) -> PartConfig:
    if values is None:
        return TABLES[part].config_from_shapes(shapes, naming)
    if part == "dit" and not {"num_attention_heads", "attention_head_dim"} & set(values):
        return dit.config_from_wan(values, shapes, naming=naming)
    return TABLES[part].config_from_diffusers(values)


def _check_sizes(config: PartConfig, tensors: int) -> None:
    """Raise ValueError for sizes that no network has, before anything is made of them."""
    for name, value in dataclasses.asdict(config).items():
        several = value if isinstance(value, tuple) else (value,)
        if any(isinstance(size, int) and size > _MAX_SIZE for size in several):
            raise ValueError(f"{name} is {value!r}, more than any network has")
        layers = name in ("num_layers", "num_res_blocks") and value > tensors
        if layers or len(several) > max(tensors, 64):
            raise ValueError(f"{name} is {value!r}, and there are {tensors} tensors")


def _tokenizer(search: Search, source: Source) -> Path:
    """The tokenizer's folder; ValueError if there is none or its tokens are not this encoder's."""
    own = source.reader.files[0].parent
    bases = [search.base, own]
    if search.file is not None or own != search.base:
        bases.append(own.parent)
    found = [base / name for base in bases for name in TOKENIZERS if (base / name).is_dir()]
    if not found:
        raise ValueError(
            f"{search.path} has no tokenizer/ and no google/umt5-xxl/; one is needed, with the "
            "tokenizer.json of google/umt5-xxl"
        )
    tokenizer = load_tokenizer(found[0])  # now, not when gigabytes have been converted
    config = source.config
    assert isinstance(config, UMT5Config)
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise ValueError(
            f"{found[0]} has {tokenizer.get_vocab_size()} tokens and the text encoder "
            f"{config.vocab_size}; they do not belong together"
        )
    return found[0]


def _defaults(base: Path, config: PartConfig) -> Defaults:
    """From wan_jax.json where there is one; ValueError naming it if a value is none of its kind."""
    assert isinstance(config, DiTConfig)
    file = base / DEFAULTS_FILE
    if not file.is_file():
        return default_settings(config)
    try:
        found = Defaults.from_dict(read_json(file))
    except ValueError as error:
        text = one_line(error)
        raise ValueError(text if text.startswith(str(file)) else f"{file}: {text}") from error
    for field in dataclasses.fields(Defaults):
        value, usual = getattr(found, field.name), field.default
        kinds = (int, float, type(usual)) if isinstance(usual, float | None) else (type(usual),)
        fits = type(value) in kinds and (type(value) is not float or math.isfinite(value))
        if fits and field.name == "size":
            fits = [type(side) for side in value] == [int, int]
        if not fits:
            shown = repr(value)[:100]
            like = "a number or null" if usual is None else f"one like {usual!r}"
            raise ValueError(f"{file} has {field.name} = {shown}; {like} is needed")
    return found
