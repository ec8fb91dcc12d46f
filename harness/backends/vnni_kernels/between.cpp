// What lies between two products of a block: x + gate · y; LayerNorm or RMSNorm with modulation, whose result becomes codes while it
// is in the first-level cache; rotary positions. bfloat16 in and out, float32 in between, one rounding at the end.

#include "rounding.h"

#include <torch/library.h>

#include <cmath>

namespace ditbench {
namespace {

using Half = at::BFloat16;

// float32 (B, C), or (1, C) for all samples, with channels side by side; or nothing.
struct PerSample {
  const float* at = nullptr;
  int64_t apart = 0, tokens = 1;

  PerSample(const Tensor& x, const std::optional<Tensor>& of, const char* name) {
    if (!of) return;
    TORCH_CHECK(of->scalar_type() == at::kFloat && of->dim() == 2 && of->stride(1) == 1, name, " is float32 (B, C)");
    TORCH_CHECK(
        (of->size(0) == x.size(0) || of->size(0) == 1) && of->size(1) == x.size(2), name, " is (B, C) of x ", x.sizes(), ", got ",
        of->sizes());
    at = of->const_data_ptr<float>();
    apart = of->size(0) == 1 ? 0 : of->stride(0);
    tokens = std::max<int64_t>(x.size(1), 1);
  }

  const float* of_row(int64_t m) const { return at ? at + m / tokens * apart : nullptr; }
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

struct Norm {
  bool centred;  // LayerNorm; else RMSNorm
  float eps;
  PerSample factor, shift;

  // (x − mean) / √(variance + eps) · factor + shift of row m, which is x.
  void row(int64_t m, const Half* x, int64_t channels, Half* y) const {
    const float *factors = factor.of_row(m), *shifts = shift.of_row(m);
    __m512 mean = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
    if (centred) {
      __m512 sum = _mm512_setzero_ps();
      for_lanes(channels, [&](int64_t c, __mmask16 mask) { sum = _mm512_add_ps(sum, load16(x + c, mask)); });
      mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / float(channels));
    }
    for_lanes(channels, [&](int64_t c, __mmask16 mask) {
      const __m512 off = _mm512_maskz_sub_ps(mask, load16(x + c, mask), mean);
      squares = _mm512_fmadd_ps(off, off, squares);
    });
    const __m512 inverse = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / float(channels) + eps));
    const __m512 one = _mm512_set1_ps(1.0f), none = _mm512_setzero_ps();
    for_lanes(channels, [&](int64_t c, __mmask16 mask) {
      const __m512 normed = _mm512_mul_ps(_mm512_sub_ps(load16(x + c, mask), mean), inverse);
      const __m512 by = factors ? load16(factors + c, mask) : one;
      store16(y + c, mask, _mm512_fmadd_ps(normed, by, shifts ? load16(shifts + c, mask) : none));
    });
  }
};

// x (B, T, C), factor and shift (B, C) → the same as x.
Tensor normed(
    const Tensor& x, const std::optional<Tensor>& factor, const std::optional<Tensor>& shift, double eps, bool centred) {
  check_tokens(x, "x");
  const Norm norm{centred, float(eps), PerSample(x, factor, "factor"), PerSample(x, shift, "shift")};
  const int64_t channels = x.size(2);
  Tensor y = at::empty(x.sizes(), x.options());
  const Half* from = x.const_data_ptr<Half>();
  Half* to = y.data_ptr<Half>();
  for_rows(x, [&](int64_t m) { norm.row(m, from + m * channels, channels, to + m * channels); });
  return y;
}

// The same, and what `quantize_rows` makes of it.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> normed_rows(
    const Tensor& x, const std::optional<Tensor>& factor, const std::optional<Tensor>& shift, double eps, bool centred,
    const std::optional<Tensor>& given_scale, const std::optional<Tensor>& given_zero_point, int64_t groups, int64_t sum_groups,
    int64_t quant_max, bool symmetric, double clip) {
  check_tokens(x, "x");
  const Norm norm{centred, float(eps), PerSample(x, factor, "factor"), PerSample(x, shift, "shift")};
  const int64_t channels = x.size(2), rows = x.size(0) * x.size(1);
  Tensor y = at::empty(x.sizes(), x.options());
  CodedRows coded(x, rows, channels, given_scale, given_zero_point, groups, sum_groups, {quant_max, symmetric, clip});
  const Half* from = x.const_data_ptr<Half>();
  Half* to = y.data_ptr<Half>();
  for_rows(x, [&](int64_t m) {
    Half* row = to + m * channels;
    norm.row(m, from + m * channels, channels, row);
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
    const float* factors = gates.of_row(m);
    for_lanes(channels, [&](int64_t c, __mmask16 mask) {
      const int64_t at = m * channels + c;
      const __m512 moved = _mm512_fmadd_ps(load16(factors + c, mask), load16(y_at + at, mask), load16(x_at + at, mask));
      store16(to + at, mask, moved);
    });
  });
  return sum;
}

