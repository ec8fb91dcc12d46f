// Integer linear layers for CPUs with AVX512-VNNI: int8 arithmetic on weights stored in 8 or 4 bits.
//
// With activation codes u (unsigned, zero point o) and weight codes w (signed, zero point v), per group g of input channels:
//
//     y = Σ_g s_x s_w [ Σ u w  −  o Σ w  −  v ( Σ u − o n ) ] + b
//
// and then an activation, if one is asked for. The bracket is exact in int32. Scales are applied one after the other, the
// weight's first, and nothing is fused: the same bits as the simulated path, which matters, since one code that rounds the
// other way changes a 4-bit image visibly. One group spans all channels when neither side is quantized per group.
//
// Weights are stored in panels of 16 outputs × 4 channels, what one vpdpbusd takes; 4-bit codes two panels to 64 bytes
// (low nibbles first). A panel strip is unpacked once into a buffer that fits the second-level cache, then used for all rows.

#include "functions.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

namespace ditbench {
namespace {

constexpr int64_t STRIP = 4;        // panels that are multiplied together
constexpr int64_t ROWS = 6;         // rows that are multiplied together: 6 × 4 sums stay in registers
constexpr int64_t ROWS_PER_TASK = 516;

// codes (O, C) int8, any order → panels (⌈O/16⌉, ⌈C/8⌉, 128 or 64 bytes); 4-bit codes lie in −8 … 15 and keep their low nibble.
Tensor pack_weight(const Tensor& codes, int64_t bits) {
  TORCH_CHECK(codes.dim() == 2 && codes.is_contiguous() && codes.scalar_type() == at::kChar, "codes are int8 (O, C)");
  TORCH_CHECK(bits == 8 || bits == 4, "weights are stored in 8 or 4 bits, got ", bits);
  const int64_t outputs = codes.size(0), channels = codes.size(1);
  const int64_t panels = ceil_div(outputs, LANES), pairs = ceil_div(channels, 2 * DEPTH);
  const int64_t bytes = bits == 8 ? 2 * PANEL : PANEL;
  Tensor packed = at::zeros({panels, pairs, bytes}, codes.options().dtype(at::kByte));
  const int8_t* from = codes.const_data_ptr<int8_t>();
  uint8_t* to = packed.data_ptr<uint8_t>();
  for (int64_t o = 0; o < outputs; ++o) {
    for (int64_t c = 0; c < channels; ++c) {
      const uint8_t code = static_cast<uint8_t>(from[o * channels + c]);
      const int64_t half = c / DEPTH % 2, place = o % LANES * DEPTH + c % DEPTH;
      uint8_t* pair = to + ((o / LANES) * pairs + c / (2 * DEPTH)) * bytes;
      if (bits == 8) {
        pair[half * PANEL + place] = code;
      } else {
        pair[place] |= (code & 15) << (4 * half);
      }
    }
  }
  return packed;
}

// 4-bit codes of a strip → int8, sign-extended or not.
void unpack_strip(const uint8_t* packed, int64_t count, bool is_signed, int8_t* to) {
  const __m512i nibble = _mm512_set1_epi8(15), eight = _mm512_set1_epi8(is_signed ? 8 : 0);
  for (int64_t i = 0; i < count; ++i) {
    const __m512i both = _mm512_loadu_si512(packed + i * PANEL);
    const __m512i low = _mm512_and_si512(both, nibble);
    const __m512i high = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
    _mm512_storeu_si512(to + 2 * i * PANEL, _mm512_sub_epi8(_mm512_xor_si512(low, eight), eight));
    _mm512_storeu_si512(to + (2 * i + 1) * PANEL, _mm512_sub_epi8(_mm512_xor_si512(high, eight), eight));
  }
}

// sums[r][p] = Σ over `quads` quads of channels; a: rows `stride` apart, b: panels `panel_stride` apart.
template <int R, int P>
void multiply(const uint8_t* a, int64_t stride, const int8_t* b, int64_t panel_stride, int64_t quads, __m512i (*out)[STRIP]) {
  __m512i sums[R][P];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) sums[r][p] = _mm512_setzero_si512();
  for (int64_t k = 0; k < quads; ++k) {
    __m512i weights[P];
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      weights[p] = _mm512_loadu_si512(b + p * panel_stride + k * PANEL);
      asm("" : "+v"(weights[p]));  // or the compiler reads it from memory again for every row
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      int32_t four;
      std::memcpy(&four, a + r * stride + k * DEPTH, sizeof four);
      const __m512i activations = _mm512_set1_epi32(four);
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) sums[r][p] = _mm512_dpbusd_epi32(sums[r][p], activations, weights[p]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) out[r][p] = sums[r][p];
}

using Multiply = void (*)(const uint8_t*, int64_t, const int8_t*, int64_t, int64_t, __m512i (*)[STRIP]);

template <int R>
constexpr Multiply of_panels[STRIP] = {multiply<R, 1>, multiply<R, 2>, multiply<R, 3>, multiply<R, 4>};
constexpr const Multiply* of_rows[ROWS] = {of_panels<1>, of_panels<2>, of_panels<3>, of_panels<4>, of_panels<5>, of_panels<6>};

struct Weight {
  const uint8_t* packed;
  int64_t bits, outputs, channels, groups;
  bool is_signed;               // 4-bit codes: −8 … 7 or 0 … 15
  const float* scale_GO;        // padded to whole panels, as the next two
  const int32_t* sum_GO;
  const int32_t* zero_point_GO; // or null
};

struct Activations {
  const uint8_t* codes;
  int64_t rows, stride, groups;
  const float* scale;
  const int32_t *offset, *sum;
};

// What is added to the product before the bias, such as a low-rank branch: (M, outputs) in float32 or bfloat16, or nothing.
struct Addend {
  const float* floats = nullptr;
  const at::BFloat16* halves = nullptr;

