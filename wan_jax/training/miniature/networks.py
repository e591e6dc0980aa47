"""What the miniature is made of: its networks before they are trained, and its defaults."""

from wan_jax.config import CLIPConfig, Defaults, DiTConfig, UMT5Config, VAEConfig
from wan_jax.training.miniature import captions, world

VOCABULARY = 512  # all words of the captions, the bytes, and some room
TEXT_DROPOUT = 0.1  # share of clips that are shown without their caption
SPOILED = 0.04  # share of clips that show what the negative prompt says
TEXT_TOKENS = 64  # that captions are cut to in training; the longest have about 40

# Latents are not normalised until the network is trained and their statistics are known.
VAE = VAEConfig(base_dim=16, latents_mean=(0.0,) * 16, latents_std=(1.0,) * 16)
UMT5 = UMT5Config(
    vocab_size=VOCABULARY, dim=192, num_heads=6, head_dim=32, ffn_dim=384, num_layers=4
)
CLIP = CLIPConfig(image_size=64, patch_size=8, dim=128, num_heads=4, num_layers=4, ffn_dim=512)
_T2V = DiTConfig(dim=192, ffn_dim=768, num_heads=3, num_layers=8, text_dim=UMT5.dim)
DITS = {
    "t2v": _T2V,
    "i2v": DiTConfig.from_dict(_T2V.to_dict() | {"in_channels": 36, "image_dim": CLIP.dim}),
    "flf2v": DiTConfig.from_dict(
        _T2V.to_dict()
        | {"in_channels": 36, "image_dim": CLIP.dim, "image_positions": 2 * CLIP.num_tokens}
    ),
}
DEFAULTS = Defaults(
    size=world.FRAME_SIZES[0],
    frames=world.FRAMES,
    steps=20,
    guidance=3.0,
    shift=5.0,  # what a caption says is decided at high noise
    negative_prompt=captions.NEGATIVE_PROMPT,
)
