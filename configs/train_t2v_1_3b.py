"""All weights of T2V-1.3B on videos of 832*480.

    python -m wan_jax.training --config configs/train_t2v_1_3b.py --data DIR --out DIR

23 GB of weights, moments and their average, beside what a step needs (docs/training.md).
"""

config = {
    "ckpt_dir": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "size": (832, 480),
    "frames": 81,
    "batch_size": 8,
    "accumulate": 8,
    "steps": 5000,
    "learning_rate": 1e-5,
    "warmup_steps": 200,
    "ema_decay": 0.999,
    "shift": 3.0,
    "remat": "full",
    "checkpoint_every": 250,
    "sample_every": 500,
    "sample_prompts": ["Two cats box on a spotlit stage."],
    "sample_shift": 8.0,
    "sample_guidance": 6.0,
}
