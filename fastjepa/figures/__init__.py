"""Pictures of training runs, drawn from the files in their folders: `python -m fastjepa.figures RUN [RUN ...]`.

Arrays and files in, PNG and GIF out; nothing is computed by a model. It may import `fastjepa.files` for writing
files, `fastjepa.optional_packages` to say that matplotlib or Pillow is missing, `fastjepa.refusal` for its command, and
of the model how many frames it is given.
"""
