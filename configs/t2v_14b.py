"""Text to video, 14B, 480P and 720P.

    python run_t2v.py --task t2v-14B --ckpt_dir Wan2.1-T2V-14B-Diffusers --size 1280*720 \
        --prompt "..."
"""

config = {
    "sizes": [(720, 1280), (1280, 720), (480, 832), (832, 480)],
    "size": (1280, 720),
    "frames": 81,
    "steps": 50,
    "shift": 5.0,
    "guidance": 5.0,
    "solver": "unipc",
}
