"""A checkpoint folder as people have it on disk: which files hold which network, and its sizes."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from wan_jax.config import Defaults, DiTConfig, UMT5Config, VAEConfig, WanConfig, default_settings
from wan_jax.dit import DiT
from wan_jax.tokenizer import load_tokenizer
from wan_jax.umt5 import UMT5
from wan_jax.vae import VAE
from wan_jax.weights import dit, trees, umt5, vae
from wan_jax.weights.pth import PthReader
from wan_jax.weights.readers import SafetensorsReader, open_safetensors
from wan_jax.weights.rules import Shape, Table

PARTS = ("dit", "vae", "umt5")
DEFAULTS_FILE = "wan_jax.json"
VAE_PTH = "Wan2.1_VAE.pth"
UMT5_PTH = "models_t5_umt5-xxl-enc-bf16.pth"
PartConfig = DiTConfig | VAEConfig | UMT5Config


@dataclasses.dataclass(frozen=True)
class Source:
    """The files of one network, the naming they use, and the network's configuration."""

    part: str
    naming: str
    reader: SafetensorsReader | PthReader
    config: PartConfig
    table: Table


@dataclasses.dataclass(frozen=True)
class Folder:
    """Parts of a checkpoint in PyTorch files: only those that were asked for.

    sources: {part: source}. tokenizer: its folder, with "umt5" only. defaults: with "dit" only.
    """

    path: Path
    sources: dict[str, Source]
    tokenizer: Path | None
    defaults: Defaults | None

    @property
    def config(self) -> WanConfig:
        """The whole configuration; ValueError if the parts do not fit or one was not asked for."""
        missing = [part for part in PARTS if part not in self.sources]
        if missing or self.defaults is None:
            raise ValueError(f"{self.path} was opened without {missing}; the config needs all")
        parts: dict[str, Any] = {part: source.config for part, source in self.sources.items()}
        try:
            return WanConfig(**parts, defaults=self.defaults)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error


@functools.cache
def abstract_part(config: PartConfig, dtype: jnp.dtype) -> Any:
    """The network of this configuration with shapes in place of arrays.

    dtype is the compute dtype asked for; the VAE is float32 in either mode, as in the reference.
    """
    if isinstance(config, DiTConfig):
        return trees.abstract(lambda: DiT(config, rngs=nnx.Rngs(0), dtype=dtype))
    if isinstance(config, UMT5Config):
        return trees.abstract(lambda: UMT5(config, rngs=nnx.Rngs(0), dtype=dtype))
    return trees.abstract(lambda: VAE(config, rngs=nnx.Rngs(0)))


def part_table(config: PartConfig) -> Table:
    """The rules of the network of this configuration."""
    if isinstance(config, DiTConfig):
        return dit.TABLE
    return umt5.table(config) if isinstance(config, UMT5Config) else vae.table(config)


def open_folder(path: Path, parts: Sequence[str] = PARTS) -> Folder:
    """Find the parts asked for in the Diffusers or the original layout, or in a mixture.

    Raises ValueError naming what is missing and where it was looked for.
    """
    if (path / "transformer_2").is_dir():
        raise ValueError(f"{path} has a second transformer, as Wan2.2 does; Wan2.1 has one")
    openers = {"dit": _open_dit, "vae": _open_vae, "umt5": _open_umt5}
    sources = {part: openers[part](path) for part in parts}
    tokenizer = _tokenizer(path) if "umt5" in sources else None
    defaults = None
    if "dit" in sources:
        config = sources["dit"].config
        assert isinstance(config, DiTConfig)
        defaults = _defaults(path, config)
    return Folder(path, sources, tokenizer, defaults)


def _tokenizer(path: Path) -> Path:
    folders = (path / name for name in ("tokenizer", "google/umt5-xxl"))
    found = next((folder for folder in folders if folder.is_dir()), None)
    if found is None:
        raise ValueError(f"{path} has no tokenizer/ and no google/umt5-xxl/; one is needed")
    load_tokenizer(found)  # now, not when gigabytes have been converted
    return found


def _defaults(path: Path, config: DiTConfig) -> Defaults:
    file = path / DEFAULTS_FILE
    return Defaults.from_dict(_json(file)) if file.is_file() else default_settings(config)


def _json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file} is missing; it holds the network's dimensions") from None
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds a {type(values).__name__}; an object is needed")
    return values


def _configured(file: Path, read: Callable[[], PartConfig]) -> PartConfig:
    try:
        return read()
    except (KeyError, IndexError) as error:
        raise ValueError(f"{file} lacks {error}, a dimension of the network") from error
    except TypeError as error:
        raise ValueError(f"{file} has a value of the wrong type: {error}") from error
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _open_dit(path: Path) -> Source:
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    if not any(folder.glob("*.safetensors*")):
        raise ValueError(
            f"{path} has neither transformer/*.safetensors (Diffusers layout) nor "
            "diffusion_pytorch_model*.safetensors (original layout)"
        )
    reader = open_safetensors(folder)
    shapes: dict[str, Shape] = {name: shape for name, (shape, _) in reader.shapes().items()}
    file = folder / "config.json"
    values = _json(file)
    if "text_embedding.0.weight" in shapes:
        config = _configured(file, lambda: dit.config_from_wan(values, shapes))
        return Source("dit", "wan", reader, config, dit.TABLE)
    config = _configured(file, lambda: dit.config_from_diffusers(values))
    return Source("dit", "diffusers", reader, config, dit.TABLE)


def _open_vae(path: Path) -> Source:
    if (path / "vae").is_dir() or not (path / VAE_PTH).is_file():
        return _open_sub(path, "vae", vae.config_from_diffusers, VAE_PTH)
    return _open_pth(path / VAE_PTH, "vae", vae.config_from_shapes)


def _open_umt5(path: Path) -> Source:
    if (path / "text_encoder").is_dir() or not (path / UMT5_PTH).is_file():
        return _open_sub(path, "text_encoder", umt5.config_from_diffusers, UMT5_PTH)
    return _open_pth(path / UMT5_PTH, "umt5", umt5.config_from_shapes)


def _open_pth(
    file: Path, part: str, read: Callable[[Mapping[str, Shape], str], PartConfig]
) -> Source:
    """A network of the original layout, which keeps no dimensions but the shapes."""
    reader = PthReader(file)
    shapes = {name: shape for name, (shape, _) in reader.shapes().items()}
    config = _configured(file, lambda: read(shapes, "wan"))
    return Source(part, "wan", reader, config, part_table(config))


def _open_sub(
    path: Path, name: str, read: Callable[[dict[str, Any]], PartConfig], other: str
) -> Source:
    folder = path / name
    if not folder.is_dir():
        raise ValueError(
            f"{path} has neither {name}/ with safetensors and config.json (Diffusers layout) nor "
            f"{other} (original layout)"
        )
    file = folder / "config.json"
    values = _json(file)
    config = _configured(file, lambda: read(values))
    part = "umt5" if isinstance(config, UMT5Config) else "vae"
    return Source(part, "diffusers", open_safetensors(folder), config, part_table(config))
