// x · diag(signs) · blockdiag(L ⊗ R): what rotations do to rows (Hadamard, Kronecker products, one small matrix for all blocks). A block of
// a · b channels is a matrix X (a, b) that becomes Lᵀ · (X · R). A row is worked on while it is in the first-level cache, and may become codes
// there. Sums are float32, in one order whatever the number of rows.

#include "rounding.h"

#include <torch/library.h>

namespace ditbench {
namespace {

// c (ROWS, VECTORS · 16) = the sum over k of a(row, k) · b(k, :); strides in floats. The last vector is stored under a mask.
template <int ROWS, int VECTORS>
inline void tile(
    const float* a, int64_t a_row, int64_t a_depth, const float* b, int64_t b_depth, int64_t depth, float* c, int64_t c_row,
    __mmask16 last) {
  __m512 sums[ROWS][VECTORS];
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < VECTORS; ++v) sums[r][v] = _mm512_setzero_ps();
  for (int64_t k = 0; k < depth; ++k) {
    __m512 along[VECTORS];
    for (int v = 0; v < VECTORS; ++v) along[v] = _mm512_loadu_ps(b + k * b_depth + v * LANES);
    for (int r = 0; r < ROWS; ++r) {
      const __m512 factor = _mm512_set1_ps(a[r * a_row + k * a_depth]);
      for (int v = 0; v < VECTORS; ++v) sums[r][v] = _mm512_fmadd_ps(factor, along[v], sums[r][v]);
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < VECTORS; ++v) store16(c + r * c_row + v * LANES, v + 1 < VECTORS ? __mmask16(0xFFFF) : last, sums[r][v]);
}

template <int VECTORS>
void strip(
    const float* a, int64_t a_row, int64_t a_depth, const float* b, int64_t b_depth, int64_t depth, float* c, int64_t c_row,
    int64_t rows, __mmask16 last) {
  constexpr int ROWS = VECTORS == 1 ? 8 : 4;
  int64_t r = 0;
  for (; r + ROWS <= rows; r += ROWS) tile<ROWS, VECTORS>(a + r * a_row, a_row, a_depth, b, b_depth, depth, c + r * c_row, c_row, last);
  for (; r < rows; ++r) tile<1, VECTORS>(a + r * a_row, a_row, a_depth, b, b_depth, depth, c + r * c_row, c_row, last);
}

// c (rows, columns) = a · b; rows of b have whole vectors.
void multiply(
    const float* a, int64_t a_row, int64_t a_depth, const float* b, int64_t b_depth, int64_t depth, float* c, int64_t c_row,
    int64_t rows, int64_t columns) {
  for (int64_t j = 0; j < columns; j += 4 * LANES) {
    const int64_t left = std::min(columns - j, 4 * LANES);
    const __mmask16 last = first(left - (ceil_div(left, LANES) - 1) * LANES);
    auto* run = left > 3 * LANES ? strip<4> : left > 2 * LANES ? strip<3> : left > LANES ? strip<2> : strip<1>;
    run(a, a_row, a_depth, b + j, b_depth, depth, c + j, c_row, rows, last);
  }
}

class Rotation {
 public:
  // signs (C) int8 or none; left (a, a) and right (b, b) float32, a · b divides the channels.
  Rotation(int64_t channels, const std::optional<Tensor>& signs, const Tensor& left, const Tensor& right)
      : channels_(channels), a_(left.size(0)), b_(right.size(0)), padded_(ceil_div(b_, LANES) * LANES),
        left_(left.const_data_ptr<float>()), right_(b_ * padded_, 0.0f) {
    TORCH_CHECK(left.is_contiguous() && left.dim() == 2 && left.size(1) == a_, "left is (a, a) and contiguous");
    TORCH_CHECK(right.is_contiguous() && right.dim() == 2 && right.size(1) == b_, "right is (b, b) and contiguous");
    TORCH_CHECK(channels % (a_ * b_) == 0, "blocks of ", a_ * b_, " do not fit ", channels, " channels");
    const float* from = right.const_data_ptr<float>();
    for (int64_t k = 0; k < b_; ++k) std::copy(from + k * b_, from + (k + 1) * b_, right_.data() + k * padded_);
    if (!signs) return;
    TORCH_CHECK(signs->is_contiguous() && signs->numel() == channels, "signs are (C) and contiguous");
    const int8_t* sign = signs->const_data_ptr<int8_t>();
    signs_.assign(sign, sign + channels);
  }

