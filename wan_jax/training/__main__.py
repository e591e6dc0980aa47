"""python -m wan_jax.training: see command.py."""

import sys

from wan_jax import cli
from wan_jax.training import command

if __name__ == "__main__":
    sys.argv[0] = command.NAME  # what errors and --help call it
    command.define_flags()
    cli.run(command.main, advice=command.ADVICE)
