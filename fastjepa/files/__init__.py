"""Files that are whole or not there, and reading what `torch.save` wrote without trusting it.

Every room that writes or reads a file goes through here; it imports nothing of the package.
"""
