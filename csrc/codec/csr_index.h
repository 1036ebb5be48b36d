// Column indices and row pointers of a CSR matrix <-> ascending positions in the flattened matrix,
// position = row * columns + column.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sparsecnn::codec {

enum class CsrError { kNone, kRowPtr, kColumn };

// row_ptr[rows + 1] from 0 to nnz without decrease, col_idx ascending in each row and below
// columns. On an error *where is the offending index of row_ptr or col_idx.
template <typename Index>
CsrError csr_to_positions(const Index* row_ptr, std::size_t rows, const Index* col_idx,
                          std::size_t nnz, std::int64_t columns, std::int64_t* positions,
                          std::size_t* where) {
  if (row_ptr[0] != 0) {
    *where = 0;
    return CsrError::kRowPtr;
  }
  for (std::size_t r = 0; r < rows; ++r) {
    const std::int64_t begin = row_ptr[r], end = row_ptr[r + 1];
    if (end < begin || end > static_cast<std::int64_t>(nnz)) {
      *where = r + 1;
      return CsrError::kRowPtr;
    }
    const std::int64_t base = static_cast<std::int64_t>(r) * columns;
    std::int64_t previous = -1;
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t column = col_idx[i];
      if (column <= previous || column >= columns) {
        *where = static_cast<std::size_t>(i);
        return CsrError::kColumn;
      }
      previous = column;
      positions[i] = base + column;
    }
  }
  if (row_ptr[rows] != static_cast<std::int64_t>(nnz)) {
    *where = rows;
    return CsrError::kRowPtr;
  }
  return CsrError::kNone;
}

// Positions already checked against rows * columns, which fits the int32 indices of the kernels.
inline void positions_to_csr(const std::int64_t* positions, std::size_t nnz, std::size_t rows,
                             std::int64_t columns, std::int32_t* row_ptr, std::int32_t* col_idx) {
  std::size_t i = 0;
  row_ptr[0] = 0;
  for (std::size_t r = 0; r < rows; ++r) {
    const std::int64_t base = static_cast<std::int64_t>(r) * columns;
    for (; i < nnz && positions[i] - base < columns; ++i) {
      col_idx[i] = static_cast<std::int32_t>(positions[i] - base);
    }
    row_ptr[r + 1] = static_cast<std::int32_t>(i);
  }
}

}  // namespace sparsecnn::codec
