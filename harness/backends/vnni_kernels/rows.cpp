// Rows of activations become codes: measured, scaled and rounded in one pass.

#include "rounding.h"

#include <torch/library.h>

namespace ditbench {
namespace {

// x (M, C) → what `CodedRows` says.
std::tuple<Tensor, Tensor, Tensor, Tensor> quantize_rows(
    const Tensor& x, const std::optional<Tensor>& given_scale, const std::optional<Tensor>& given_zero_point,
    int64_t groups, int64_t sum_groups, int64_t quant_max, bool symmetric, double clip) {
  TORCH_CHECK(x.dim() == 2 && x.is_contiguous(), "x is (M, C) and contiguous, got ", x.sizes());
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16, "x is float32 or bfloat16");
  const int64_t rows = x.size(0), channels = x.size(1);
  CodedRows coded(x, rows, channels, given_scale, given_zero_point, groups, sum_groups, {quant_max, symmetric, clip});
  auto run = [&](auto* values) {
    at::parallel_for(0, rows, std::max<int64_t>(1, 16384 / std::max<int64_t>(channels, 1)), [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) coded.set(m, values + m * channels);
    });
  };
  if (x.scalar_type() == at::kFloat) {
    run(x.const_data_ptr<float>());
  } else {
    run(x.const_data_ptr<at::BFloat16>());
  }
  return coded.tensors();
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
