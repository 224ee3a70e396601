// The operators flashattn_lite::mask_band and ::mask_padding: what a dense mask on the CPU says, in
// one pass over it that ends where the mask is something else. A dozen torch operators and five
// looks at their results took 100 us for a mask of four elements. What the answers mean:
// flashattn_lite/_masks.py.
#include <string.h>

#include "boxing.h"
#include "checks.h"

namespace fal::torch_binding {
namespace {

constexpr int64_t kUnbounded = int64_t{1} << 31;  // a side; lengths are at most 2^30

// A (rows, keys) mask, row by row as bytes: 0 is hidden, others are visible.
class MaskRows {
 public:
  MaskRows(const char* op, const Tensor& mask)
      : data_(static_cast<const char*>(mask.data())), rows_(mask.size(0)), keys_(mask.size(1)) {
    const int32_t dtype = mask.dtype();
    if (dtype == aoti_torch_dtype_bool()) {
      width_ = 1;
    } else if (dtype == aoti_torch_dtype_float32()) {
      width_ = 4, minus_infinity_ = 0xff800000u;
    } else if (dtype == aoti_torch_dtype_float64()) {
      width_ = 8, minus_infinity_ = 0xfff0000000000000u;
    } else if (dtype == aoti_torch_dtype_float16()) {
      width_ = 2, minus_infinity_ = 0xfc00u;
    } else if (dtype == aoti_torch_dtype_bfloat16()) {
      width_ = 2, minus_infinity_ = 0xff80u;
    } else {
      fail(op, ": mask is ", dtype_text(dtype), "; it must be bool or floating-point");
    }
    row_step_ = mask.stride(0) * width_;
    key_step_ = mask.stride(1) * width_;
    if (width_ > 1 || key_step_ != 1 || keys_ == 0) bytes_.resize(keys_ + 1);
  }

  int64_t rows() const { return rows_; }
  int64_t keys() const { return keys_; }

  // Null where a float mask holds more than 0 and -inf.
  const uint8_t* row(int64_t i) {
    const char* from = data_ + i * row_step_;
    if (bytes_.empty()) return reinterpret_cast<const uint8_t*>(from);
    const bool known = width_ == 1   ? gather<uint8_t>(from)
                       : width_ == 2 ? gather<uint16_t>(from)
                       : width_ == 4 ? gather<uint32_t>(from)
                                     : gather<uint64_t>(from);
    return known ? bytes_.data() : nullptr;
  }

 private:
  template <class Bits>
  bool gather(const char* from) {
    constexpr Bits kSign = static_cast<Bits>(Bits{1} << (8 * sizeof(Bits) - 1));
    for (int64_t j = 0; j < keys_; ++j) {
      Bits bits;
      memcpy(&bits, from + j * key_step_, sizeof bits);
      if (sizeof(Bits) == 1) {
        bytes_[j] = static_cast<uint8_t>(bits);
      } else {
        bytes_[j] = static_cast<Bits>(bits & ~kSign) == 0;
        if (!bytes_[j] && bits != static_cast<Bits>(minus_infinity_)) return false;
      }
    }
    return true;
  }

  const char* data_;
  int64_t rows_, keys_, width_ = 1, row_step_, key_step_;
  uint64_t minus_infinity_ = 0;
  std::vector<uint8_t> bytes_;
};

// The first of [begin, end) that is not 0, or end.
int64_t skip_hidden(const uint8_t* row, int64_t begin, int64_t end) {
  for (uint64_t word; begin + 8 <= end; begin += 8) {
    memcpy(&word, row + begin, 8);
    if (word) break;
  }
  while (begin < end && !row[begin]) ++begin;
  return begin;
}

// What a row shows, when that is one run or nothing.
bool visible_run(const uint8_t* row, int64_t keys, int64_t* begin, int64_t* end) {
  *begin = skip_hidden(row, 0, keys);
  if (*begin == keys) return *begin = *end = 0, true;
  const void* hidden = memchr(row + *begin, 0, keys - *begin);
  *end = hidden ? static_cast<const uint8_t*>(hidden) - row : keys;
  return skip_hidden(row, *end, keys) == keys;
}

Tensor matrix(const char* op, uint64_t word) {
  Tensor mask = Word<Tensor>::load(word);
  FAL_CHECK(mask.dim() == 2, op, ": mask has shape ", shape_text(mask), "; it must have two sizes");
  return mask;
}

// (is one, left, right): row i sees key j iff i - left <= j <= i + right, and sees some.
void mask_band(uint64_t* stack, uint64_t, uint64_t) {
  constexpr const char* kName = "flashattn_lite::mask_band";
  const Tensor tensor = matrix(kName, stack[0]);
  MaskRows mask(kName, tensor);
  const int64_t keys = mask.keys();
  int64_t left = kUnbounded, right = kUnbounded;
  bool known = keys > 0;
  for (int64_t i = 0; known && i < mask.rows(); ++i) {
    const uint8_t* row = mask.row(i);
    int64_t begin, end;
    known = row && visible_run(row, keys, &begin, &end) && begin < end;
    if (!known) break;
    // A side's first bound that no edge of the mask explains must fit the rows before.
    if (left == kUnbounded && begin > 0) left = i - begin, known = i == 0 || i - 1 <= left;
    if (right == kUnbounded && end < keys) right = end - 1 - i, known = known && i == 0;
    const int64_t first = left == kUnbounded || i < left ? 0 : i - left;
    const int64_t last = right == kUnbounded || i + right + 1 > keys ? keys : i + right + 1;
    known = known && begin == first && end == last;
  }
  put_results(stack, known, left, right);
}

// (is one, skips any at the start, leaves any out at the end, leftpad, used): int32 (rows).
void mask_padding(uint64_t* stack, uint64_t, uint64_t) {
  constexpr const char* kName = "flashattn_lite::mask_padding";
  const Tensor tensor = matrix(kName, stack[0]);
  MaskRows mask(kName, tensor);
  Tensor leftpad = empty_on(tensor, {mask.rows()}, aoti_torch_dtype_int32());
  Tensor used = empty_on(tensor, {mask.rows()}, aoti_torch_dtype_int32());
  int32_t *begins = static_cast<int32_t*>(leftpad.data()),
          *ends = static_cast<int32_t*>(used.data());
  bool known = true, skips = false, ends_early = false;
  for (int64_t i = 0; known && i < mask.rows(); ++i) {
    const uint8_t* row = mask.row(i);
    int64_t begin, end;
    known = row && visible_run(row, mask.keys(), &begin, &end);
    if (!known) break;
    begins[i] = static_cast<int32_t>(begin);
    ends[i] = static_cast<int32_t>(end);
    skips |= begin > 0;
    ends_early |= end < mask.keys();
  }
  put_results(stack, known, skips, ends_early, std::move(leftpad), std::move(used));
}

const bool registered = [] {
  static Library definitions = Library::fragment("flashattn_lite");
  definitions.schema("mask_band(Tensor mask) -> (bool known, int left, int right)")
      .schema(
          "mask_padding(Tensor mask) -> (bool known, bool skips, bool ends_early, Tensor leftpad, "
          "Tensor used)");
  static Library on_cpu = Library::implement("flashattn_lite", "CPU");
  on_cpu.function("mask_band", mask_band).function("mask_padding", mask_padding);
  return true;
}();

}  // namespace
}  // namespace fal::torch_binding
