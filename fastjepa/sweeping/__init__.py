"""A sweep: every cell of a grid of options × every seed is one training run, and what came of all of them.

`grid` is what was asked for and `plan` the runs that it means; `state` tells from a run's folder how far it is;
`one_run` trains one, in a process of its own (`child`), `one_by_one` trains all and `cluster` hands them to Slurm;
`report` makes the table and the pictures. It trains through the trainer's command line only; nothing imports it but the
command on top, `fastjepa/sweep.py`.
"""
