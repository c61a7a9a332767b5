"""The largest that files of strangers may be: what exceeds these is refused before it is read."""

from __future__ import annotations

LARGEST_MANIFEST = 16 << 20  # bytes, 47,000 shards; more of them need another format


MOST_LISTS, MOST_VALUES = 1000, 100_000  # in a manifest without shards


MOST_PADDING = 64  # pixels, or a side of the image


LARGEST_SHARD = 1 << 32  # bytes of its columns in memory


MOST_ROWS, MOST_CLASSES, MOST_PIXELS = 1_000_000, 32_767, 16_384  # of a shard; a label fits int16; along a side


LARGEST_CHUNK = 1 << 24  # bytes, unless a single row is larger


LARGEST_COLUMN = 1 << 32  # bytes in memory