  explicit Addend(const std::optional<Tensor>& of) {
    if (!of) return;
    if (of->scalar_type() == at::kFloat) floats = of->const_data_ptr<float>();
    else halves = of->const_data_ptr<at::BFloat16>();
  }

  bool is_there() const { return floats || halves; }

  __m512 added_to(__m512 sum, int64_t at, __mmask16 mask) const {
    if (floats) return _mm512_add_ps(sum, load16(floats + at, mask));
    return halves ? _mm512_add_ps(sum, load16(halves + at, mask)) : sum;
  }
};

// (Σ u w − o Σ w − v (Σ u − o n)) · s_w · s_x of one row and panel, in one group.
__m512 scaled(
    __m512i sum, __m512i weight_sum, __m512 weight_scale, const __m512i* zero, int32_t offset, int32_t code_sum, int64_t width,
    float scale) {
  __m512i whole = _mm512_sub_epi32(sum, _mm512_mullo_epi32(weight_sum, _mm512_set1_epi32(offset)));
  if (zero) {
    const int32_t centred = code_sum - offset * int32_t(width);
    whole = _mm512_sub_epi32(whole, _mm512_mullo_epi32(*zero, _mm512_set1_epi32(centred)));
  }
  return _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(whole), weight_scale), _mm512_set1_ps(scale));
}

// The end of a tile where there is one group, no zero point of the weight and nothing to add but a bias: as `linear_rows` does it, without what
// it asks for every 16 values, which was a tenth of a product of a thousand channels.
template <Activation activation, typename T>
void finish_plain(
    const Activations& x, const Weight& w, const float* bias, const __m512i (*sums)[STRIP], int64_t panel, int64_t panels, int64_t row,
    int64_t rows, T* y) {
  const float* scales = x.scale + row;
  const int32_t* offsets = x.offset + row;
  const int64_t outputs = w.outputs;
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t out = (panel + p) * LANES;
    const __mmask16 mask = first(outputs - out);
    const __m512i weight_sum = _mm512_loadu_si512(w.sum_GO + out);
    const __m512 weight_scale = _mm512_loadu_ps(w.scale_GO + out);
    const auto finish = [&](auto has_bias) {
      const __m512 biases = has_bias ? load16(bias + out, mask) : _mm512_setzero_ps();
      for (int64_t r = 0; r < rows; ++r) {
        __m512 sum = scaled(sums[r][p], weight_sum, weight_scale, nullptr, offsets[r], 0, 0, scales[r]);
        if (has_bias) sum = _mm512_add_ps(sum, biases);
        store16(y + (row + r) * outputs + out, mask, activated<activation>(sum));
      }
    };
    bias ? finish(std::true_type()) : finish(std::false_type());
  }
}

