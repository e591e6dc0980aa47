"""A LoRA for I2V-14B (480P) on videos of 832*480, each shown with its own first frame.

    python -m wan_jax.training --config configs/train_lora_i2v_14b.py --data DIR --out DIR

The kernels stay bfloat16 and have no gradient: 33 GB of weights, beside what a step needs. Samples
need an image each: "sample_images": ["cat.jpg"].
"""

config = {
    "ckpt_dir": "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
    "size": (832, 480),
    "frames": 81,
    "batch_size": 1,
    "steps": 2000,
    "learning_rate": 1e-4,
    "warmup_steps": 50,
    "weight_decay": 0.0,
    "ema_decay": 0.99,
    "image_dropout": 0.0,
    "shift": 3.0,
    "remat": "full",
    "lora_rank": 32,
    "lora_alpha": 32.0,
    "checkpoint_every": 250,
}
