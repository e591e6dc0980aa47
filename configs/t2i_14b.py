"""Text to image with the weights of T2V-14B: one frame, saved as .png.

    python run_t2v.py --task t2i-14B --ckpt_dir Wan2.1-T2V-14B-Diffusers --size 1024*1024 \
        --prompt "..."
"""

config = {
    "sizes": [(720, 1280), (1280, 720), (480, 832), (832, 480), (1024, 1024)],
    "size": (1280, 720),
    "frames": 1,
    "steps": 50,
    "shift": 5.0,
    "guidance": 5.0,
    "solver": "unipc",
}
