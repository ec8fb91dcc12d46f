// x wᵀ + b in bfloat16 for a few rows (one timestep per sample) on CPUs with AVX512-BF16, with float32 sums.
//
// Weights are read once, as they lie; that is what it costs, however few the rows. Every sum runs along the channels in one order, so that a row comes
// out the same however many there are.

#include "common.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

namespace ditbench {
namespace {

using Half = at::BFloat16;

constexpr int64_t CHANNELS = 32;        // of a register
constexpr int64_t ROWS = 4, OUTPUTS = 4; // multiplied together: 16 sums stay in registers
constexpr int64_t AHEAD = 16384;         // so many weights before they are multiplied they are fetched, one line for each that is read

__m512i load32(const Half* p, int64_t count) {
  const __mmask32 mask = count >= CHANNELS ? 0xFFFFFFFF : (1u << count) - 1;
  return _mm512_maskz_loadu_epi16(mask, p);
}

template <int R, int O>
void multiply(const Half* x, const Half* w, int64_t channels, float (*out)[OUTPUTS]) {
  __m512 sums[R][O];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int o = 0; o < O; ++o) sums[r][o] = _mm512_setzero_ps();
  for (int64_t c = 0; c < channels; c += CHANNELS) {
    __m512i weights[O];
#pragma GCC unroll 4
    for (int o = 0; o < O; ++o) {
      weights[o] = load32(w + o * channels + c, channels - c);
      _mm_prefetch(reinterpret_cast<const char*>(w + o * channels + c + AHEAD), _MM_HINT_T0);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const __m512i values = load32(x + r * channels + c, channels - c);
#pragma GCC unroll 4
      for (int o = 0; o < O; ++o) sums[r][o] = _mm512_dpbf16_ps(sums[r][o], (__m512bh)values, (__m512bh)weights[o]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int o = 0; o < O; ++o) out[r][o] = _mm512_reduce_add_ps(sums[r][o]);
}

using Multiply = void (*)(const Half*, const Half*, int64_t, float (*)[OUTPUTS]);

template <int R>
constexpr Multiply of_outputs[OUTPUTS] = {multiply<R, 1>, multiply<R, 2>, multiply<R, 3>, multiply<R, 4>};
constexpr const Multiply* of_rows[ROWS] = {of_outputs<1>, of_outputs<2>, of_outputs<3>, of_outputs<4>};

// x (M, C), weight (O, C), bias (O), all bfloat16 and contiguous → (M, O).
Tensor few_rows(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1), "x is (M, C), weight (O, C)");
  TORCH_CHECK(x.is_contiguous() && weight.is_contiguous(), "x and weight are contiguous");
  TORCH_CHECK(x.scalar_type() == at::kBFloat16 && weight.scalar_type() == at::kBFloat16, "x and weight are bfloat16");
  TORCH_CHECK(!bias || (bias->scalar_type() == at::kBFloat16 && bias->is_contiguous() && bias->numel() == weight.size(0)),
      "the bias is bfloat16 (O)");
  const int64_t rows = x.size(0), channels = x.size(1), outputs = weight.size(0);
  Tensor y = at::empty({rows, outputs}, x.options());
  const Half *x_at = x.const_data_ptr<Half>(), *w_at = weight.const_data_ptr<Half>();
  const Half* bias_at = bias ? bias->const_data_ptr<Half>() : nullptr;
  Half* y_at = y.data_ptr<Half>();
  at::parallel_for(0, ceil_div(outputs, OUTPUTS), 16, [&](int64_t begin, int64_t end) {
    float sums[ROWS][OUTPUTS];
    for (int64_t o = begin * OUTPUTS; o < std::min(end * OUTPUTS, outputs); o += OUTPUTS) {
      const int64_t together = std::min(OUTPUTS, outputs - o);
      for (int64_t m = 0; m < rows; m += ROWS) {
        const int64_t few = std::min(ROWS, rows - m);
        of_rows[few - 1][together - 1](x_at + m * channels, w_at + o * channels, channels, sums);
        for (int64_t r = 0; r < few; ++r)
          for (int64_t i = 0; i < together; ++i)
            y_at[(m + r) * outputs + o + i] = Half(bias_at ? sums[r][i] + float(bias_at[o + i]) : sums[r][i]);
      }
    }
  });
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ditbench_vnni, library) {
  library.def("few_rows(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
}

TORCH_LIBRARY_IMPL(ditbench_vnni, CPU, library) {
  library.impl("few_rows", few_rows);
}

}  // namespace ditbench
