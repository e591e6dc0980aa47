"""Text to video, 1.3B, 480P.

    python run_t2v.py --task t2v-1.3B --ckpt_dir Wan2.1-T2V-1.3B-Diffusers --prompt "..."

The reference's defaults; its README advises --sample_shift 8 to 12 and --sample_guide_scale 6.
"""

config = {
    "sizes": [(480, 832), (832, 480)],
    "size": (832, 480),
    "frames": 81,
    "steps": 50,
    "shift": 5.0,
    "guidance": 5.0,
    "solver": "unipc",
}
