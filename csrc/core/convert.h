// Scalar conversions between float and the 16- and 8-bit types, in integer arithmetic: the same
// bits on every compiler and device. Rounding is to nearest, ties to even. Vectorised loops have
// their own; these are for single elements, cold paths and tests.
#pragma once

#include <math.h>
#include <string.h>

#include "problem.h"

namespace fal {

FAL_HOST_DEVICE uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
FAL_HOST_DEVICE float bits_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

FAL_HOST_DEVICE float bfloat16_to_float(uint16_t bits) {
  return bits_float(static_cast<uint32_t>(bits) << 16);
}
FAL_HOST_DEVICE uint16_t float_to_bfloat16(float x) {
  const uint32_t bits = float_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// A float of `exponent_bits` and `mantissa_bits` with IEEE subnormals, widened. Infinities and NaNs
// are the caller's.
FAL_HOST_DEVICE float widen_small_float(uint32_t magnitude, int mantissa_bits, int bias) {
  const uint32_t exponent = magnitude >> mantissa_bits;
  const uint32_t mantissa = magnitude & ((1u << mantissa_bits) - 1u);
  if (exponent == 0) {  // subnormal: mantissa * 2^(1 - bias - mantissa_bits), exact in float
    return static_cast<float>(mantissa) *
           bits_float(static_cast<uint32_t>(127 + 1 - bias - mantissa_bits) << 23);
  }
  return bits_float(((exponent + 127u - static_cast<uint32_t>(bias)) << 23) |
                    (mantissa << (23 - mantissa_bits)));
}

// The magnitude of a non-NaN float, rounded to a small float; it may round up past the largest
// finite value.
FAL_HOST_DEVICE uint32_t narrow_small_float(uint32_t magnitude, int mantissa_bits, int bias) {
  const int32_t exponent = static_cast<int32_t>(magnitude >> 23) - 127 + bias;
  uint32_t mantissa = magnitude & 0x7fffffu;
  int32_t shift = 23 - mantissa_bits;
  uint32_t kept;
  if (exponent <= 0) {  // subnormal in the small type
    shift += 1 - exponent;
    if (shift > 25) return 0;
    mantissa |= 0x800000u;
    kept = mantissa >> shift;
  } else {
    kept = (static_cast<uint32_t>(exponent) << mantissa_bits) | (mantissa >> shift);
  }
  const uint32_t rest = mantissa & ((1u << shift) - 1u), half = 1u << (shift - 1);
  return kept + (rest > half || (rest == half && (kept & 1u)) ? 1u : 0u);
}

FAL_HOST_DEVICE float float16_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_float(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  return bits_float(sign | float_bits(widen_small_float(magnitude, 10, 15)));
}
FAL_HOST_DEVICE uint16_t float_to_float16(float x) {
  const uint32_t bits = float_bits(x), sign = (bits >> 16) & 0x8000u,
                 magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00u);  // >= 2^16
  return static_cast<uint16_t>(sign | narrow_small_float(magnitude, 10, 15));
}

// fp8 e4m3 as in the OCP specification ("fn"): no infinities, one NaN magnitude, largest value 448.
constexpr float kFloat8E4M3Max = 448.f;

FAL_HOST_DEVICE float float8_e4m3_to_float(uint8_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x80u) << 24, magnitude = bits & 0x7fu;
  if (magnitude == 0x7fu) return bits_float(sign | 0x7fc00000u);
  return bits_float(sign | float_bits(widen_small_float(magnitude, 3, 7)));
}
// Saturates to +-448; NaN stays NaN.
FAL_HOST_DEVICE uint8_t float_to_float8_e4m3(float x) {
  const uint32_t bits = float_bits(x), sign = (bits >> 24) & 0x80u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint8_t>(sign | 0x7fu);
  if (magnitude >= float_bits(kFloat8E4M3Max)) return static_cast<uint8_t>(sign | 0x7eu);
  return static_cast<uint8_t>(sign | narrow_small_float(magnitude, 3, 7));
}

// One element of a float32, float16 or bfloat16 array whose type is known at run time.
FAL_HOST_DEVICE float load_element(const void* data, DType dtype, int64_t index) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(data)[index];
  const uint16_t bits = static_cast<const uint16_t*>(data)[index];
  return dtype == DType::kFloat16 ? float16_to_float(bits) : bfloat16_to_float(bits);
}
FAL_HOST_DEVICE void store_element(void* data, DType dtype, int64_t index, float x) {
  if (dtype == DType::kFloat32) {
    static_cast<float*>(data)[index] = x;
  } else {
    static_cast<uint16_t*>(data)[index] =
        dtype == DType::kFloat16 ? float_to_float16(x) : float_to_bfloat16(x);
  }
}

// Quantised storage: x = stored * scale, with scale = max |row| / quantised_limit.
FAL_HOST_DEVICE float quantised_limit(DType dtype) {
  return dtype == DType::kInt8 ? 127.f : kFloat8E4M3Max;
}
// Of magnitudes; a NaN stays. It becomes the row's factor then, so that it is seen again when the
// row is read, whatever the stored type can hold; an infinity is read as a NaN.
FAL_HOST_DEVICE float larger_or_nan(float a, float b) { return a != a ? a : b <= a ? a : b; }
FAL_HOST_DEVICE uint8_t quantise(float scaled, DType dtype) {
  if (dtype != DType::kInt8) return float_to_float8_e4m3(scaled);
  const float rounded = rintf(scaled);  // |scaled| <= 127 by construction; NaN becomes 0
  return rounded == rounded ? static_cast<uint8_t>(static_cast<int8_t>(rounded)) : uint8_t{0};
}
FAL_HOST_DEVICE float dequantise(uint8_t stored, DType dtype) {
  return dtype == DType::kInt8 ? static_cast<float>(static_cast<int8_t>(stored))
                               : float8_e4m3_to_float(stored);
}

}  // namespace fal
