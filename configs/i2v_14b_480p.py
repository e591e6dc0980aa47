"""Image to video, 14B, the 480P checkpoint.

    python run_i2v.py --task i2v-14B-480P --ckpt_dir Wan2.1-I2V-14B-480P-Diffusers \
        --image cat.jpg --prompt "..."

`--task i2v-14B --size 832*480` is this one too. The size is an area: the image decides its shape.
"""

config = {
    "sizes": [(480, 832), (832, 480)],
    "size": (832, 480),
    "frames": 81,
    "steps": 40,
    "shift": 5.0,
    "shift_480p": 3.0,
    "guidance": 5.0,
    "solver": "unipc",
}
