// Dropout bits as a pure function of (seed, batch, head, query row, key): Philox4x32-7, the
// counter-based generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC
// 2011), section 4 (seven rounds pass BigCrush). No tiling, thread count or device can change a
// mask.
//
// One call makes 128 bits = eight 16-bit draws, and covers the eight elements of a 16 x 16 block of
// scores that one lane of mma.sync.m16n8k16 holds, so that a tensor-core kernel wastes no draw:
// rows {g, g + 8} x keys {2c, 2c + 1, 2c + 8, 2c + 9}, with g = i mod 8 and c = (j mod 8) / 2.
#pragma once

#include "config.h"

namespace fal {

struct PhiloxBits {
  uint32_t word[4];

  // draw 0 .. 7
  FAL_HOST_DEVICE uint32_t half(int32_t index) const {
    return (word[index >> 1] >> (16 * (index & 1))) & 0xffffu;
  }
};

FAL_HOST_DEVICE void philox_multiply(uint32_t a, uint32_t b, uint32_t* high, uint32_t* low) {
  const uint64_t product = static_cast<uint64_t>(a) * b;
  *high = static_cast<uint32_t>(product >> 32);
  *low = static_cast<uint32_t>(product);
}

FAL_HOST_DEVICE PhiloxBits philox4x32_7(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2,
                                        uint32_t c3) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int round = 0; round < 7; ++round) {
    uint32_t high0, low0, high1, low1;
    philox_multiply(0xD2511F53u, c0, &high0, &low0);
    philox_multiply(0xCD9E8D57u, c2, &high1, &low1);
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// An element is dropped iff its 16-bit draw is below the threshold.
struct Dropout {
  uint64_t seed;
  uint32_t threshold;  // 0 .. 65535 out of 65536; 0 = off

  // The probability is met to within 2^-17; the survivors' scale uses the probability that is
  // really applied.
  static uint32_t threshold_of(double probability) {
    const double scaled = probability * 65536.0 + 0.5;
    return scaled >= 65535.0 ? 65535u : static_cast<uint32_t>(scaled);
  }
  FAL_HOST_DEVICE float keep_scale() const {
    return 65536.f / static_cast<float>(65536u - threshold);
  }

  // The eight draws of the lane that owns element (i, j). batch_head = b * heads_q + h.
  FAL_HOST_DEVICE PhiloxBits block(uint32_t batch_head, uint32_t i, uint32_t j) const {
    return philox4x32_7(seed, (i >> 4) * 8 + (i & 7), (j >> 4) * 4 + ((j & 7) >> 1), batch_head,
                        0u);
  }
  // Which of the eight draws of its block belongs to element (i, j).
  FAL_HOST_DEVICE static int32_t draw_index(uint32_t i, uint32_t j) {
    return static_cast<int32_t>(((i >> 3) & 1) * 4 + ((j >> 3) & 1) * 2 + (j & 1));
  }
  FAL_HOST_DEVICE bool keeps(uint32_t batch_head, uint32_t i, uint32_t j) const {
    return block(batch_head, i, j).half(draw_index(i, j)) >= threshold;
  }
};

}  // namespace fal