template <Activation activation, typename T>
void linear_rows(
    const Activations& x, const Weight& w, const Addend& addend, const float* bias, const int8_t* strip, int64_t strip_stride,
    int64_t panel, int64_t panels, int64_t row, int64_t rows, T* y) {
  const int64_t groups = std::max(x.groups, w.groups), width = w.channels / groups, quads = ceil_div(width, DEPTH);
  const int64_t padded = ceil_div(w.outputs, LANES) * LANES;
  __m512i sums[ROWS][STRIP];
  __m512 total[ROWS][STRIP];
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t x_group = x.groups == 1 ? 0 : g, w_group = w.groups == 1 ? 0 : g;
    const bool is_first = g == 0, is_last = g == groups - 1;
    of_rows[rows - 1][panels - 1](
        x.codes + row * x.stride + g * width, x.stride, strip + g * width / DEPTH * PANEL, strip_stride, quads, sums);
    if (groups == 1 && !w.zero_point_GO && !addend.is_there()) return finish_plain<activation>(x, w, bias, sums, panel, panels, row, rows, y);
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t out = (panel + p) * LANES;
      const __mmask16 mask = first(w.outputs - out);
      const __m512i weight_sum = _mm512_loadu_si512(w.sum_GO + g * padded + out);
      const __m512 weight_scale = _mm512_loadu_ps(w.scale_GO + w_group * padded + out);
      const __m512 biases = bias ? load16(bias + out, mask) : _mm512_setzero_ps();
      __m512i zero = _mm512_setzero_si512();
      if (w.zero_point_GO) zero = _mm512_loadu_si512(w.zero_point_GO + w_group * padded + out);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t at = (row + r) * x.groups + x_group;
        __m512 sum = scaled(
            sums[r][p], weight_sum, weight_scale, w.zero_point_GO ? &zero : nullptr, x.offset[at], x.sum[(row + r) * groups + g],
            width, x.scale[at]);
        if (!is_first) sum = _mm512_add_ps(total[r][p], sum);
        if (is_last) {
          sum = addend.added_to(sum, (row + r) * w.outputs + out, mask);
          if (bias) sum = _mm512_add_ps(sum, biases);
          store16(y + (row + r) * w.outputs + out, mask, activated<activation>(sum));
        } else {
          total[r][p] = sum;
        }
      }
    }
  }
}

// Brings bytes that are wanted soon into the second-level cache, a share with every call.
class Ahead {
 public:
  Ahead(const uint8_t* from, int64_t bytes, int64_t calls) : at_(from), end_(from + bytes), share_(ceil_div(bytes, calls)) {}

  void fetch() {
    const uint8_t* stop = std::min(end_, at_ + share_);
    for (; at_ < stop; at_ += LINE) _mm_prefetch(reinterpret_cast<const char*>(at_), _MM_HINT_T1);
  }

 private:
  static constexpr int64_t LINE = 64;
  const uint8_t *at_, *end_;
  int64_t share_;
};

template <Activation activation, typename T>
void linear_all(const Activations& x, const Weight& w, const Addend& addend, const float* bias, T* y) {
  const int64_t pairs = ceil_div(w.channels, 2 * DEPTH), panels = ceil_div(w.outputs, LANES);
  const int64_t strips = ceil_div(panels, STRIP), chunks = ceil_div(x.rows, ROWS_PER_TASK);
  const int64_t strip_stride = pairs * 2 * PANEL, panel_bytes = pairs * (w.bits == 8 ? 2 * PANEL : PANEL);
  at::parallel_for(0, strips * chunks, 1, [&](int64_t begin, int64_t end) {
    std::vector<int8_t> buffer(w.bits == 4 ? STRIP * strip_stride : 0);
    int64_t unpacked = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t panel = task % strips * STRIP, here = std::min(STRIP, panels - panel);
      const uint8_t* stored = w.packed + panel * panel_bytes;
      const int8_t* strip = reinterpret_cast<const int8_t*>(stored);
      if (w.bits == 4) {
        if (unpacked != panel) unpack_strip(stored, here * pairs, w.is_signed, buffer.data());
        unpacked = panel;
        strip = buffer.data();
      }
      const int64_t start = task / strips * ROWS_PER_TASK, stop = std::min(x.rows, start + ROWS_PER_TASK);
      const int64_t next_bytes = std::min(STRIP, panels - panel - here) * panel_bytes;
      Ahead ahead(stored + here * panel_bytes, next_bytes, ceil_div(stop - start, ROWS));
      for (int64_t row = start; row < stop; row += ROWS) {
        ahead.fetch();
        linear_rows<activation>(x, w, addend, bias, strip, strip_stride, panel, here, row, std::min(ROWS, stop - row), y);
      }
    }
  });
}

