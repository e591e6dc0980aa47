"""First and last frame to video, 14B, 720P.

    python run_i2v.py --task flf2v-14B --ckpt_dir Wan2.1-FLF2V-14B-720P-diffusers \
        --first_frame a.png --last_frame b.png --prompt "..."

The size is an area: the first frame decides its shape. The checkpoint is made for 720P; the
reference lists the sizes of 480P too.
"""

config = {
    "sizes": [(720, 1280), (1280, 720), (480, 832), (832, 480)],
    "size": (1280, 720),
    "frames": 81,
    "steps": 50,
    "shift": 16.0,
    "guidance": 5.0,
    "solver": "unipc",
}
