"""Training on several processes ("ranks"): launch checks, the ranks themselves, and statistics of a whole batch.

It builds on `torch.distributed`, under `torchrun`. The statistics stand below the model, which asks for them by name;
processes are the trainer's business.
"""
