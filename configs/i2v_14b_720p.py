"""Image to video, 14B, the 720P checkpoint.

    python run_i2v.py --task i2v-14B --ckpt_dir Wan2.1-I2V-14B-720P-Diffusers \
        --image cat.jpg --prompt "..."

The size is an area: the image decides its shape.
"""

config = {
    "sizes": [(720, 1280), (1280, 720)],
    "size": (1280, 720),
    "frames": 81,
    "steps": 40,
    "shift": 5.0,
    "shift_480p": 3.0,
    "guidance": 5.0,
    "solver": "unipc",
}
