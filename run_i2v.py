"""Image to video, and first and last frame to video, from the command line.

    python run_i2v.py --task i2v-14B --ckpt_dir DIR --size '832*480' --image cat.jpg \\
        --prompt "The cat turns its head."
    python run_i2v.py --task flf2v-14B --ckpt_dir DIR --first_frame a.png --last_frame b.png \\
        --prompt "The bud opens into a flower."

Takes the flags of Wan2.1's generate.py. Without --task and --ckpt_dir it runs the miniature that
comes with the package, of one image or two, and without images a picture of its own.
`python run_i2v.py --help` lists every flag.
"""

from pathlib import Path

from absl import flags

from wan_jax import cli, devices, jobs, runner
from wan_jax.planning import command as planning
from wan_jax.tasks import IMAGE_TASKS


def main(values: flags.FlagValues) -> None:
    """Check everything, then run; or, with --plan, tell what that would need."""
    configs = Path(__file__).parent / "configs"
    if planning.asked(values):
        planning.show(values, configs)
    devices.join(values)
    runner.execute(values, jobs.plan(values, configs))


if __name__ == "__main__":
    cli.define_flags(IMAGE_TASKS, images=True)
    cli.run(main)
