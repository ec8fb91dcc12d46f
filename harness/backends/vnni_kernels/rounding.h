// How a row of activations becomes codes: measured, scaled and rounded, as the simulated path does it.
#pragma once

#include "common.h"

#include <ATen/ops/empty.h>

#include <limits>

namespace ditbench {

struct Rounding {
  bool symmetric;
  int quant_min, quant_max;
  float clip;

  Rounding(int64_t quant_max, bool symmetric, double clip)
      : symmetric(symmetric), quant_min(symmetric ? -int(quant_max) : 0), quant_max(int(quant_max)), clip(float(clip)) {}
};

// As affine_from_range of the simulated path, so that the codes are the same.
inline void affine_of_range(float low, float high, const Rounding& rounding, float& scale, float& zero_point) {
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
  for_lanes(channels, [&](int64_t c, __mmask16 mask) __attribute__((always_inline)) {
    const __m512 values = load16(x + c, mask);
    low = _mm512_min_ps(low, values);
    high = _mm512_max_ps(high, values);
  });
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
  for_lanes(channels, [&](int64_t c, __mmask16 mask) __attribute__((always_inline)) {
    __m512 code = _mm512_div_ps(load16(x + c, mask), scales);
    nan |= _mm512_cmp_ps_mask(code, code, _CMP_UNORD_Q);
    code = _mm512_roundscale_ps(code, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    code = _mm512_min_ps(_mm512_max_ps(_mm512_add_ps(code, zeros), least), most);
    const __m512i integers = _mm512_add_epi32(_mm512_cvtps_epi32(code), to_unsigned);
    sums = _mm512_mask_add_epi32(sums, mask, sums, integers);
    store_bytes(codes + c, mask, _mm512_cvtepi32_epi8(integers));
  });
  if (nan) scale = std::numeric_limits<float>::quiet_NaN();
  return _mm512_reduce_add_epi32(sums);
}

// The codes of all rows, and what a product needs beside them.
class CodedRows {
 public:
  // given_scale, given_zero_point (M): else every group of a row has its own. sum_groups: parts of a row whose codes are summed.
  CodedRows(
      const Tensor& x, int64_t rows, int64_t channels, const std::optional<Tensor>& given_scale,
      const std::optional<Tensor>& given_zero_point, int64_t groups, int64_t sum_groups, const Rounding& rounding)
      : channels_(channels), stride_(ceil_div(channels, 2 * DEPTH) * 2 * DEPTH), groups_(groups), sum_groups_(sum_groups),
        rounding_(rounding), codes_(at::empty({rows, stride_}, x.options().dtype(at::kByte))),
        scale_(at::empty({rows, groups}, x.options().dtype(at::kFloat))),
        offset_(at::empty({rows, groups}, x.options().dtype(at::kInt))),
        sums_(at::empty({rows, sum_groups}, x.options().dtype(at::kInt))),
        scale_in_(given_scale ? given_scale->const_data_ptr<float>() : nullptr),
        zero_in_(given_zero_point ? given_zero_point->const_data_ptr<float>() : nullptr),
        codes_at_(codes_.data_ptr<uint8_t>()), scale_at_(scale_.data_ptr<float>()), offset_at_(offset_.data_ptr<int32_t>()),
        sums_at_(sums_.data_ptr<int32_t>()) {
    TORCH_CHECK(channels % sum_groups == 0 && sum_groups % groups == 0, "groups divide the channels");
  }

  // Row m, whose values are x (C).
  template <typename T>
  void set(int64_t m, const T* x) {
    const int64_t width = channels_ / groups_, sum_width = channels_ / sum_groups_, parts = sum_groups_ / groups_;
    uint8_t* codes = codes_at_ + m * stride_;
    std::memset(codes + channels_, 0, stride_ - channels_);
    for (int64_t g = 0; g < groups_; ++g) {
      float scale = scale_in_ ? scale_in_[m] : 1.0f, zero_point = zero_in_ ? zero_in_[m] : 0.0f;
      if (!scale_in_) find_affine(x + g * width, width, rounding_, scale, zero_point);
      for (int64_t part = g * parts; part < (g + 1) * parts; ++part)
        sums_at_[m * sum_groups_ + part] = round_codes(
            x + part * sum_width, sum_width, rounding_, scale, zero_point, codes + part * sum_width);
      scale_at_[m * groups_ + g] = scale;
      offset_at_[m * groups_ + g] = int32_t(zero_point) + (rounding_.symmetric ? MIDDLE : 0);
    }
  }

  // codes (M, C rounded up to 8) uint8, scale and offset (M, groups), sum of codes (M, sum_groups).
  std::tuple<Tensor, Tensor, Tensor, Tensor> tensors() const { return {codes_, scale_, offset_, sums_}; }

 private:
  int64_t channels_, stride_, groups_, sum_groups_;
  Rounding rounding_;
  Tensor codes_, scale_, offset_, sums_;
  const float *scale_in_, *zero_in_;
  uint8_t* codes_at_;
  float* scale_at_;
  int32_t *offset_at_, *sums_at_;
};

}  // namespace ditbench
