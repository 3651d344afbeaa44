"""Moving MNIST: digit sources, the bouncing generator, the official file, digit maps, and clips on the
device or in shards on disk.

It may import `fastjepa.files` for writing files, and optional_packages: OpenCV, scikit-learn and tqdm are imported by
what uses them.
"""

from fastjepa.moving_mnist.clips import ClipSet, DataSource, epoch_indices, load_clips, sequential_batches
from fastjepa.moving_mnist.digits import embedded_digits, read_idx_images, split_digits
from fastjepa.moving_mnist.generator import bounce, generate_clips
from fastjepa.moving_mnist.labels import digit_maps
from fastjepa.moving_mnist.official import DownloadError, load_official
from fastjepa.moving_mnist.shards import Clips, ShardedClips, prefetched, write_shards

__all__ = [
    "ClipSet",
    "Clips",
    "DataSource",
    "DownloadError",
    "ShardedClips",
    "bounce",
    "digit_maps",
    "embedded_digits",
    "epoch_indices",
    "generate_clips",
    "load_clips",
    "load_official",
    "prefetched",
    "read_idx_images",
    "sequential_batches",
    "split_digits",
    "write_shards",
]
