"""Types of the compiled file-format codecs (csrc/codec)."""

import numpy as np
from numpy.typing import NDArray

MAX_POSITIONS: int

def bitmask_pack(mask: NDArray[np.bool_] | NDArray[np.uint8]) -> NDArray[np.uint8]: ...
def bitmask_unpack(bits: NDArray[np.uint8], count: int) -> NDArray[np.bool_]: ...
def relative_index_cost(
    positions: NDArray[np.int64], total: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]: ...
def relative_index_encode(
    positions: NDArray[np.int64], bits: int, total: int
) -> tuple[NDArray[np.uint8], int]: ...
def relative_index_decode(
    stream: NDArray[np.uint8], bits: int, entries: int, total: int
) -> NDArray[np.int64]: ...
def csr_to_positions(
    row_ptr: NDArray[np.int32] | NDArray[np.int64],
    col_idx: NDArray[np.int32] | NDArray[np.int64],
    columns: int,
) -> NDArray[np.int64]: ...
def positions_to_csr(
    positions: NDArray[np.int64], rows: int, columns: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]: ...
