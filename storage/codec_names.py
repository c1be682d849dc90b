"""The codecs by name, in a file that imports nothing, as the command line lists them before anything heavy is there."""

from typing import Literal

CodecName = Literal["lossless", "zstd", "none", "int8", "fp8"]
