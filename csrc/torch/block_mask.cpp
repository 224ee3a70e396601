#include "block_mask.h"

namespace fal::torch_binding {
namespace {

constexpr int64_t kLayoutSize = 9;
constexpr int32_t kMinBlock = 16, kMaxBlock = 256;

// The sizes that `layout` holds.
struct Layout {
  int64_t seqlen_q, seqlen_k, block_q, block_k, batch, heads, entries, documents, bitmaps;

  explicit Layout(const Tensor& t) {
    const int64_t* x = static_cast<const int64_t*>(t.data());
    seqlen_q = x[0], seqlen_k = x[1], block_q = x[2], block_k = x[3], batch = x[4], heads = x[5];
    entries = x[6], documents = x[7], bitmaps = x[8];
  }
  int64_t tables() const { return batch * heads; }
  int64_t blocks_q() const { return (seqlen_q + block_q - 1) / block_q; }
  int64_t blocks_k() const { return (seqlen_k + block_k - 1) / block_k; }
  int64_t bitmap_size() const { return bitmaps * block_q * ((block_k + 31) / 32); }

  // Points the mask into the packed array, and returns the array's size.
  int64_t place(const int32_t* packed, BlockMask* mask) const {
    int64_t used = 0;
    const auto take = [&](int64_t size) {
      const int32_t* at = packed + used;
      used += size;
      return at;
    };
    mask->rows.start = take(tables() * (blocks_q() + 1));
    mask->rows.index = take(entries);
    mask->rows.rule = take(entries);
    mask->columns.start = take(tables() * (blocks_k() + 1));
    mask->columns.index = take(entries);
    mask->columns.rule = take(entries);
    mask->bands = take(2 * tables());
    mask->documents_q = documents ? take(tables() * seqlen_q) : nullptr;
    mask->documents_k = documents ? take(tables() * seqlen_k) : nullptr;
    mask->bitmaps = bitmaps ? reinterpret_cast<const uint32_t*>(take(bitmap_size())) : nullptr;
    return used;
  }
};

void check_lines(const Checker& checker, const char* name, const BlockCsr& csr, int64_t lines,
                 int64_t tables, int64_t blocks, const Layout& layout) {
  const int32_t rule_flags = (layout.bitmaps ? BlockRule::kBitmap : 0) |
                             (layout.documents ? BlockRule::kDocuments : 0) | BlockRule::kBand;
  int64_t previous = 0;
  for (int64_t t = 0; t < tables; ++t) {
    for (int64_t line = 0; line <= lines; ++line) {
      const int64_t start = csr.start[t * (lines + 1) + line];
      if (start < previous || start > layout.entries || (line == 0 && start != previous)) {
        checker.bad("block_mask: ", name, " ", line, " of table ", t, " starts at entry ", start,
                    "; it must be ", previous, " to ", layout.entries);
      }
      if (line > 0) {
        for (int64_t e = previous; e < start; ++e) {
          if (csr.index[e] < (e > previous ? csr.index[e - 1] + 1 : 0) || csr.index[e] >= blocks) {
            checker.bad("block_mask: ", name, " ", line - 1, " of table ", t, " lists block ",
                        csr.index[e], "; blocks must ascend from 0 to ", blocks - 1);
          }
        }
      }
      previous = start;
    }
  }
  for (int64_t e = 0; e < layout.entries; ++e) {
    const int32_t rule = csr.rule[e], bitmap = rule >> BlockRule::kBitmapShift;
    if (rule < 0 || (rule & 7 & ~rule_flags) ||
        (rule & BlockRule::kBitmap ? bitmap >= layout.bitmaps : bitmap != 0)) {
      checker.bad("block_mask: the rule of entry ", e, " is ", rule,
                  ", which names what is absent");
    }
  }
}

}  // namespace

BlockMask block_mask_of(const Checker& checker, const Tensor& packed, const Tensor& layout,
                        const Shape& shape) {
  if (!layout.is_cpu() || layout.dtype() != aoti_torch_dtype_int64() || layout.dim() != 1 ||
      layout.size(0) != kLayoutSize || layout.stride(0) != 1) {
    checker.bad("block_mask_layout must be ", kLayoutSize, " int64 on the CPU");
  }
  checker.has_dtype("block_mask", packed, aoti_torch_dtype_int32());
  checker.on_device("block_mask", packed);
  if (packed.dim() != 1 || (packed.size(0) > 1 && packed.stride(0) != 1)) {
    checker.bad("block_mask has shape ", shape_text(packed), "; it must be contiguous and flat");
  }
  const Layout l(layout);
  for (const auto& [name, size] : {std::pair{"block_q", l.block_q}, {"block_k", l.block_k}}) {
    if (size < kMinBlock || size > kMaxBlock || size % kMinBlock != 0) {
      checker.bad("block_mask has ", name, " ", size, "; it must be a multiple of 16 up to 256");
    }
  }
  for (const auto& [name, size] : {std::pair{"seqlen_q", l.seqlen_q}, {"seqlen_k", l.seqlen_k}}) {
    if (size < 0 || size > Band::kMaxLength) {
      checker.bad("block_mask has ", name, " ", size, "; it must be 0 to 2^30");
    }
  }
  if (l.batch != 1 && l.batch != shape.batch) {
    checker.bad("block_mask has batch ", l.batch, "; it must be 1 or ", shape.batch);
  }
  if (l.heads != 1 && l.heads != shape.heads_q) {
    checker.bad("block_mask has ", l.heads, " heads; it must be 1 or ", shape.heads_q,
                ", the heads of q");
  }
  constexpr int64_t kMost = INT32_MAX;
  if (l.entries < 0 || l.entries > kMost || l.bitmaps < 0 ||
      l.bitmaps > (kMost >> BlockRule::kBitmapShift)) {
    checker.bad("block_mask has ", l.entries, " blocks and ", l.bitmaps, " bitmaps: too many");
  }
  BlockMask mask{static_cast<int32_t>(l.seqlen_q),
                 static_cast<int32_t>(l.seqlen_k),
                 static_cast<int32_t>(l.block_q),
                 static_cast<int32_t>(l.block_k),
                 static_cast<int32_t>(l.batch),
                 static_cast<int32_t>(l.heads),
                 {},
                 {},
                 nullptr,
                 nullptr,
                 nullptr,
                 nullptr};
  const int64_t size = l.place(static_cast<const int32_t*>(packed.data()), &mask);
  if (size != packed.numel()) {
    checker.bad("block_mask holds ", packed.numel(), " numbers; its layout needs ", size);
  }
  return mask;
}

void check_block_mask(const Checker& checker, const int32_t* packed, const Tensor& layout) {
  const Layout l(layout);
  BlockMask mask{};
  l.place(packed, &mask);
  check_lines(checker, "block row", mask.rows, l.blocks_q(), l.tables(), l.blocks_k(), l);
  check_lines(checker, "block column", mask.columns, l.blocks_k(), l.tables(), l.blocks_q(), l);
  for (int64_t n = 0; n < 2 * l.tables(); ++n) {
    if (mask.bands[n] < Window::kUnbounded) {
      checker.bad("block_mask: a side of a band is ", mask.bands[n], "; it must be >= -1");
    }
  }
}

}  // namespace fal::torch_binding
