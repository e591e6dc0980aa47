"""LoRA against Diffusers and PEFT: each reads the other's files; float32, batch 2."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

pytest.importorskip("peft")

from diffusers import WanPipeline, WanTransformer3DModel
from diffusers.utils import logging
from flax import nnx
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.numpy import load_file, save_file

from tests import tolerances
from tests.parity.convert import load_torch
from tests.parity.test_dit import torch_model
from tests.parity.test_dit_image import FLF2V, I2V, TIMESTEPS, TOKENS
from tests.random_weights import random_array, relative_l2
from wan_jax import rope
from wan_jax.config import DiTConfig
from wan_jax.dit import DiT
from wan_jax.weights import dit as dit_weights
from wan_jax.weights import lora, lora_files, trees
from wan_jax.weights.lora import Lora, Pair
from wan_jax.weights.sources import abstract_part

KINDS = {
    "t2v": dataclasses.replace(I2V, in_channels=16, image_dim=None),
    "i2v": I2V,
    "flf2v": FLF2V,
}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _silent() -> Iterator[None]:
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(before)


def ours(model: WanTransformer3DModel, config: DiTConfig) -> DiT:
    abstract = trees.abstract(lambda: DiT(config, rngs=nnx.Rngs(0), dtype=jnp.float32))
    state = {k: v.numpy() for k, v in model.state_dict().items()}
    return load_torch(dit_weights.table(config), abstract, state)


def inputs(config: DiTConfig) -> dict[str, np.ndarray]:
    stream = np.random.RandomState(7)
    shapes = {
        "latents": (2, 3, 6, 10, config.in_channels),
        "context": (2, config.text_len, config.text_dim),
    }
    if config.image_dim is not None:
        shapes["image"] = (2, config.images * TOKENS, config.image_dim)
    return {k: stream.standard_normal(s).astype(np.float32) for k, s in shapes.items()}


def velocities(
    model: Any, net: DiT, config: DiTConfig, monkeypatch: pytest.MonkeyPatch
) -> tuple[np.ndarray, np.ndarray]:
    """Theirs and ours."""
    given = inputs(config)
    waves: list[np.ndarray] = []
    hook = model.condition_embedder.timesteps_proj.register_forward_hook(
        lambda _module, _args, out: waves.append(out.numpy().copy())
    )
    image = None if "image" not in given else torch.from_numpy(given["image"])
    if image is not None and config.images == 2:  # two rows of the batch there
        image = image.reshape(-1, TOKENS, image.shape[-1])
    with torch.no_grad():
        theirs = model(
            hidden_states=torch.from_numpy(given["latents"].transpose(0, 4, 1, 2, 3).copy()),
            timestep=torch.from_numpy(TIMESTEPS),
            encoder_hidden_states=torch.from_numpy(given["context"]),
            encoder_hidden_states_image=image,
            return_dict=False,
        )[0]
    hook.remove()
    # Diffusers computes the sinusoid in float32; given the same one, everything after must agree.
    monkeypatch.setattr(rope, "sinusoid", lambda t, width: jnp.asarray(waves[0]))
    cond = jax.jit(lambda net, *given: net.prepare(*given))(
        net, given["context"], given.get("image")
    )
    mine = jax.jit(lambda net, *given: net(*given))(
        net, given["latents"], jnp.asarray(TIMESTEPS, jnp.float32), cond
    )
    return theirs.numpy().transpose(0, 2, 3, 4, 1), np.asarray(mine)


def uneven(config: DiTConfig) -> Lora:
    """Random factors for every product; ranks and alphas differ, and blocks are left out."""
    pairs = {}
    leaves = trees.flatten(abstract_part(config, jnp.dtype(jnp.float32)))
    for number, (name, leaf) in enumerate(sorted(leaves.items())):
        path = name.removesuffix(".kernel")
        if path == name:
            continue
        layers = lora.layers_of(path, leaf.shape)
        rank = np.full(layers, 4, np.int64)
        alpha = np.full(layers, 3.0)
        if layers:
            rank[0], rank[-1], alpha[1] = number % 5, 1, 1.7
        down = random_array(f"{path}.down", (*leaf.shape[:-1], 4))
        up = 0.5 * random_array(f"{path}.up", (*layers, 4, leaf.shape[-1]))
        down *= (np.arange(4) < rank[..., None]).reshape(
            *layers, *[1] * (leaf.ndim - 1 - len(layers)), 4
        )
        up *= (np.arange(4) < rank[..., None])[..., None]
        pairs[path] = Pair(down.astype(np.float32), up.astype(np.float32), alpha * (rank > 0), rank)
    return Lora(pairs)


def pipeline(model: WanTransformer3DModel) -> WanPipeline:
    return WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=None, transformer=model
    )


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_loads_what_we_write(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, path = KINDS[kind], tmp_path / "style.safetensors"
    model = torch_model(config)
    plain = ours(model, config)
    lora.write(path, uneven(config), naming="diffusers")
    net = lora.merge(plain, [(lora_files.read(path, config), 1.0)])
    pipeline(model).load_lora_weights(path.as_posix(), adapter_name="style")
    theirs, mine = velocities(model, net, config, monkeypatch)
    assert relative_l2(mine, theirs) <= tolerances.LORA_DIFFUSERS
    _, without = velocities(model, plain, config, monkeypatch)
    assert relative_l2(without, theirs) >= tolerances.LORA_MATTERS
    model.set_adapters("style", 0.3)
    net = lora.merge(plain, [(lora_files.read(path, config), 0.3)])
    theirs, mine = velocities(model, net, config, monkeypatch)
    assert relative_l2(mine, theirs) <= tolerances.LORA_DIFFUSERS


def test_diffusers_loads_what_we_write_for_comfyui(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, path = KINDS["i2v"], tmp_path / "style.safetensors"
    model = torch_model(config)
    whole = uneven(config)
    # Diffusers knows alphas beside pairs in the blocks only, and no LoRA of the patches.
    blocks = Lora({name: pair for name, pair in whole.pairs.items() if name.startswith("layers.")})
    lora.write(path, blocks, naming="comfyui")
    net = lora.merge(ours(model, config), [(lora_files.read(path, config), 1.0)])
    pipeline(model).load_lora_weights(path.as_posix())
    theirs, mine = velocities(model, net, config, monkeypatch)
    assert relative_l2(mine, theirs) <= tolerances.LORA_DIFFUSERS


# Of this PEFT: it takes the biases for broken factors.
@pytest.mark.filterwarnings("ignore:Adapter 'default'.*lora_B.bias")
@pytest.mark.parametrize("root", [False, True])
def test_we_read_what_diffusers_writes(
    root: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = KINDS["t2v"]
    model = torch_model(config)
    plain = ours(model, config)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2", "proj_out"]
    patterns = {} if root else {"attn2.to_q": 6}
    alphas = {} if root else {r"blocks\.1\.attn1\.to_v": 2}
    settings = LoraConfig(
        r=4, lora_alpha=7, target_modules=targets, rank_pattern=patterns, alpha_pattern=alphas,
        use_rslora=root, init_lora_weights=False, lora_bias=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model.add_adapter(settings)
    WanPipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(model),
        transformer_lora_adapter_metadata=settings.to_dict(),
    )
    (file,) = tmp_path.iterdir()
    net = lora.merge(plain, [(lora_files.read(file, config), 1.0)])
    theirs, mine = velocities(model, net, config, monkeypatch)
    assert relative_l2(mine, theirs) <= tolerances.LORA_DIFFUSERS
    _, without = velocities(model, plain, config, monkeypatch)
    assert relative_l2(without, theirs) >= tolerances.LORA_MATTERS


def test_we_read_what_peft_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = KINDS["t2v"]
    model = torch_model(config)
    plain = ours(model, config)
    settings = LoraConfig(
        r=4, lora_alpha=7, target_modules=["to_q", "ffn.net.2", "proj_out"],
        alpha_pattern={r"blocks\.1\.attn1\.to_q": 2}, init_lora_weights=False,
    )  # fmt: skip
    torch.manual_seed(0)
    get_peft_model(model, settings).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    assert all(name.startswith("base_model.model.") for name in load_file(file))
    with pytest.raises(ValueError, match="adapter_config.json beside it, which is not read, says"):
        lora_files.check(file, config)
    header = {lora.METADATA: (tmp_path / "adapter_config.json").read_text()}
    save_file(load_file(file), file, metadata=header)
    net = lora.merge(plain, [(lora_files.read(file, config), 1.0)])
    theirs, mine = velocities(model, net, config, monkeypatch)
    assert relative_l2(mine, theirs) <= tolerances.LORA_DIFFUSERS
    _, without = velocities(model, plain, config, monkeypatch)
    assert relative_l2(without, theirs) >= tolerances.LORA_MATTERS
