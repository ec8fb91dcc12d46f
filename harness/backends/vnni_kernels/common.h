// What the kernels of this folder share: the layout of a panel, loads and stores of 16 values.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

namespace ditbench {

using at::Tensor;

constexpr int64_t LANES = 16;       // outputs of a panel: the 32-bit lanes of a register
constexpr int64_t DEPTH = 4;        // channels that one instruction sums
constexpr int64_t PANEL = LANES * DEPTH;
constexpr int MIDDLE = 128;         // between signed and unsigned codes

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline __mmask16 first(int64_t count) { return count >= LANES ? 0xFFFF : static_cast<__mmask16>((1u << count) - 1); }

// each(c, mask) for every 16 of `channels`; all but the last with a mask that the compiler knows to be full.
template <typename F>
inline void for_lanes(int64_t channels, F&& each) {
  int64_t c = 0;
  for (; c + LANES <= channels; c += LANES) each(c, __mmask16(0xFFFF));
  if (c < channels) each(c, first(channels - c));
}

inline __m512 load16(const float* p, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, p); }

inline __m512 load16(const at::BFloat16* p, __mmask16 mask) {
  const __m256i half = _mm256_maskz_loadu_epi16(mask, p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// Stores without a mask where it is full: loops over whole rows are a fifth faster for it.
inline void store_halves(void* p, __mmask16 mask, __m256i halves) {
  if (mask == 0xFFFF) {
    _mm256_storeu_si256(static_cast<__m256i*>(p), halves);
  } else {
    _mm256_mask_storeu_epi16(p, mask, halves);
  }
}

inline void store_bytes(void* p, __mmask16 mask, __m128i bytes) {
  if (mask == 0xFFFF) {
    _mm_storeu_si128(static_cast<__m128i*>(p), bytes);
  } else {
    _mm_mask_storeu_epi8(p, mask, bytes);
  }
}

inline void store16(float* p, __mmask16 mask, __m512 values) { _mm512_mask_storeu_ps(p, mask, values); }

const bool CONVERTS = __builtin_cpu_supports("avx512bf16");

// To nearest, ties to even; NaN stays NaN. The instruction takes subnormals for zero, so that they go the long way.
inline void store16(at::BFloat16* p, __mmask16 mask, __m512 values) {
  constexpr int NAN_OR_SUBNORMAL = 0x01 | 0x80 | 0x20;
  if (CONVERTS && !_mm512_fpclass_ps_mask(values, NAN_OR_SUBNORMAL)) {
    store_halves(p, mask, (__m256i)_mm512_cvtneps_pbh(values));
    return;
  }
  const __m512i bits = _mm512_castps_si512(values);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7FC0));
  store_halves(p, mask, _mm512_cvtepi32_epi16(rounded));
}

}  // namespace ditbench
