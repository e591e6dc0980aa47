"""A LoRA for T2V-1.3B on videos of 832*480.

    python -m wan_jax.training --config configs/train_lora_t2v_1_3b.py --data DIR --out DIR

Images train as well, as videos of one frame.
"""

config = {
    "ckpt_dir": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "size": (832, 480),
    "frames": 81,
    "batch_size": 1,
    "steps": 2000,
    "learning_rate": 1e-4,
    "warmup_steps": 50,
    "weight_decay": 0.0,
    "ema_decay": 0.99,
    "shift": 3.0,
    "remat": "full",
    "lora_rank": 32,
    "lora_alpha": 32.0,
    "checkpoint_every": 250,
    "sample_every": 250,
    "sample_prompts": ["Two cats box on a spotlit stage."],
    "sample_shift": 8.0,
    "sample_guidance": 6.0,
}
