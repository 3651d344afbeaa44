"""The training run: the trainer, its command line, evaluation, what is drawn of it, and stopping by a signal.

It brings the other rooms together and may import all but `measuring`; only the commands on top import it.
"""
