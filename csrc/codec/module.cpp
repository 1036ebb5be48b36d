// Python face of the file-format codecs: module sparsecnn._codec, numpy arrays in and out. All
// checks are here, once; the loops behind run without the interpreter lock.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <limits>
#include <string>

#include "codec/bitmask.h"
#include "codec/csr_index.h"
#include "codec/relative_index.h"

namespace py = pybind11;
namespace codec = sparsecnn::codec;

namespace {

using Bytes = py::array_t<std::uint8_t>;
using Longs = py::array_t<std::int64_t>;

constexpr std::int64_t kMaxInt32 = std::numeric_limits<std::int32_t>::max();

std::string describe(const py::handle& value) {
  return py::str(py::type::of(value).attr("__name__"));
}

// An int in [low, high]; numpy integers count as int through __index__, bool and float do not.
std::int64_t integer(const py::object& value, const char* what, std::int64_t low,
                     std::int64_t high) {
  const std::string expected =
      std::string(what) + " in [" + std::to_string(low) + ", " + std::to_string(high) + "], got ";
  if (PyBool_Check(value.ptr()) || !PyIndex_Check(value.ptr())) {
    throw py::type_error("codec: expected int " + expected + describe(value));
  }
  const py::object index = py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
  if (!index) throw py::error_already_set();
  int overflow = 0;
  const long long number = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
  if (overflow != 0 || number < low || number > high) {
    const std::string got =
        overflow != 0 ? std::string("an integer beyond 64 bits") : std::to_string(number);
    throw py::value_error("codec: expected " + expected + got);
  }
  return number;
}

// A 1-d array of exactly type T (no silent cast), copied only if it is not contiguous.
template <typename T>
py::array_t<T> vector(const py::object& value, const char* what, const char* type) {
  if (!py::isinstance<py::array>(value)) {
    throw py::type_error("codec: expected " + std::string(what) + " a numpy array of " + type +
                         ", got " + describe(value));
  }
  const py::array array = py::reinterpret_borrow<py::array>(value);
  if (!py::isinstance<py::array_t<T>>(value)) {
    throw py::type_error("codec: expected " + std::string(what) + " of dtype " + type + ", got " +
                         std::string(py::str(array.dtype())));
  }
  if (array.ndim() != 1) {
    throw py::value_error("codec: expected " + std::string(what) + " with 1 dimension, got " +
                          std::to_string(array.ndim()));
  }
  auto out = py::array_t<T, py::array::c_style | py::array::forcecast>::ensure(array);
  if (!out) throw py::error_already_set();
  return out;
}

Bytes bitmask_pack(const py::object& mask) {
  py::array bytes;
  if (py::isinstance<py::array_t<bool>>(mask)) {
    bytes = vector<bool>(mask, "mask", "bool");
  } else {
    bytes = vector<std::uint8_t>(mask, "mask", "bool or uint8");
  }
  const std::size_t count = static_cast<std::size_t>(bytes.size());
  Bytes bits(static_cast<py::ssize_t>(codec::bitmask_bytes(count)));
  const auto* in = static_cast<const std::uint8_t*>(bytes.data());
  std::uint8_t* out = bits.mutable_data();
  py::gil_scoped_release unlocked;
  codec::bitmask_pack(in, count, out);
  return bits;
}

py::array_t<bool> bitmask_unpack(const py::object& bits_, const py::object& count_) {
  const Bytes bits = vector<std::uint8_t>(bits_, "bits", "uint8");
  const auto count = static_cast<std::size_t>(
      integer(count_, "count", 0, std::numeric_limits<std::int64_t>::max() / 2));
  // The size is compared before anything is allocated: a claimed count costs nothing.
  if (static_cast<std::size_t>(bits.size()) != codec::bitmask_bytes(count)) {
    throw py::value_error("codec: expected " + std::to_string(codec::bitmask_bytes(count)) +
                          " bytes of bits for count " + std::to_string(count) + ", got " +
                          std::to_string(bits.size()));
  }
  py::array_t<bool> mask(static_cast<py::ssize_t>(count));
  const std::uint8_t* in = bits.data();
  auto* out = reinterpret_cast<std::uint8_t*>(mask.mutable_data());
  bool clean;
  {
    py::gil_scoped_release unlocked;
    clean = codec::bitmask_unpack(in, count, out);
  }
  if (!clean) throw py::value_error("codec: expected zero padding bits behind the mask, got ones");
  return mask;
}

Longs checked_positions(const py::object& value, std::int64_t total) {
  Longs positions = vector<std::int64_t>(value, "positions", "int64");
  const std::int64_t* data = positions.data();
  const auto count = static_cast<std::size_t>(positions.size());
  std::int64_t bad;
  {
    py::gil_scoped_release unlocked;
    bad = codec::find_bad_position(data, count, total);
  }
  if (bad >= 0) {
    throw py::value_error("codec: expected positions strictly ascending in [0, " +
                          std::to_string(total) + "), got " + std::to_string(data[bad]) +
                          " at index " + std::to_string(bad));
  }
  return positions;
}

py::tuple relative_index_cost(const py::object& positions_, const py::object& total_) {
  const std::int64_t total = integer(total_, "total", 0, codec::kMaxPositions);
  const Longs positions = checked_positions(positions_, total);
  const auto count = static_cast<std::size_t>(positions.size());
  const std::int64_t* data = positions.data();
  codec::GapCost cost[codec::kMaxIndexBits];
  {
    py::gil_scoped_release unlocked;
    codec::gap_costs(data, count, cost);
  }
  Longs fillers(codec::kMaxIndexBits), bytes(codec::kMaxIndexBits);
  for (int b = 1; b <= codec::kMaxIndexBits; ++b) {
    fillers.mutable_data()[b - 1] = cost[b - 1].fillers;
    bytes.mutable_data()[b - 1] = (codec::stream_bits(count, b, cost[b - 1]) + 7) / 8;
  }
  return py::make_tuple(fillers, bytes);
}

py::tuple relative_index_encode(const py::object& positions_, const py::object& bits_,
                                const py::object& total_) {
  const int bits = static_cast<int>(integer(bits_, "bits", 1, codec::kMaxIndexBits));
  const std::int64_t total = integer(total_, "total", 0, codec::kMaxPositions);
  const Longs positions = checked_positions(positions_, total);
  const auto count = static_cast<std::size_t>(positions.size());
  const std::int64_t* data = positions.data();
  codec::GapCost cost[codec::kMaxIndexBits];
  {
    py::gil_scoped_release unlocked;
    codec::gap_costs(data, count, cost);
  }
  Bytes stream(static_cast<py::ssize_t>((codec::stream_bits(count, bits, cost[bits - 1]) + 7) / 8));
  std::uint8_t* out = stream.mutable_data();
  {
    py::gil_scoped_release unlocked;
    codec::encode_gaps(data, count, bits, out);
  }
  return py::make_tuple(stream, static_cast<std::int64_t>(count) + cost[bits - 1].fillers);
}

const char* explain(codec::DecodeError error) {
  switch (error) {
    case codec::DecodeError::kTruncated:
      return "codec: expected stream to hold all entries, got one that ends before";
    case codec::DecodeError::kOutOfRange:
      return "codec: expected stream entries below total, got one at or behind it";
    case codec::DecodeError::kTrailingData:
      return "codec: expected stream to end with its last entry, got data behind it";
    case codec::DecodeError::kLastIsFiller:
      return "codec: expected stream to end with an entry, got a filler";
    case codec::DecodeError::kNone:
      break;
  }
  return "";
}

Longs relative_index_decode(const py::object& stream_, const py::object& bits_,
                            const py::object& entries_, const py::object& total_) {
  const Bytes stream = vector<std::uint8_t>(stream_, "stream", "uint8");
  const int bits = static_cast<int>(integer(bits_, "bits", 1, codec::kMaxIndexBits));
  const std::int64_t entries = integer(entries_, "entries", 0, codec::kMaxPositions);
  const std::int64_t total = integer(total_, "total", 0, codec::kMaxPositions);
  const std::uint8_t* data = stream.data();
  const auto bytes = static_cast<std::size_t>(stream.size());
  std::int64_t count = 0;
  codec::DecodeError error;
  {
    // First pass checks and counts, so that the result is as large as the stream's real entries
    // and not as large as a header claims.
    py::gil_scoped_release unlocked;
    error = codec::decode_gaps(data, bytes, bits, entries, total, nullptr, &count);
  }
  if (error != codec::DecodeError::kNone) throw py::value_error(explain(error));
  Longs positions(static_cast<py::ssize_t>(count));
  std::int64_t* out = positions.mutable_data();
  py::gil_scoped_release unlocked;
  codec::decode_gaps(data, bytes, bits, entries, total, out, &count);
  return positions;
}

template <typename Index>
Longs csr_positions_of(const py::object& row_ptr_, const py::object& col_idx_, std::int64_t columns,
                       const char* type) {
  const auto row_ptr = vector<Index>(row_ptr_, "row_ptr", type);
  const auto col_idx = vector<Index>(col_idx_, "col_idx", type);
  if (row_ptr.size() < 1) {
    throw py::value_error("codec: expected row_ptr with at least 1 element, got 0");
  }
  const auto rows = static_cast<std::size_t>(row_ptr.size()) - 1;
  if (columns > 0 && rows > static_cast<std::size_t>(codec::kMaxPositions / columns)) {
    throw py::value_error("codec: expected rows * columns <= 2^33, got " + std::to_string(rows) +
                          " * " + std::to_string(columns));
  }
  const auto nnz = static_cast<std::size_t>(col_idx.size());
  Longs positions(static_cast<py::ssize_t>(nnz));
  const Index* rp = row_ptr.data();
  const Index* ci = col_idx.data();
  std::int64_t* out = positions.mutable_data();
  std::size_t where = 0;
  codec::CsrError error;
  {
    py::gil_scoped_release unlocked;
    error = codec::csr_to_positions(rp, rows, ci, nnz, columns, out, &where);
  }
  if (error == codec::CsrError::kRowPtr) {
    throw py::value_error("codec: expected row_ptr ascending from 0 to " + std::to_string(nnz) +
                          ", got " + std::to_string(rp[where]) + " at index " +
                          std::to_string(where));
  }
  if (error == codec::CsrError::kColumn) {
    throw py::value_error("codec: expected col_idx strictly ascending in each row in [0, " +
                          std::to_string(columns) + "), got " + std::to_string(ci[where]) +
                          " at index " + std::to_string(where));
  }
  return positions;
}

Longs csr_to_positions(const py::object& row_ptr, const py::object& col_idx,
                       const py::object& columns_) {
  const std::int64_t columns = integer(columns_, "columns", 0, codec::kMaxPositions);
  if (py::isinstance<py::array_t<std::int64_t>>(row_ptr)) {
    return csr_positions_of<std::int64_t>(row_ptr, col_idx, columns, "int64");
  }
  return csr_positions_of<std::int32_t>(row_ptr, col_idx, columns, "int32");
}

py::tuple positions_to_csr(const py::object& positions_, const py::object& rows_,
                           const py::object& columns_) {
  const std::int64_t rows = integer(rows_, "rows", 0, kMaxInt32 - 1);
  const std::int64_t columns = integer(columns_, "columns", 0, kMaxInt32);
  if (columns > 0 && rows > codec::kMaxPositions / columns) {
    throw py::value_error("codec: expected rows * columns <= 2^33, got " + std::to_string(rows) +
                          " * " + std::to_string(columns));
  }
  const Longs positions = checked_positions(positions_, rows * columns);
  if (positions.size() > kMaxInt32) {
    throw py::value_error("codec: expected fewer than 2^31 positions, got " +
                          std::to_string(positions.size()));
  }
  py::array_t<std::int32_t> row_ptr(static_cast<py::ssize_t>(rows + 1));
  py::array_t<std::int32_t> col_idx(positions.size());
  const std::int64_t* data = positions.data();
  const auto nnz = static_cast<std::size_t>(positions.size());
  std::int32_t* rp = row_ptr.mutable_data();
  std::int32_t* ci = col_idx.mutable_data();
  {
    py::gil_scoped_release unlocked;
    codec::positions_to_csr(data, nnz, static_cast<std::size_t>(rows), columns, rp, ci);
  }
  return py::make_tuple(row_ptr, col_idx);
}

}  // namespace

PYBIND11_MODULE(_codec, m) {
  m.doc() = "File-format codecs of sparsecnn: bitmask, relative index, CSR index (numpy only).";
  m.attr("MAX_POSITIONS") = codec::kMaxPositions;
  m.def("bitmask_pack", &bitmask_pack, py::arg("mask"));
  m.def("bitmask_unpack", &bitmask_unpack, py::arg("bits"), py::arg("count"));
  m.def("relative_index_cost", &relative_index_cost, py::arg("positions"), py::arg("total"));
  m.def("relative_index_encode", &relative_index_encode, py::arg("positions"), py::arg("bits"),
        py::arg("total"));
  m.def("relative_index_decode", &relative_index_decode, py::arg("stream"), py::arg("bits"),
        py::arg("entries"), py::arg("total"));
  m.def("csr_to_positions", &csr_to_positions, py::arg("row_ptr"), py::arg("col_idx"),
        py::arg("columns"));
  m.def("positions_to_csr", &positions_to_csr, py::arg("positions"), py::arg("rows"),
        py::arg("columns"));
}
