"""Where each network of a checkpoint lies: the layouts of folders that people have."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

from wan_jax.weights import repacks
from wan_jax.weights.pth import PthReader
from wan_jax.weights.readers import (
    FileReader,
    SafetensorsReader,
    list_safetensors,
    open_index,
    read_index,
)

VAE_PTH = "Wan2.1_VAE.pth"
UMT5_PTH = "models_t5_umt5-xxl-enc-bf16.pth"
CLIP_PTH = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
# Where a network is looked for under a folder, in this order: Diffusers, original, ComfyUI.
PLACES = {
    "dit": ("transformer", "", "diffusion_models", "unet"),
    "vae": ("vae", ""),
    "umt5": ("text_encoder", "", "text_encoders", "clip"),
    "clip": ("image_encoder", "", "clip_vision"),
}
# What the original keeps in a .pth.
PTH = {"vae": VAE_PTH, "umt5": UMT5_PTH, "clip": CLIP_PTH}
# What is written into a folder of the Diffusers layout, without what comes after the names.
DIFFUSERS = {
    "dit": Path("transformer/diffusion_pytorch_model"),
    "vae": Path("vae/diffusion_pytorch_model"),
    "umt5": Path("text_encoder/model"),
    "clip": Path("image_encoder/model"),
}
_LOOKED_FOR = {
    "dit": "transformer/*.safetensors (Diffusers layout) nor diffusion_pytorch_model*.safetensors "
    "(original layout) nor diffusion_models/*.safetensors (ComfyUI) with a DiT of Wan2.1",
    "vae": "vae/ with safetensors and config.json (Diffusers layout) nor Wan2.1_VAE.pth or "
    ".safetensors (original layout) nor vae/*.safetensors (ComfyUI) with a VAE of Wan2.1",
    "umt5": "text_encoder/ with safetensors and config.json (Diffusers layout) nor "
    "models_t5_umt5-xxl-enc-bf16.pth or .safetensors (original layout) nor "
    "text_encoders/*.safetensors (ComfyUI) with a UMT5 encoder",
    "clip": "image_encoder/ with safetensors and config.json (Diffusers layout) nor "
    f"{CLIP_PTH} or .safetensors (original layout) nor clip_vision/*.safetensors (ComfyUI) with a "
    "vision tower of CLIP",
}
_TITLES = {"dit": "DiT", "vae": "VAE", "umt5": "UMT5", "clip": "CLIP"}
_SHARD = re.compile(r"-\d+-of-\d+\.safetensors$")


@dataclasses.dataclass(frozen=True)
class Unit:
    """One file, or the shards of one index, and the networks it holds."""

    reader: FileReader
    claims: Mapping[str, repacks.Claim]
    index: Path | None = None


class Search:
    """The files under a path; each is opened once, whatever number of parts is looked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path if path.is_file() else None
        self.base = path.parent if path.is_file() else path
        self._units: dict[Path, list[Unit]] = {}
        if self.file is None and not path.is_dir():
            raise ValueError(f"{path} is not a folder and not a file; a checkpoint is needed")
        if any((path / name).is_dir() for name in ("transformer_2", "high_noise_model")):
            raise ValueError(f"{path} has a second transformer, as Wan2.2 does; Wan2.1 has one")

    def find(self, part: str) -> tuple[Unit, str]:
        """The unit that holds a network, and the place it was found in ("" is the top)."""
        if self.file is not None:
            return _holding(self._cached(self.file)[0], part), ""
        folders = [
            (base / place, place)
            for base in (self.path, self.path / "split_files")  # as in ComfyUI's repository
            for place in PLACES[part]
            if (base / place).is_dir()
        ]
        for folder, place in folders:
            unit = self._in_folder(folder, part, top=place == "")
            if unit is not None:
                return _holding(unit, part), place
        repacks.check_gguf([file for folder, _ in folders for file in sorted(folder.iterdir())])
        raise ValueError(f"{self.path} has neither {_LOOKED_FOR[part]}")

    def _in_folder(self, folder: Path, part: str, *, top: bool) -> Unit | None:
        units = [unit for unit in self._cached(folder) if part in unit.claims]
        pth = folder / PTH.get(part, "")
        if top and part in PTH and pth.is_file():
            units += self._cached(pth)
        indexes = [unit.index.name for unit in units if unit.index is not None]
        if len(indexes) > 1:
            raise ValueError(
                f"{folder} has {len(indexes)} index files {indexes}; one is needed for the "
                f"{_TITLES[part]}"
            )
        lone = [unit for unit in self._cached(folder) if unit.index is None]
        shards = [unit for unit in lone if _SHARD.search(unit.reader.files[0].name)]
        if shards and (not units or any(unit in shards for unit in units)):
            names = [unit.reader.files[0].name for unit in lone]
            raise ValueError(
                f"{folder} needs one .safetensors file, or several and an index; found "
                f"{len(names)} without an index: {names}"
            )
        if len(units) > 1:
            found = [unit.reader.files[0].name for unit in units]
            raise ValueError(
                f"{folder} has {len(found)} files with a {_TITLES[part]}: {found}; keep one there, "
                "or give the file itself"
            )
        return units[0] if units else None

    def _cached(self, place: Path) -> list[Unit]:
        if place not in self._units:
            self._units[place] = _folder_units(place) if place.is_dir() else [_file_unit(place)]
        return self._units[place]


def _holding(unit: Unit, part: str) -> Unit:
    """The unit; ValueError naming its file if it does not hold the network."""
    if part not in unit.claims:
        shapes = {name: shape for name, (shape, _) in unit.reader.shapes().items()}
        repacks.check_task(shapes, unit.reader.files[0])
        others = ", ".join(_TITLES[other] for other in unit.claims) or "nothing that is known"
        raise ValueError(
            f"{unit.reader.files[0]} holds no {_TITLES[part]} of Wan2.1; its {len(shapes)} tensors "
            f"are those of {others}"
        )
    return unit


def _unit(reader: FileReader, index: Path | None = None) -> Unit:
    return Unit(reader, repacks.find_claims(reader.shapes().keys()), index)


def _folder_units(folder: Path) -> list[Unit]:
    indexes, files = list_safetensors(folder)
    units = [_unit(open_index(index), index) for index in indexes]
    sharded = {file for unit in units for file in unit.reader.files}
    return units + [_unit(SafetensorsReader([file])) for file in files if file not in sharded]


def _file_unit(file: Path) -> Unit:
    """A file given by itself; one of several shards stands for all that its index names."""
    repacks.check_gguf([file])
    if file.suffix in (".pth", ".pt", ".bin"):
        return _unit(PthReader(file))
    if file.suffix != ".safetensors":
        raise ValueError(f"{file} is not a folder and not a .safetensors or .pth file")
    for index in list_safetensors(file.parent)[0]:
        if file.name in read_index(index).values():
            return _unit(open_index(index), index)
    return _unit(SafetensorsReader([file]))
