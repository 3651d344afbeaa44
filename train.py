"""Train and evaluate a Video JEPA: `python train.py` (`--help` lists the flags)."""

import sys

# Before anything that an old Python cannot even read; so this file keeps to what it can.
if sys.version_info < (3, 10):  # noqa: UP036
    sys.stderr.write(
        "error: fastjepa needs Python 3.10 or newer; this is Python %s, %s\n"  # noqa: UP031
        % (sys.version.split()[0], sys.executable)
    )
    sys.exit(2)

if __name__ == "__main__":
    from fastjepa.entry import exit_status, stops_at_once

    try:
        with stops_at_once():
            from fastjepa.training.command_line import main
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "numpy"):
            raise
        sys.stderr.write(
            "error: training needs the Python package %s, which is not installed in %s; `make train` makes an "  # noqa: UP031
            "environment that has it, `pip install -e '.[train]'` adds it to this one\n" % (error.name, sys.executable)
        )
        sys.exit(2)
    sys.exit(exit_status(main))
