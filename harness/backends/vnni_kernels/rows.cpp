// Rows of activations become codes: measured, scaled and rounded in one pass.

#include "common.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <limits>

namespace ditbench {
namespace {

struct Rounding {
  bool symmetric;
  int quant_min, quant_max;
  float clip;
};

// As affine_from_range of the simulated path, so that the codes are the same.
void affine_of_range(float low, float high, const Rounding& rounding, float& scale, float& zero_point) {
  low = std::min(rounding.clip * low, 0.0f);
  high = std::max(rounding.clip * high, 0.0f);
  const float range = rounding.symmetric ? std::max(-low, high) : high - low;
  scale = range / static_cast<float>(rounding.quant_max);
  if (scale == 0.0f) scale = 1.0f;
  if (rounding.symmetric) {
    zero_point = 0.0f;
  } else {
    zero_point = std::nearbyint(-low / scale);
    zero_point = std::min(std::max(zero_point, float(rounding.quant_min)), float(rounding.quant_max));
  }
}

template <typename T>
void find_affine(const T* x, int64_t channels, const Rounding& rounding, float& scale, float& zero_point) {
  __m512 low = _mm512_setzero_ps(), high = _mm512_setzero_ps();
  for (int64_t c = 0; c < channels; c += LANES) {
    const __m512 values = load16(x + c, first(channels - c));
    low = _mm512_min_ps(low, values);
    high = _mm512_max_ps(high, values);
  }
  affine_of_range(_mm512_reduce_min_ps(low), _mm512_reduce_max_ps(high), rounding, scale, zero_point);
}

// → the sum of the codes, as they are stored; where x is NaN or x / scale is, the scale becomes NaN.
template <typename T>
int32_t round_codes(const T* x, int64_t channels, const Rounding& rounding, float& scale, float zero_point, uint8_t* codes) {
  const __m512 scales = _mm512_set1_ps(scale), zeros = _mm512_set1_ps(zero_point);
  const __m512 least = _mm512_set1_ps(float(rounding.quant_min)), most = _mm512_set1_ps(float(rounding.quant_max));
  const __m512i to_unsigned = _mm512_set1_epi32(rounding.symmetric ? MIDDLE : 0);
  __m512i sums = _mm512_setzero_si512();
  __mmask16 nan = 0;
  for (int64_t c = 0; c < channels; c += LANES) {
    const __mmask16 mask = first(channels - c);
    __m512 code = _mm512_div_ps(load16(x + c, mask), scales);
    nan |= _mm512_cmp_ps_mask(code, code, _CMP_UNORD_Q);
    code = _mm512_roundscale_ps(code, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    code = _mm512_min_ps(_mm512_max_ps(_mm512_add_ps(code, zeros), least), most);
    const __m512i integers = _mm512_add_epi32(_mm512_cvtps_epi32(code), to_unsigned);
    sums = _mm512_mask_add_epi32(sums, mask, sums, integers);
    _mm_mask_storeu_epi8(codes + c, mask, _mm512_cvtepi32_epi8(integers));
  }
  if (nan) scale = std::numeric_limits<float>::quiet_NaN();
  return _mm512_reduce_add_epi32(sums);
}

// x (M, C) → codes (M, C rounded up to 8) uint8, scale and offset (M, groups), sum of codes (M, sum_groups).
// scale, zero_point (M): given ones, else every group has its own.
std::tuple<Tensor, Tensor, Tensor, Tensor> quantize_rows(
    const Tensor& x, const std::optional<Tensor>& given_scale, const std::optional<Tensor>& given_zero_point,
    int64_t groups, int64_t sum_groups, int64_t quant_max, bool symmetric, double clip) {
  TORCH_CHECK(x.dim() == 2 && x.is_contiguous(), "x is (M, C) and contiguous, got ", x.sizes());
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16, "x is float32 or bfloat16");
  const int64_t rows = x.size(0), channels = x.size(1);
  TORCH_CHECK(channels % sum_groups == 0 && sum_groups % groups == 0, "groups divide the channels");
  const int64_t width = channels / groups, sum_width = channels / sum_groups, parts = sum_groups / groups;
  const int64_t stride = ceil_div(channels, 2 * DEPTH) * 2 * DEPTH;
  const Rounding rounding{symmetric, symmetric ? -int(quant_max) : 0, int(quant_max), float(clip)};
  Tensor codes = at::empty({rows, stride}, x.options().dtype(at::kByte));
  Tensor scale = at::empty({rows, groups}, x.options().dtype(at::kFloat));
  Tensor offset = at::empty({rows, groups}, x.options().dtype(at::kInt));
  Tensor sums = at::empty({rows, sum_groups}, x.options().dtype(at::kInt));
  const float* scale_in = given_scale ? given_scale->const_data_ptr<float>() : nullptr;
  const float* zero_in = given_zero_point ? given_zero_point->const_data_ptr<float>() : nullptr;
  uint8_t* codes_out = codes.data_ptr<uint8_t>();
  float* scale_out = scale.data_ptr<float>();
  int32_t *offset_out = offset.data_ptr<int32_t>(), *sums_out = sums.data_ptr<int32_t>();

  auto run = [&](auto* values) {
    at::parallel_for(0, rows, std::max<int64_t>(1, 16384 / std::max<int64_t>(channels, 1)), [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) {
        std::memset(codes_out + m * stride + channels, 0, stride - channels);
        for (int64_t g = 0; g < groups; ++g) {
          float one = scale_in ? scale_in[m] : 1.0f, zero_point = zero_in ? zero_in[m] : 0.0f;
          if (!scale_in) find_affine(values + m * channels + g * width, width, rounding, one, zero_point);
          for (int64_t part = g * parts; part < (g + 1) * parts; ++part)
            sums_out[m * sum_groups + part] = round_codes(
                values + m * channels + part * sum_width, sum_width, rounding, one, zero_point,
                codes_out + m * stride + part * sum_width);
          scale_out[m * groups + g] = one;
          offset_out[m * groups + g] = int32_t(zero_point) + (symmetric ? MIDDLE : 0);
        }
      }
    });
  };
  if (x.scalar_type() == at::kFloat) {
    run(x.const_data_ptr<float>());
  } else {
    run(x.const_data_ptr<at::BFloat16>());
  }
  return {codes, scale, offset, sums};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ditbench_vnni, library) {
  library.def(
      "quantize_rows(Tensor x, Tensor? scale, Tensor? zero_point, int groups, int sum_groups,"
      " int quant_max, bool symmetric, float clip)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(ditbench_vnni, CPU, library) {
  library.impl("quantize_rows", quantize_rows);
}

}  // namespace ditbench