// → activation(product + addend + bias) (M, outputs) in float32 or bfloat16. Tables of the weight are (groups, outputs padded to 16), bias float32 (outputs).
// sum: of the codes, per group of the side that has more of them.
Tensor linear(
    const Tensor& codes, const Tensor& scale, const Tensor& offset, const Tensor& sum, const Tensor& packed, int64_t bits,
    bool is_signed, int64_t outputs, int64_t channels, const Tensor& weight_scale, const Tensor& weight_sum,
    const std::optional<Tensor>& weight_zero_point, const std::optional<Tensor>& addend, const std::optional<Tensor>& bias,
    int64_t activation, at::ScalarType dtype) {
  const Activations x{
      codes.const_data_ptr<uint8_t>(), codes.size(0), codes.size(1), scale.size(1), scale.const_data_ptr<float>(),
      offset.const_data_ptr<int32_t>(), sum.const_data_ptr<int32_t>()};
  const Weight w{
      packed.const_data_ptr<uint8_t>(), bits, outputs, channels, weight_scale.size(0), is_signed,
      weight_scale.const_data_ptr<float>(), weight_sum.const_data_ptr<int32_t>(),
      weight_zero_point ? weight_zero_point->const_data_ptr<int32_t>() : nullptr};
  const int64_t groups = std::max(x.groups, w.groups);
  TORCH_CHECK(channels % groups == 0, groups, " groups do not divide ", channels, " channels");
  TORCH_CHECK(groups == 1 || channels / groups % DEPTH == 0, "groups hold a multiple of 4 channels");
  TORCH_CHECK((x.groups == groups || x.groups == 1) && (w.groups == groups || w.groups == 1), "groups of both sides agree");
  TORCH_CHECK(weight_sum.size(0) == groups && sum.size(1) == groups, "sums are per group of either side");
  TORCH_CHECK(
      !addend || (addend->is_contiguous() && addend->numel() == codes.size(0) * outputs &&
                  (addend->scalar_type() == at::kFloat || addend->scalar_type() == at::kBFloat16)),
      "what is added is (M, outputs), contiguous, float32 or bfloat16");
  TORCH_CHECK(!bias || bias->scalar_type() == at::kFloat, "the bias is float32");
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kBFloat16, "y is float32 or bfloat16");
  TORCH_CHECK(activation >= 0 && activation <= int64_t(Activation::last), "no such activation: ", activation);
  const float* bias_at = bias ? bias->const_data_ptr<float>() : nullptr;
  Tensor y = at::empty({x.rows, outputs}, scale.options().dtype(dtype));
  with_activation(Activation(activation), [&](auto which) {
    if (dtype == at::kFloat) {
      linear_all<which.value>(x, w, Addend(addend), bias_at, y.data_ptr<float>());
    } else {
      linear_all<which.value>(x, w, Addend(addend), bias_at, y.data_ptr<at::BFloat16>());
    }
  });
  return y;
}

// x float32, contiguous, of any shape → the same of its values: what `linear` does at its end, alone.
Tensor activate(const Tensor& x, int64_t activation) {
  TORCH_CHECK(x.is_contiguous() && x.scalar_type() == at::kFloat, "x is float32 and contiguous");
  TORCH_CHECK(activation >= 0 && activation <= int64_t(Activation::last), "no such activation: ", activation);
  Tensor y = at::empty(x.sizes(), x.options());
  const float* from = x.const_data_ptr<float>();
  float* to = y.data_ptr<float>();
  with_activation(Activation(activation), [&](auto which) {
    at::parallel_for(0, ceil_div(x.numel(), LANES), 1024, [&](int64_t begin, int64_t end) {
      for (int64_t at = begin * LANES; at < std::min(end * LANES, x.numel()); at += LANES) {
        const __mmask16 mask = first(x.numel() - at);
        store16(to + at, mask, activated<which.value>(load16(from + at, mask)));
      }
    });
  });
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ditbench_vnni, library) {
  library.def("pack_weight(Tensor codes, int bits) -> Tensor");
  library.def(
      "linear(Tensor codes, Tensor scale, Tensor offset, Tensor sum, Tensor packed, int bits, bool is_signed, int outputs,"
      " int channels, Tensor weight_scale, Tensor weight_sum, Tensor? weight_zero_point, Tensor? addend, Tensor? bias,"
      " int activation, ScalarType dtype) -> Tensor");
  library.def("activate(Tensor x, int activation) -> Tensor");
}

TORCH_LIBRARY_IMPL(ditbench_vnni, CPU, library) {
  library.impl("pack_weight", pack_weight);
  library.impl("linear", linear);
  library.impl("activate", activate);
}

}  // namespace ditbench
