"""A LoRA for the miniature that comes with the package: half an hour on two cores.

    python -m wan_jax.training.miniature --stages examples --out DIR
    python -m wan_jax.training --config configs/train_lora_mini.py --data DIR/lime --out DIR/lora
    python run_t2v.py --prompt "A lime star moves up on a plain grey background." \
        --lora DIR/lora/lora.safetensors
"""

config = {
    "batch_size": 4,
    "steps": 600,
    "learning_rate": 1e-3,
    "warmup_steps": 20,
    "weight_decay": 0.0,
    "ema_decay": 0.98,
    "sampling": "uniform",
    "shift": 12.0,
    "remat": "none",
    "lora_rank": 8,
    "lora_alpha": 8.0,
    "checkpoint_every": 100,
    "sample_every": 200,
    "sample_prompts": ["A lime star moves up on a plain grey background."],
}
