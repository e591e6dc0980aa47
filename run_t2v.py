"""Text to video and text to image from the command line.

    python run_t2v.py --task t2v-1.3B --ckpt_dir DIR --prompt "Two cats box on a spotlit stage."

Takes the flags of Wan2.1's generate.py. Without --task and --ckpt_dir it runs the miniature that
comes with the package. `python run_t2v.py --help` lists every flag.
"""

from pathlib import Path

from absl import flags

from wan_jax import cli, devices, jobs, runner
from wan_jax.planning import command as planning
from wan_jax.tasks import TEXT_TASKS


def main(values: flags.FlagValues) -> None:
    """Check everything, then run; or, with --plan, tell what that would need."""
    configs = Path(__file__).parent / "configs"
    if planning.asked(values):
        planning.show(values, configs)
    devices.join(values)
    runner.execute(values, jobs.plan(values, configs))


if __name__ == "__main__":
    cli.define_flags(TEXT_TASKS)
    cli.run(main)
