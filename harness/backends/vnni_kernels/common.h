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

inline __m512 load16(const float* p, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, p); }

inline __m512 load16(const at::BFloat16* p, __mmask16 mask) {
  const __m256i half = _mm256_maskz_loadu_epi16(mask, p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

inline void store16(float* p, __mmask16 mask, __m512 values) { _mm512_mask_storeu_ps(p, mask, values); }

inline void store16(at::BFloat16* p, __mmask16 mask, __m512 values) {  // to nearest, ties to even; NaN stays NaN
  const __m512i bits = _mm512_castps_si512(values);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7FC0));
  _mm256_mask_storeu_epi16(p, mask, _mm512_cvtepi32_epi16(rounded));
}

}  // namespace ditbench
