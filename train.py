"""Train and evaluate a Video JEPA: `python train.py` (`--help` lists the flags)."""

import sys

from fastjepa.training.command_line import parse_config, run_from_command_line

if __name__ == "__main__":
    sys.exit(run_from_command_line(parse_config()))
