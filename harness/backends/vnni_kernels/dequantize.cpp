// Weights alone: codes become floats again.

#include "common.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

namespace ditbench {
namespace {

// 16 codes from where they lie packed: one byte each, or two to a byte, the lower nibble first.
__m512i load_codes(const uint8_t* from, int64_t bits, bool is_signed) {
  if (bits == 8) {
    const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return is_signed ? _mm512_cvtepi8_epi32(codes) : _mm512_cvtepu8_epi32(codes);
  }
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)), nibble = _mm_set1_epi8(15);
  const __m128i low = _mm_and_si128(bytes, nibble), high = _mm_and_si128(_mm_srli_epi16(bytes, 4), nibble);
  const __m512i codes = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(low, high)), eight = _mm512_set1_epi32(is_signed ? 8 : 0);
  return _mm512_sub_epi32(_mm512_xor_si512(codes, eight), eight);
}

template <typename T>
void dequantize_row(
    const uint8_t* packed, int64_t bits, bool is_signed, int64_t width, int64_t groups, const float* scale,
    const float* zero_point, T* to) {
  for (int64_t g = 0; g < groups; ++g) {
    const __m512 scales = _mm512_set1_ps(scale[g]), zeros = _mm512_set1_ps(zero_point ? zero_point[g] : 0.0f);
    for (int64_t c = g * width; c < (g + 1) * width; c += LANES) {
      const __m512 codes = _mm512_cvtepi32_ps(load_codes(packed + c * bits / 8, bits, is_signed));
      store16(to + c, 0xFFFF, _mm512_mul_ps(_mm512_sub_ps(codes, zeros), scales));
    }
  }
}

// packed (O, C · bits / 8) uint8, scale and zero_point (O, G) float32 → (code − zero_point) · scale (O, C) in dtype.
Tensor dequantize(
    const Tensor& packed, int64_t bits, bool is_signed, const Tensor& scale, const std::optional<Tensor>& zero_point,
    at::ScalarType dtype) {
  const int64_t outputs = packed.size(0), channels = packed.size(1) * 8 / bits, groups = scale.size(1);
  TORCH_CHECK(bits == 8 || bits == 4, "weights are stored in 8 or 4 bits, got ", bits);
  TORCH_CHECK(channels % (groups * LANES) == 0, "groups hold a multiple of 16 channels, got ", channels, " in ", groups);
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kBFloat16, "weights become float32 or bfloat16");
  Tensor weight = at::empty({outputs, channels}, scale.options().dtype(dtype));
  const uint8_t* from = packed.const_data_ptr<uint8_t>();
  const float* scales = scale.const_data_ptr<float>();
  const float* zeros = zero_point ? zero_point->const_data_ptr<float>() : nullptr;
  auto run = [&](auto* to) {
    at::parallel_for(0, outputs, 8, [&](int64_t begin, int64_t end) {
      for (int64_t o = begin; o < end; ++o)
        dequantize_row(
            from + o * packed.size(1), bits, is_signed, channels / groups, groups, scales + o * groups,
            zeros ? zeros + o * groups : nullptr, to + o * channels);
    });
  };
  if (dtype == at::kFloat) {
    run(weight.data_ptr<float>());
  } else {
    run(weight.data_ptr<at::BFloat16>());
  }
  return weight;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ditbench_vnni, library) {
  library.def(
      "dequantize(Tensor packed, int bits, bool is_signed, Tensor scale, Tensor? zero_point, ScalarType dtype) -> Tensor");
}

TORCH_LIBRARY_IMPL(ditbench_vnni, CPU, library) {
  library.impl("dequantize", dequantize);
}

}  // namespace ditbench