// Values 0, 2, … and 1, 3, … of 32 that lie side by side, of which the first 2 · pairs are there.
struct Pairs {
  __m512 even, odd;

  Pairs(const float* from, int64_t pairs) {
    const __m512 low = load16(from, first(2 * pairs)), high = load16(from + LANES, first(std::max<int64_t>(0, 2 * pairs - LANES)));
    const __m512i evens = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    even = _mm512_permutex2var_ps(low, evens, high);
    odd = _mm512_permutex2var_ps(low, _mm512_add_epi32(evens, _mm512_set1_epi32(1)), high);
  }
};

// x (B, T, N, D) · cosine + (its neighbours (a, b) along D as (−b, a)) · sine; the tables are float32 (T, D) → the same as x.
Tensor rotary(const Tensor& x, const Tensor& cosine, const Tensor& sine) {
  TORCH_CHECK(x.scalar_type() == at::kBFloat16 && x.dim() == 4 && x.is_contiguous(), "x is bfloat16 (B, T, N, D), contiguous");
  const int64_t tokens = x.size(1), heads = x.size(2), width = x.size(3), pairs = width / 2;
  TORCH_CHECK(width % 2 == 0, "the width is even, got ", width);
  for (const Tensor* table : {&cosine, &sine}) {
    TORCH_CHECK(
        table->scalar_type() == at::kFloat && table->is_contiguous() && table->dim() == 2 && table->size(0) == tokens &&
            table->size(1) == width,
        "cosine and sine are float32 (T, D) of x ", x.sizes(), ", got ", table->sizes());
  }
  Tensor y = at::empty(x.sizes(), x.options());
  const auto* from = reinterpret_cast<const uint32_t*>(x.const_data_ptr<Half>());  // a pair of neighbours
  auto* to = reinterpret_cast<uint32_t*>(y.data_ptr<Half>());
  const float *cosines = cosine.const_data_ptr<float>(), *sines = sine.const_data_ptr<float>();
  const int64_t grain = std::max<int64_t>(1, 8192 / std::max<int64_t>(heads * pairs, 1));
  at::parallel_for(0, x.size(0) * tokens, grain, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      for_lanes(pairs, [&](int64_t p, __mmask16 mask) {
        const Pairs cos(cosines + m % tokens * width + 2 * p, pairs - p), sin(sines + m % tokens * width + 2 * p, pairs - p);
        for (int64_t n = 0; n < heads; ++n) {
          const int64_t at = (m * heads + n) * pairs + p;
          const __m512i both = _mm512_maskz_loadu_epi32(mask, from + at);
          const __m512 a = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
          const __m512 b = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(int(0xFFFF0000u))));
          alignas(32) Half low[LANES], high[LANES];
          store16(low, 0xFFFF, _mm512_fnmadd_ps(b, sin.even, _mm512_mul_ps(a, cos.even)));
          store16(high, 0xFFFF, _mm512_fmadd_ps(a, sin.odd, _mm512_mul_ps(b, cos.odd)));
          const __m512i lower = _mm512_cvtepu16_epi32(_mm256_load_si256(reinterpret_cast<const __m256i*>(low)));
          const __m512i upper = _mm512_cvtepu16_epi32(_mm256_load_si256(reinterpret_cast<const __m256i*>(high)));
          _mm512_mask_storeu_epi32(to + at, mask, _mm512_or_si512(lower, _mm512_slli_epi32(upper, 16)));
        }
      });
    }
  });
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ditbench_vnni, library) {
  library.def("normed(Tensor x, Tensor? factor, Tensor? shift, float eps, bool centred) -> Tensor");
  library.def(
      "normed_rows(Tensor x, Tensor? factor, Tensor? shift, float eps, bool centred, Tensor? given_scale, Tensor? given_zero_point,"
      " int groups, int sum_groups, int quant_max, bool symmetric, float clip) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def("rotary(Tensor x, Tensor cosine, Tensor sine) -> Tensor");
  library.def("gated(Tensor x, Tensor gate, Tensor y) -> Tensor");
}

TORCH_LIBRARY_IMPL(ditbench_vnni, CPU, library) {
  library.impl("normed", normed);
  library.impl("normed_rows", normed_rows);
  library.impl("gated", gated);
  library.impl("rotary", rotary);
}

}  // namespace ditbench
