"""Frozen dataclasses for every part of Wan2.1, the released architectures, and their JSON form.

Everything that shapes a network is a field here and nothing else is. A configuration is read from
a checkpoint's own files or from its tensor shapes, never from the name of a task.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any, Self

# Statistics of the released VAE's latents (Wan2.1 wan/modules/vae.py), one entry a channel.
_LATENTS_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
_LATENTS_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip

# The reference's negative prompt, a datum of the model: it was trained around such words.
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，"
    "低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，"
    "毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
I2V_NEGATIVE_PROMPT = f"镜头晃动，{NEGATIVE_PROMPT}"
FLF2V_NEGATIVE_PROMPT = f"镜头切换，{I2V_NEGATIVE_PROMPT}"

KINDS = ("t2v", "i2v", "flf2v")  # of checkpoints, by the number of images that they take
PARTS = ("dit", "vae", "umt5", "clip")  # the networks of a checkpoint; the last with images only


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(
            isinstance(value, int) and not isinstance(value, bool) and value > 0,
            f"{type(config).__name__}.{name} is {value!r}; a positive integer is needed",
        )


def _check_eps(config: Any) -> None:
    _require(
        isinstance(config.eps, float) and 0.0 < config.eps < 1.0,
        f"{type(config).__name__}.eps is {config.eps!r}; a number between 0 and 1 is needed",
    )


class _Json:
    """to_dict / from_dict for flat dataclasses; tuples become lists and come back as tuples."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(values) - known)
        _require(not unknown, f"{cls.__name__} has no field {unknown}; its fields: {sorted(known)}")
        plain = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**plain)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiTConfig(_Json):
    """The diffusion transformer. `in_channels` counts what enters the patch embedding.

    image_dim: width of the image tokens that the blocks attend to as well; None for text to video.
    image_positions: length of the learned table that is added to them, as for two images; or None.
    """

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    text_len: int = 512
    freq_dim: int = 256
    patch_size: tuple[int, ...] = (1, 2, 2)
    eps: float = 1e-6
    image_dim: int | None = None
    image_positions: int | None = None

    def __post_init__(self) -> None:
        for name in ("image_dim", "image_positions"):
            if getattr(self, name) is not None:
                _check_positive(self, name)
        _require(
            self.image_positions is None or self.image_dim is not None,
            "DiTConfig.image_positions needs an image_dim",
        )
        _check_positive(
            self, "dim", "ffn_dim", "num_heads", "num_layers", "in_channels", "out_channels"
        )
        _check_positive(self, "text_dim", "text_len", "freq_dim")
        _require(
            self.dim % self.num_heads == 0 and self.head_dim % 2 == 0,
            f"DiTConfig.dim {self.dim} must be an even multiple of num_heads {self.num_heads}",
        )
        _require(self.freq_dim % 2 == 0, f"DiTConfig.freq_dim {self.freq_dim} must be even")
        _check_eps(self)
        _require(
            len(self.patch_size) == 3 and min(self.patch_size) > 0,
            f"DiTConfig.patch_size is {self.patch_size}; three positive integers are needed",
        )

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def images(self) -> int:
        """How many images a video is made of: 0, 1, or 2 for a first and a last frame."""
        if self.image_dim is None:
            return 0
        return 1 if self.image_positions is None else 2

    @property
    def parts(self) -> tuple[str, ...]:
        """The networks that a checkpoint with this DiT has."""
        return PARTS if self.images else PARTS[:-1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAEConfig(_Json):
    """The causal 3D VAE. Latent channel c is stored as (x - latents_mean[c]) / latents_std[c]."""

    base_dim: int = 96
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_dim: int = 16
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = _LATENTS_MEAN
    latents_std: tuple[float, ...] = _LATENTS_STD

    def __post_init__(self) -> None:
        _check_positive(self, "base_dim", "num_res_blocks", "z_dim")
        _require(
            len(self.temporal_downsample) == len(self.dim_mult) - 1,
            "VAEConfig.temporal_downsample needs one entry fewer than dim_mult; got "
            f"{self.temporal_downsample} and {self.dim_mult}",
        )
        for name in ("latents_mean", "latents_std"):
            values = getattr(self, name)
            _require(
                len(values) == self.z_dim and all(map(math.isfinite, values)),
                f"VAEConfig.{name} needs {self.z_dim} finite numbers, got {len(values)}",
            )

    @property
    def spatial_stride(self) -> int:
        return 2 ** len(self.temporal_downsample)

    @property
    def temporal_stride(self) -> int:
        return 2 ** sum(self.temporal_downsample)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UMT5Config(_Json):
    """The UMT5 text encoder. Attention width is num_heads * head_dim."""

    vocab_size: int = 256384
    dim: int = 4096
    num_heads: int = 64
    head_dim: int = 64
    ffn_dim: int = 10240
    num_layers: int = 24
    num_buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6

    def __post_init__(self) -> None:
        _check_positive(self, "vocab_size", "dim", "num_heads", "head_dim", "ffn_dim", "num_layers")
        _check_positive(self, "num_buckets", "max_distance")
        _check_eps(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPConfig(_Json):
    """The vision tower of CLIP, for square images of image_size pixels.

    num_layers counts the blocks of the released tower. Wan2.1 leaves out the last one.
    """

    image_size: int = 224
    patch_size: int = 14
    dim: int = 1280
    num_heads: int = 16
    num_layers: int = 32
    ffn_dim: int = 5120
    eps: float = 1e-5

    def __post_init__(self) -> None:
        _check_positive(self, "image_size", "patch_size", "dim", "num_heads", "num_layers")
        _check_positive(self, "ffn_dim")
        _check_eps(self)
        _require(
            self.num_layers > 1,
            f"CLIPConfig.num_layers is {self.num_layers}; at least 2 are needed, for the last is "
            "left out",
        )
        for whole, part in (("dim", "num_heads"), ("image_size", "patch_size")):
            values = getattr(self, whole), getattr(self, part)
            _require(
                values[0] % values[1] == 0,
                f"CLIPConfig.{whole} {values[0]} must be a multiple of {part} {values[1]}",
            )

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.image_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        """Tokens of an image: its class and its patches."""
        return 1 + self.grid**2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Defaults(_Json):
    """What generate() uses for an argument that is None. size is (width, height) in pixels.

    shift_480p: the shift at sizes up to the area of 832*480, where it is not `shift`.
    """

    size: tuple[int, ...] = (1280, 720)
    frames: int = 81
    steps: int = 50
    guidance: float = 5.0
    shift: float = 5.0
    shift_480p: float | None = None
    solver: str = "unipc"
    negative_prompt: str = NEGATIVE_PROMPT
    fps: int = 16

    def shift_at(self, width: int, height: int) -> float:
        """The shift for a size in pixels."""
        small = self.shift_480p is not None and width * height <= 832 * 480
        return self.shift_480p if small else self.shift  # type: ignore[return-value]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WanConfig:
    """A whole checkpoint: its networks and its defaults. clip: None for text to video."""

    dit: DiTConfig
    vae: VAEConfig = VAEConfig()
    umt5: UMT5Config = UMT5Config()
    clip: CLIPConfig | None = None
    defaults: Defaults = Defaults()

    def __post_init__(self) -> None:
        self._check_image()
        _require(
            self.dit.out_channels == self.vae.z_dim,
            f"the DiT predicts {self.dit.out_channels} channels, the VAE has {self.vae.z_dim}",
        )
        _require(
            self.dit.text_dim == self.umt5.dim,
            f"the DiT reads text of width {self.dit.text_dim}, UMT5 writes {self.umt5.dim}",
        )

    def _check_image(self) -> None:
        dit, clip = self.dit, self.clip
        known = self.vae.z_dim + self.vae.temporal_stride if dit.images else 0
        _require(
            dit.in_channels == self.vae.z_dim + known,
            f"the DiT reads {dit.in_channels} channels; {self.vae.z_dim} of noise and {known} of "
            "known frames are needed",
        )
        _require(
            (clip is not None) == (dit.images > 0),
            "a checkpoint has a CLIP tower if its DiT takes an image, and only then",
        )
        if clip is not None:
            _require(
                clip.dim == dit.image_dim,
                f"the DiT reads image tokens of width {dit.image_dim}, CLIP writes {clip.dim}",
            )
            rows = dit.image_positions
            _require(
                rows is None or rows == 2 * clip.num_tokens,
                f"the DiT has positions for {rows} image tokens, two images have "
                f"{2 * clip.num_tokens}",
            )

    @property
    def images(self) -> int:
        """How many images a video is made of: 0, 1, or 2 for a first and a last frame."""
        return self.dit.images

    @property
    def size_multiple(self) -> int:
        """Widths and heights in pixels are multiples of this (VAE stride times DiT patch)."""
        return self.vae.spatial_stride * self.dit.patch_size[1]

    def to_json(self) -> str:
        sections = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        parts = {name: part.to_dict() for name, part in sections.items() if part is not None}
        return json.dumps(parts, indent=2, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        values = json.loads(text)
        kinds: dict[str, type[_Json]] = {
            "dit": DiTConfig,
            "vae": VAEConfig,
            "umt5": UMT5Config,
            "clip": CLIPConfig,
            "defaults": Defaults,
        }
        unknown = sorted(set(values) - set(kinds))
        _require(not unknown, f"config.json has unknown sections {unknown}; known: {list(kinds)}")
        parts: dict[str, Any] = {k: kinds[k].from_dict(part) for k, part in values.items()}
        return cls(**parts)


T2V_1_3B = WanConfig(
    dit=DiTConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30),
    defaults=Defaults(size=(832, 480)),
)
T2V_14B = WanConfig(dit=DiTConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40))
# The 480P and the 720P checkpoint: of one architecture, and the size decides the shift.
I2V_14B = WanConfig(
    dit=dataclasses.replace(T2V_14B.dit, in_channels=36, image_dim=1280),
    clip=CLIPConfig(),
    defaults=Defaults(steps=40, shift_480p=3.0, negative_prompt=I2V_NEGATIVE_PROMPT),
)
FLF2V_14B = WanConfig(
    dit=dataclasses.replace(I2V_14B.dit, image_positions=2 * CLIPConfig().num_tokens),
    clip=CLIPConfig(),
    defaults=Defaults(shift=16.0, negative_prompt=FLF2V_NEGATIVE_PROMPT),
)

# A few layers of everything: what tests are built from, and what random checkpoints are made of.
NANO_T2V = WanConfig(
    dit=DiTConfig(dim=96, ffn_dim=256, num_heads=2, num_layers=3, text_dim=64),
    vae=VAEConfig(base_dim=16),
    umt5=UMT5Config(vocab_size=384, dim=64, num_heads=4, head_dim=16, ffn_dim=128, num_layers=3),
    defaults=Defaults(size=(128, 96), frames=17, steps=20, negative_prompt="blurry, static"),
)
NANO_I2V = dataclasses.replace(
    NANO_T2V,
    dit=dataclasses.replace(NANO_T2V.dit, in_channels=36, image_dim=64),
    clip=CLIPConfig(image_size=56, dim=64, num_heads=4, num_layers=4, ffn_dim=256),
)
NANO_FLF2V = dataclasses.replace(
    NANO_I2V, dit=dataclasses.replace(NANO_I2V.dit, image_positions=2 * (1 + 4**2))
)

RELEASED = {
    "t2v-1.3B": T2V_1_3B,
    "t2v-14B": T2V_14B,
    "i2v-14B": I2V_14B,
    "flf2v-14B": FLF2V_14B,
}


def default_settings(dit: DiTConfig) -> Defaults:
    """Defaults of the released checkpoint with this DiT, or of the 14B of its kind."""
    for released in RELEASED.values():
        if released.dit == dit:
            return released.defaults
    return RELEASED[f"{KINDS[dit.images]}-14B"].defaults
