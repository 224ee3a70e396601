// A block mask as it crosses the operators: one int32 tensor on q's device that holds every array,
// and one int64 tensor on the CPU that says how large they are, so that nothing waits for a device.
#pragma once

#include "checks.h"

namespace fal::torch_binding {

// `packed`, in this order (tables = batch * heads):
//   row_start     (tables, blocks_q + 1)     column        (entries)   row_rule      (entries)
//   column_start  (tables, blocks_k + 1)     row           (entries)   column_rule   (entries)
//   bands         (tables, 2)
//   documents_q   (tables, seqlen_q)         documents_k   (tables, seqlen_k), both or neither
//   bitmaps       (bitmaps, block_q, ceil(block_k / 32))
// `layout`: seqlen_q, seqlen_k, block_q, block_k, batch, heads, entries, documents (0 or 1),
// bitmaps. Checks everything but the contents of `packed`.
BlockMask block_mask_of(const Checker& checker, const Tensor& packed, const Tensor& layout,
                        const Shape& shape);

// The contents, host pointers: starts and indices within bounds and ascending, rules that name what
// is there.
void check_block_mask(const Checker& checker, const int32_t* packed, const Tensor& layout);

}  // namespace fal::torch_binding
