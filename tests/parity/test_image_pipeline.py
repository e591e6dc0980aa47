"""Image to video as a whole against the reference's procedure, in torch on the CPU.

Both read one folder on disk, which diffusers and transformers wrote. The reference is their
networks, called by hand in the original's order, as diffusers' own pipeline differs from it in
sizes, resizing, what CLIP sees, negative prompt and schedule.
"""

import dataclasses
import html
import math
from pathlib import Path
from typing import Any, Self

import ftfy
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanTransformer3DModel,
)
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    UMT5Config,
    UMT5EncoderModel,
)

import wan_jax
from tests import tolerances
from tests.parity import test_conditioning as reference
from tests.parity.test_dit import torch_model
from tests.random_weights import random_state_dict, relative_l2
from wan_jax.config import NEGATIVE_PROMPT, DiTConfig
from wan_jax.tokenizer import write_byte_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB, TEXT, CLIP_DIM, STEPS, GUIDANCE = 384, 64, 48, 6, 5.0
SIZE = (64, 48)
PROMPTS = ("The camera follows a dog along the shore.", "雪落在屋顶上。")
# Each kind's own, and its shift at this size.
NEGATIVE = {
    "i2v": "镜头晃动，" + NEGATIVE_PROMPT,
    "flf2v": "镜头切换，镜头晃动，" + NEGATIVE_PROMPT,
}
SHIFT = {"i2v": 3.0, "flf2v": 16.0}
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class Case:
    """What is generated; `native` is (height, width) of the images, `video` that of the video."""

    kind: str
    native: tuple[int, int]
    video: tuple[int, int]
    frames: int
    prompts: tuple[str, ...] = PROMPTS[:1]
    num_videos: int = 1
    solver: str = "unipc"

    @property
    def texts(self) -> list[str]:
        """The prompt of every video."""
        return [prompt for prompt in self.prompts for _ in range(self.num_videos)]

    @property
    def noise(self) -> np.ndarray:
        """[b, t, h, w, c] float32."""
        rows, columns = (side // 8 for side in self.video)
        shape = (len(self.texts), 1 + (self.frames - 1) // 4, rows, columns, 16)
        return np.random.RandomState(3).standard_normal(shape).astype(np.float32)

    def files(self, folder: Path) -> list[Path]:
        return reference.photographs(folder, *[self.native] * (1 + (self.kind == "flf2v")))


CASES = {
    "i2v": Case("i2v", (70, 100), (32, 64), 9, prompts=PROMPTS),
    "i2v-long": Case("i2v", (101, 67), (64, 32), 17),
    "i2v-diffusers": Case("i2v", (70, 100), (32, 64), 9, solver="unipc_diffusers"),
    "flf2v": Case("flf2v", (70, 100), (32, 64), 17, num_videos=2),
}


# The checkpoints.


def _randomised(model: Any) -> Any:
    arrays = random_state_dict({k: tuple(v.shape) for k, v in model.state_dict().items()})
    if "decoder.conv_out.weight" in arrays:
        # Fainter frames than these weights would give: what the clamp cuts cannot differ.
        arrays["decoder.conv_out.weight"] *= 0.3
    model.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    return model.eval().requires_grad_(False)


def _write(folder: Path, kind: str) -> None:
    write_byte_tokenizer(folder / "bytes", vocab_size=VOCAB)
    text = UMT5Config(vocab_size=VOCAB, d_model=TEXT, d_kv=16, d_ff=128, num_layers=3, num_heads=4)
    vision = CLIPVisionConfig(
        hidden_size=CLIP_DIM,
        intermediate_size=112,
        num_hidden_layers=4,
        num_attention_heads=3,
        image_size=56,
        patch_size=14,
        hidden_act="gelu",
    )
    dit = DiTConfig(
        dim=96,
        ffn_dim=160,
        num_heads=3,
        num_layers=3,
        in_channels=36,
        text_dim=TEXT,
        freq_dim=64,
        image_dim=CLIP_DIM,
        image_positions=2 * (1 + 4**2) if kind == "flf2v" else None,
    )
    WanImageToVideoPipeline(
        tokenizer=AutoTokenizer.from_pretrained(folder / "bytes"),
        text_encoder=_randomised(UMT5EncoderModel(text)),
        vae=_randomised(AutoencoderKLWan(base_dim=16)),
        scheduler=UniPCMultistepScheduler(),
        image_processor=CLIPImageProcessor(),
        image_encoder=_randomised(CLIPVisionModel(vision)),
        transformer=torch_model(dit),
    ).save_pretrained(folder / "checkpoint")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """{"i2v", "flf2v": a checkpoint as diffusers writes it}."""
    root = tmp_path_factory.mktemp("checkpoints")
    for kind in SHIFT:
        _write(root / kind, kind)
    return {kind: root / kind / "checkpoint" for kind in SHIFT}


@pytest.fixture(scope="module")
def ours(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, wan_jax.Wan]:
    cache = tmp_path_factory.mktemp("cache")
    return {
        kind: wan_jax.load(folder, dtype="float32", cache_dir=cache)
        for kind, folder in folders.items()
    }


@pytest.fixture(scope="module")
def theirs(folders: dict[str, Path]) -> dict[str, "Networks"]:
    return {kind: Networks.load(folder) for kind, folder in folders.items()}


# The reference.


class Sinusoid(torch.nn.Module):
    """The original's embedding of timesteps, from float64; diffusers' is from float32."""

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        half = 32
        spectrum = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = timesteps.double()[:, None] * spectrum
        return torch.cat([angles.cos(), angles.sin()], dim=-1).float()


@dataclasses.dataclass(frozen=True)
class Networks:
    """Diffusers' and transformers' modules of a checkpoint; tensors are channels first."""

    tokenizer: Any
    umt5: Any
    clip: Any
    dit: Any
    vae: Any

    @classmethod
    def load(cls, folder: Path) -> Self:
        dit = WanTransformer3DModel.from_pretrained(folder / "transformer")
        dit.condition_embedder.timesteps_proj = Sinusoid()
        networks = cls(
            AutoTokenizer.from_pretrained(folder / "tokenizer"),
            UMT5EncoderModel.from_pretrained(folder / "text_encoder"),
            CLIPVisionModel.from_pretrained(folder / "image_encoder"),
            dit,
            AutoencoderKLWan.from_pretrained(folder / "vae"),
        )
        for network in (networks.umt5, networks.clip, networks.dit, networks.vae):
            network.eval().requires_grad_(False).float()
        return networks

    def text(self, prompts: list[str]) -> torch.Tensor:
        """[b, 512, d], zero behind each text."""
        # The wide commas of the negative prompt become narrow here.
        unescaped = [html.unescape(html.unescape(ftfy.fix_text(prompt))) for prompt in prompts]
        cleaned = [" ".join(prompt.split()) for prompt in unescaped]
        tokens = self.tokenizer(cleaned, padding="max_length", max_length=512, return_tensors="pt")
        assert tokens.attention_mask.shape == (len(prompts), 512)
        states = self.umt5(tokens.input_ids, attention_mask=tokens.attention_mask)
        return states.last_hidden_state * tokens.attention_mask[..., None]

    def tokens(self, images: list[torch.Tensor]) -> torch.Tensor:
        """[images, s, d] before CLIP's last block, of the whole images squashed to a square."""
        side = self.clip.config.image_size
        views = torch.stack([reference.resize(image, side, side) for image in images])
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
        pixels = (views * 0.5 + 0.5 - mean) / std
        return self.clip(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]

    def velocity(
        self, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor, known: "Conditions"
    ) -> torch.Tensor:
        """A single pass, [b, z, t, h, w]."""
        b = x.shape[0]
        return self.dit(
            hidden_states=torch.cat([x, known.channels.expand(b, -1, -1, -1, -1)], dim=1),
            timestep=t.expand(b),
            encoder_hidden_states=text,
            encoder_hidden_states_image=known.tokens.repeat(b, 1, 1),  # by video, then by image
            return_dict=False,
        )[0]

    def frames(self, latents: torch.Tensor) -> np.ndarray:
        """[b, f, y, x, 3] in -1..1."""
        mean, std = (
            torch.tensor(values).view(1, -1, 1, 1, 1)
            for values in (self.vae.config.latents_mean, self.vae.config.latents_std)
        )
        pixels = self.vae.decode(latents / (1 / std) + mean).sample.clamp(-1, 1)
        return pixels.permute(0, 2, 3, 4, 1).numpy()


@dataclasses.dataclass(frozen=True)
class Conditions:
    """channels: [1, 4 + z, t, h, w]. tokens: [images, s, d]."""

    channels: torch.Tensor
    tokens: torch.Tensor


def _scheduler(case: Case) -> UniPCMultistepScheduler:
    """The update is the same in both; the noise levels are the original's or diffusers' own."""
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT[case.kind]
    )
    scheduler.set_timesteps(STEPS)
    if case.solver == "unipc":
        even = float(np.float32(0.999)) * (1 - np.arange(STEPS) / STEPS)
        sigmas = SHIFT[case.kind] * even / (1 + (SHIFT[case.kind] - 1) * even)
        scheduler.timesteps = torch.from_numpy((1000 * sigmas).astype(np.int64))
        scheduler.sigmas = torch.from_numpy(np.append(sigmas, 0).astype(np.float32))
    return scheduler


def _generate_torch(networks: Networks, case: Case, paths: list[Path]) -> torch.Tensor:
    """Latents [b, z, t, h, w]."""
    images = [reference.read(path) for path in paths]
    area = math.prod(SIZE)
    assert reference.video_size(images[0], area) == case.video
    known = Conditions(
        reference.channels(networks.vae, images, area=area, frames=case.frames),
        networks.tokens(images),
    )
    positive = networks.text(case.texts)
    negative = networks.text([NEGATIVE[case.kind]]).expand_as(positive)
    latents = torch.from_numpy(case.noise).permute(0, 4, 1, 2, 3)
    scheduler = _scheduler(case)
    for t in scheduler.timesteps:
        wanted = networks.velocity(latents, t, positive, known)
        unwanted = networks.velocity(latents, t, negative, known)
        guided = unwanted + GUIDANCE * (wanted - unwanted)
        latents = scheduler.step(guided, t, latents, return_dict=False)[0]
    return latents


# Comparison.


def _latents(wan: wan_jax.Wan, case: Case, paths: list[Path], **changes: Any) -> np.ndarray:
    """Ours [b, t, h, w, z]; negative prompt, guidance and shift are the checkpoint's own."""
    arguments: dict[str, Any] = {
        "image": paths[0],
        "last_image": paths[1] if len(paths) > 1 else None,
        "size": SIZE,
        "frames": case.frames,
        "steps": STEPS,
        "solver": case.solver,
        "noise": case.noise,
        "num_videos": case.num_videos,
        "output": "latents",
    }
    return wan.generate(case.prompts, **(arguments | changes))


def _psnr(value: np.ndarray, truth: np.ndarray) -> float:
    error = np.mean(np.square(value.astype(np.float64) - truth))
    return float(10.0 * np.log10(2.0**2 / error))


@pytest.mark.parametrize("name", CASES)
def test_generation_equals_the_reference(
    name: str, ours: dict[str, wan_jax.Wan], theirs: dict[str, Networks], tmp_path: Path
) -> None:
    case = CASES[name]
    wan, networks, paths = ours[case.kind], theirs[case.kind], case.files(tmp_path)
    truth = _generate_torch(networks, case, paths)
    wanted = networks.frames(truth)
    latents = _latents(wan, case, paths)
    frames = np.concatenate(list(wan.decode(latents, dtype="float32")), axis=1)
    assert frames.shape == wanted.shape == (len(case.texts), case.frames, *case.video, 3)
    assert np.mean(np.abs(wanted) == 1.0) < tolerances.PIPELINE_CLAMPED_SHARE
    error = relative_l2(latents, truth.permute(0, 2, 3, 4, 1).numpy())
    assert error <= tolerances.IMAGE_PIPELINE_LATENTS
    assert _psnr(frames, wanted) >= tolerances.IMAGE_PIPELINE_PSNR


@pytest.mark.parametrize("name", ["i2v", "flf2v"])
def test_the_comparison_sees_images_text_and_solver(
    name: str, ours: dict[str, wan_jax.Wan], tmp_path: Path
) -> None:
    """Every part that the comparison is to prove moves the latents far more than its bound."""
    case = CASES[name]
    wan, paths = ours[case.kind], case.files(tmp_path)
    latents = _latents(wan, case, paths)
    grey = np.full((*case.native, 3), 128, np.uint8)
    changes: list[dict[str, Any]] = [
        *({place: grey} for place in ("image", "last_image")[: len(paths)]),
        {"negative_prompt": ""},
        {"guidance": 5.5},
        {"shift": 5.0},
        {"solver": "dpm++"},
    ]
    for change in changes:
        moved = relative_l2(_latents(wan, case, paths, **change), latents)
        assert moved >= tolerances.PIPELINE_MATTERS, change
