"""The training run: the trainer, its command line, evaluation, what is drawn of it, and stopping by a signal.

It brings the other rooms together; only the commands on top import it.
"""
