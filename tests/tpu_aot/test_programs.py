"""Steps of the released networks on TPUs, compiled ahead of time: whether they fit one chip.

Skipped where libtpu is not installed.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from tests import tolerances
from tests.tpu_aot.chips import KERNEL, TOPOLOGIES, compile_for
from wan_jax import clip, sampler
from wan_jax.clip import CLIP
from wan_jax.config import I2V_14B, T2V_1_3B, T2V_14B
from wan_jax.dit import DiT
from wan_jax.planning import costs, memory, programs, targets
from wan_jax.planning.memory import Setup, Work
from wan_jax.plans import Plan
from wan_jax.schedulers import Row
from wan_jax.weights import trees

pytest.importorskip("libtpu")


def test_the_tower_of_images_compiles() -> None:
    """In float16, as the original runs it, which the flash kernel does not take."""
    config = I2V_14B.clip
    assert config is not None
    tower = trees.abstract(lambda: CLIP(config, rngs=nnx.Rngs(0), dtype=jnp.float16))
    pixels = jax.ShapeDtypeStruct((2, config.image_size, config.image_size, 3), jnp.float32)
    program = compile_for(TOPOLOGIES[0], clip.encode, tower, pixels)
    (tokens,) = jax.tree.leaves(program.out_info)
    assert (tokens.shape, tokens.dtype) == ((2, 257, 1280), jnp.float16)


def test_a_step_of_image_to_video_fits_one_chip_at_480p() -> None:
    """14B in bfloat16: what the text and the image need but once is not among the arguments."""
    config = I2V_14B.dit
    dit = trees.abstract(lambda: DiT(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    x, known = (jax.ShapeDtypeStruct((1, 21, 60, 104, c), jnp.float32) for c in (16, 20))
    text = jax.ShapeDtypeStruct((1, config.text_len, config.text_dim), jnp.bfloat16)
    image = jax.ShapeDtypeStruct((1, 257, 1280), jnp.float32)
    cond = jax.eval_shape(DiT.prepare, dit, text, image)
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    row = Row(*(scalar for _ in Row._fields))

    def step(known: jax.Array, *arguments: Any) -> sampler.State:
        return sampler.step(*arguments, known=known, implementation="splash")

    state = sampler.State(x, x, x, x)
    program = compile_for(TOPOLOGIES[0], step, known, dit, state, row, (cond,), scalar)
    memory = program.memory_analysis()
    # The other branch runs when this one is done, and has conditions of its own.
    other = programs.own_bytes(cond)
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes + other
    assert total <= tolerances.IMAGE_TPU_STEP_GIB * 2**30


def test_a_step_of_the_released_small_model_fits_one_chip() -> None:
    config = T2V_1_3B.dit
    dit = trees.abstract(lambda: DiT(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    x = jax.ShapeDtypeStruct((1, 21, 60, 104, config.in_channels), jnp.float32)
    text = jax.ShapeDtypeStruct((1, config.text_len, config.text_dim), jnp.bfloat16)
    cond = jax.eval_shape(DiT.prepare, dit, text)
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    row = Row(*(scalar for _ in Row._fields))
    step = functools.partial(sampler.step, implementation="splash")
    program = compile_for(
        TOPOLOGIES[0], step, dit, sampler.State(x, x, x, x), row, (cond, cond), scalar
    )
    assert KERNEL in program.as_text()
    memory = program.memory_analysis()
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    assert total <= tolerances.ATTENTION_TPU_STEP_GIB * 2**30


def test_a_streamed_step_of_the_large_model_fits_one_chip_at_720p() -> None:
    """14B whole would not: two of its layers are on the chip, the others in the host's memory."""
    work = Work((21, 90, 160, 16), 50)
    device = targets.parse(TOPOLOGIES[0]).devices()[0]
    made = programs.stages(
        T2V_14B, work, plan=Plan(), devices=[device], dtype="bfloat16", streamed=("dit",)
    )
    program = made["denoise"]().compile(device)
    assert KERNEL in program.as_text() and "dynamic-slice-start" in program.as_text()
    found = program.memory_analysis()
    setup = Setup(T2V_14B, offload=True, streamed=("dit",))
    read = setup.brought("dit", lambda names: not costs.once(names))
    assert found.host_argument_size_in_bytes == read
    expected = sum(memory.denoise(setup, work))
    total = found.argument_size_in_bytes + found.temp_size_in_bytes
    # A run is refused by the formula, so it may not be too little.
    assert (1 - tolerances.STREAMED_TPU_STEP) * expected <= total <= expected
