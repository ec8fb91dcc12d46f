// What lies between two products of a block: x + gate · y, and LayerNorm with modulation, whose result becomes codes while it is in the
// first-level cache. bfloat16 in and out, float32 in between, one rounding at the end.

#include "rounding.h"

#include <torch/library.h>

#include <cmath>

namespace ditbench {
namespace {

using Half = at::BFloat16;

// (B, C) with channels side by side: chunks of one product have rows farther apart.
struct PerSample {
  const Half* at;
  int64_t apart, tokens;

  PerSample(const Tensor& x, const Tensor& of, const char* name)
      : at(of.const_data_ptr<Half>()), apart(of.stride(0)), tokens(x.size(1)) {
    TORCH_CHECK(of.scalar_type() == at::kBFloat16 && of.dim() == 2 && of.stride(1) == 1, name, " is bfloat16 (B, C)");
    TORCH_CHECK(of.size(0) == x.size(0) && of.size(1) == x.size(2), name, " is (B, C) of x ", x.sizes(), ", got ", of.sizes());
  }

  const Half* of_row(int64_t m) const { return at + m / tokens * apart; }
};

void check_tokens(const Tensor& x, const char* name) {
  TORCH_CHECK(x.scalar_type() == at::kBFloat16 && x.dim() == 3 && x.is_contiguous(), name, " is bfloat16 (B, T, C), contiguous");
}

template <typename F>
void for_rows(const Tensor& x, F&& of_row) {
  const int64_t rows = x.size(0) * x.size(1), channels = x.size(2);
  at::parallel_for(0, rows, std::max<int64_t>(1, 16384 / std::max<int64_t>(channels, 1)), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) of_row(m);
  });
}

// (x − mean) / √(variance + eps) · (1 + scale) + shift of one row.
void modulate_row(const Half* x, int64_t channels, float eps, const Half* scale, const Half* shift, Half* y) {
  __m512 sum = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
  for_lanes(channels, [&](int64_t c, __mmask16 mask) { sum = _mm512_add_ps(sum, load16(x + c, mask)); });
  const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / float(channels));
  for_lanes(channels, [&](int64_t c, __mmask16 mask) {
    const __m512 off = _mm512_maskz_sub_ps(mask, load16(x + c, mask), mean);
    squares = _mm512_fmadd_ps(off, off, squares);
  });
  const __m512 inverse = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / float(channels) + eps));
  const __m512 one = _mm512_set1_ps(1.0f);
  for_lanes(channels, [&](int64_t c, __mmask16 mask) {
    const __m512 normed = _mm512_mul_ps(_mm512_sub_ps(load16(x + c, mask), mean), inverse);
    const __m512 factor = _mm512_add_ps(one, load16(scale + c, mask));
    store16(y + c, mask, _mm512_fmadd_ps(normed, factor, load16(shift + c, mask)));
  });
}

// x (B, T, C), scale and shift (B, C) → the same as x.
Tensor modulated(const Tensor& x, const Tensor& scale, const Tensor& shift, double eps) {
  check_tokens(x, "x");
  const PerSample scales(x, scale, "scale"), shifts(x, shift, "shift");
  const int64_t channels = x.size(2);
  Tensor y = at::empty(x.sizes(), x.options());
  const Half* from = x.const_data_ptr<Half>();
  Half* to = y.data_ptr<Half>();
  for_rows(x, [&](int64_t m) {
    modulate_row(from + m * channels, channels, float(eps), scales.of_row(m), shifts.of_row(m), to + m * channels);
  });
  return y;
}

// The same, and what `quantize_rows` makes of it.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> modulated_rows(
    const Tensor& x, const Tensor& scale, const Tensor& shift, double eps, const std::optional<Tensor>& given_scale,
    const std::optional<Tensor>& given_zero_point, int64_t groups, int64_t sum_groups, int64_t quant_max, bool symmetric,
    double clip) {
  check_tokens(x, "x");
  const PerSample scales(x, scale, "scale"), shifts(x, shift, "shift");
  const int64_t channels = x.size(2), rows = x.size(0) * x.size(1);
  Tensor y = at::empty(x.sizes(), x.options());
  CodedRows coded(x, rows, channels, given_scale, given_zero_point, groups, sum_groups, {quant_max, symmetric, clip});
  const Half* from = x.const_data_ptr<Half>();
  Half* to = y.data_ptr<Half>();
  for_rows(x, [&](int64_t m) {
    Half* row = to + m * channels;
    modulate_row(from + m * channels, channels, float(eps), scales.of_row(m), shifts.of_row(m), row);
    coded.set(m, row);
  });
  return std::tuple_cat(std::make_tuple(y), coded.tensors());
}

// x + gate · y of x, y (B, T, C) and gate (B, C).
Tensor gated(const Tensor& x, const Tensor& gate, const Tensor& y) {
  check_tokens(x, "x");
  check_tokens(y, "y");
  TORCH_CHECK(x.sizes() == y.sizes(), "x and y have one shape, got ", x.sizes(), " and ", y.sizes());
  const PerSample gates(x, gate, "gate");
  const int64_t channels = x.size(2);
  Tensor sum = at::empty(x.sizes(), x.options());
  const Half *x_at = x.const_data_ptr<Half>(), *y_at = y.const_data_ptr<Half>();
  Half* to = sum.data_ptr<Half>();
  for_rows(x, [&](int64_t m) {
    const Half* factors = gates.of_row(m);
    for_lanes(channels, [&](int64_t c, __mmask16 mask) {
      const int64_t at = m * channels + c;
      const __m512 moved = _mm512_fmadd_ps(load16(factors + c, mask), load16(y_at + at, mask), load16(x_at + at, mask));
      store16(to + at, mask, moved);
    });
  });
  return sum;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ditbench_vnni, library) {
  library.def("modulated(Tensor x, Tensor scale, Tensor shift, float eps) -> Tensor");
  library.def(
      "modulated_rows(Tensor x, Tensor scale, Tensor shift, float eps, Tensor? given_scale, Tensor? given_zero_point, int groups,"
      " int sum_groups, int quant_max, bool symmetric, float clip) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def("gated(Tensor x, Tensor gate, Tensor y) -> Tensor");
}

TORCH_LIBRARY_IMPL(ditbench_vnni, CPU, library) {
  library.impl("modulated", modulated);
  library.impl("modulated_rows", modulated_rows);
  library.impl("gated", gated);
}

}  // namespace ditbench