  // Floats that `operator()` needs to work in.
  int64_t scratch() const { return channels_ + (a_ > 1 ? channels_ / b_ * padded_ : 0) + LANES; }

  template <typename T>
  void operator()(const T* x, float* y, float* scratch) const {
    for_lanes(channels_, [&](int64_t c, __mmask16 mask) {
      const __m512 values = load16(x + c, mask);
      store16(scratch + c, mask, signs_.empty() ? values : _mm512_mul_ps(values, load16(signs_.data() + c, mask)));
    });
    const int64_t rows = channels_ / b_;
    if (a_ == 1) {
      multiply(scratch, b_, 1, right_.data(), padded_, b_, y, b_, rows, b_);
      return;
    }
    float* half = scratch + channels_;  // X · R of all blocks
    multiply(scratch, b_, 1, right_.data(), padded_, b_, half, padded_, rows, padded_);
    for (int64_t row = 0; row < rows; row += a_) multiply(left_, 1, a_, half + row * padded_, padded_, a_, y + row * b_, b_, a_, b_);
  }

 private:
  int64_t channels_, a_, b_, padded_;
  const float* left_;
  std::vector<float> right_, signs_;
};

// each(m, scratch) for every row; scratch: floats to work in, one piece a thread.
template <typename F>
void for_rows(int64_t rows, int64_t channels, int64_t floats, F&& each) {
  at::parallel_for(0, rows, std::max<int64_t>(1, 16384 / std::max<int64_t>(channels, 1)), [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(floats);
    for (int64_t m = begin; m < end; ++m) each(m, scratch.data());
  });
}

template <typename F>
void with_values(const Tensor& x, F&& run) {
  TORCH_CHECK(x.dim() == 2 && x.is_contiguous(), "x is (M, C) and contiguous, got ", x.sizes());
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16, "x is float32 or bfloat16");
  x.scalar_type() == at::kFloat ? run(x.const_data_ptr<float>()) : run(x.const_data_ptr<at::BFloat16>());
}

// x (M, C) → float32 (M, C).
Tensor rotated(const Tensor& x, const std::optional<Tensor>& signs, const Tensor& left, const Tensor& right) {
  const int64_t rows = x.size(0), channels = x.size(1);
  const Rotation rotation(channels, signs, left, right);
  Tensor y = at::empty(x.sizes(), x.options().dtype(at::kFloat));
  float* to = y.data_ptr<float>();
  with_values(x, [&](auto* from) {
    for_rows(rows, channels, rotation.scratch(), [&](int64_t m, float* scratch) { rotation(from + m * channels, to + m * channels, scratch); });
  });
  return y;
}

// The same, or nothing of it (0, C) if it is not kept, and what `quantize_rows` makes of it.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rotated_rows(
    const Tensor& x, const std::optional<Tensor>& signs, const Tensor& left, const Tensor& right, bool keep,
    const std::optional<Tensor>& given_scale, const std::optional<Tensor>& given_zero_point, int64_t groups, int64_t sum_groups,
    int64_t quant_max, bool symmetric, double clip) {
  const int64_t rows = x.size(0), channels = x.size(1);
  const Rotation rotation(channels, signs, left, right);
  CodedRows coded(x, rows, channels, given_scale, given_zero_point, groups, sum_groups, {quant_max, symmetric, clip});
  Tensor y = at::empty({keep ? rows : 0, channels}, x.options().dtype(at::kFloat));
  float* to = y.data_ptr<float>();
  with_values(x, [&](auto* from) {
    for_rows(rows, channels, rotation.scratch() + (keep ? 0 : channels), [&](int64_t m, float* scratch) {
      float* row = keep ? to + m * channels : scratch + rotation.scratch();
      rotation(from + m * channels, row, scratch);
      coded.set(m, row);
    });
  });
  return std::tuple_cat(std::make_tuple(y), coded.tensors());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ditbench_vnni, library) {
  library.def("rotated(Tensor x, Tensor? signs, Tensor left, Tensor right) -> Tensor");
  library.def(
      "rotated_rows(Tensor x, Tensor? signs, Tensor left, Tensor right, bool keep, Tensor? given_scale, Tensor? given_zero_point,"
      " int groups, int sum_groups, int quant_max, bool symmetric, float clip) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(ditbench_vnni, CPU, library) {
  library.impl("rotated", rotated);
  library.impl("rotated_rows", rotated_rows);
}

}  // namespace ditbench
