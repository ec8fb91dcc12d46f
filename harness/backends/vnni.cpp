// Integer linear layers for CPUs with AVX512-VNNI: int8 arithmetic on weights stored in 8 or 4 bits.
//
// With activation codes u (unsigned, zero point o) and weight codes w (signed, zero point v), per group g of input channels:
//
//     y = Σ_g s_x s_w [ Σ u w  −  o Σ w  −  v ( Σ u − o n ) ] + b
//
// The bracket is exact in int32. Scales are applied one after the other, the weight's first, and nothing is fused: the same
// bits as the simulated path, which matters, since one code that rounds the other way changes a 4-bit image visibly. One group spans all channels when neither side is quantized per group.
//
// Weights are stored in panels of 16 outputs × 4 channels, what one vpdpbusd takes; 4-bit codes two panels to 64 bytes
// (low nibbles first). A panel strip is unpacked once into a buffer that fits the second-level cache, then used for all rows.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <immintrin.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

namespace {

using at::Tensor;

constexpr int64_t LANES = 16;       // outputs of a panel: the 32-bit lanes of a register
constexpr int64_t DEPTH = 4;        // channels that one instruction sums
constexpr int64_t PANEL = LANES * DEPTH;
constexpr int64_t STRIP = 4;        // panels that are multiplied together
constexpr int64_t ROWS = 6;         // rows that are multiplied together: 6 × 4 sums stay in registers
constexpr int64_t ROWS_PER_TASK = 516;
constexpr int MIDDLE = 128;         // between signed and unsigned codes

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- activations -------------------------------------------------------------------------------------------------

__m512 load16(const float* p, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, p); }

__m512 load16(const at::BFloat16* p, __mmask16 mask) {
  const __m256i half = _mm256_maskz_loadu_epi16(mask, p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

__mmask16 first(int64_t count) { return count >= LANES ? 0xFFFF : static_cast<__mmask16>((1u << count) - 1); }

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

// ---- weights -----------------------------------------------------------------------------------------------------

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

// ---- product -----------------------------------------------------------------------------------------------------

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

void store16(float* p, __mmask16 mask, __m512 values) { _mm512_mask_storeu_ps(p, mask, values); }

void store16(at::BFloat16* p, __mmask16 mask, __m512 values) {  // to nearest, ties to even; NaN stays NaN
  const __m512i bits = _mm512_castps_si512(values);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7FC0));
  _mm256_mask_storeu_epi16(p, mask, _mm512_cvtepi32_epi16(rounded));
}

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

template <typename T>
void linear_rows(
    const Activations& x, const Weight& w, const float* bias, const int8_t* strip, int64_t strip_stride, int64_t panel,
    int64_t panels, int64_t row, int64_t rows, T* y) {
  const int64_t groups = std::max(x.groups, w.groups), width = w.channels / groups;
  const int64_t padded = ceil_div(w.outputs, LANES) * LANES;
  __m512i sums[ROWS][STRIP];
  __m512 total[ROWS][STRIP];
  for (int64_t p = 0; p < panels; ++p) {
    for (int64_t r = 0; r < rows; ++r) total[r][p] = _mm512_setzero_ps();
  }
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t quads = ceil_div(width, DEPTH), x_group = x.groups == 1 ? 0 : g, w_group = w.groups == 1 ? 0 : g;
    of_rows[rows - 1][panels - 1](
        x.codes + row * x.stride + g * width, x.stride, strip + g * width / DEPTH * PANEL, strip_stride, quads, sums);
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t out = (panel + p) * LANES;
      const __m512i weight_sum = _mm512_loadu_si512(w.sum_GO + g * padded + out);
      const __m512 weight_scale = _mm512_loadu_ps(w.scale_GO + w_group * padded + out);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t at = (row + r) * x.groups + x_group;
        const int32_t offset = x.offset[at];
        __m512i whole = _mm512_sub_epi32(sums[r][p], _mm512_mullo_epi32(weight_sum, _mm512_set1_epi32(offset)));
        if (w.zero_point_GO) {
          const int32_t centred = x.sum[(row + r) * groups + g] - offset * int32_t(width);
          const __m512i zero = _mm512_loadu_si512(w.zero_point_GO + w_group * padded + out);
          whole = _mm512_sub_epi32(whole, _mm512_mullo_epi32(zero, _mm512_set1_epi32(centred)));
        }
        const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(whole), weight_scale);
        total[r][p] = _mm512_add_ps(total[r][p], _mm512_mul_ps(scaled, _mm512_set1_ps(x.scale[at])));
      }
    }
  }
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t out = (panel + p) * LANES;
    const __mmask16 mask = first(w.outputs - out);
    const __m512 biases = bias ? load16(bias + out, mask) : _mm512_setzero_ps();
    for (int64_t r = 0; r < rows; ++r)
      store16(y + (row + r) * w.outputs + out, mask, bias ? _mm512_add_ps(total[r][p], biases) : total[r][p]);
  }
}

template <typename T>
void linear_all(const Activations& x, const Weight& w, const float* bias, T* y) {
  const int64_t pairs = ceil_div(w.channels, 2 * DEPTH), panels = ceil_div(w.outputs, LANES);
  const int64_t strips = ceil_div(panels, STRIP), chunks = ceil_div(x.rows, ROWS_PER_TASK);
  const int64_t strip_stride = pairs * 2 * PANEL;
  at::parallel_for(0, strips * chunks, 1, [&](int64_t begin, int64_t end) {
    std::vector<int8_t> buffer(w.bits == 4 ? STRIP * strip_stride : 0);
    int64_t unpacked = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t panel = task / chunks * STRIP, here = std::min(STRIP, panels - panel);
      const uint8_t* stored = w.packed + panel * pairs * (w.bits == 8 ? 2 * PANEL : PANEL);
      const int8_t* strip = reinterpret_cast<const int8_t*>(stored);
      if (w.bits == 4) {
        if (unpacked != panel) unpack_strip(stored, here * pairs, w.is_signed, buffer.data());
        unpacked = panel;
        strip = buffer.data();
      }
      const int64_t start = task % chunks * ROWS_PER_TASK, stop = std::min(x.rows, start + ROWS_PER_TASK);
      for (int64_t row = start; row < stop; row += ROWS)
        linear_rows(x, w, bias, strip, strip_stride, panel, here, row, std::min(ROWS, stop - row), y);
    }
  });
}

// → y (M, outputs) in float32 or bfloat16. Tables of the weight are (groups, outputs padded to 16), bias float32 (outputs).
// sum: of the codes, per group of the side that has more of them.
Tensor linear(
    const Tensor& codes, const Tensor& scale, const Tensor& offset, const Tensor& sum, const Tensor& packed, int64_t bits,
    bool is_signed, int64_t outputs, int64_t channels, const Tensor& weight_scale, const Tensor& weight_sum,
    const std::optional<Tensor>& weight_zero_point, const std::optional<Tensor>& bias, at::ScalarType dtype) {
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
  TORCH_CHECK(!bias || bias->scalar_type() == at::kFloat, "the bias is float32");
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kBFloat16, "y is float32 or bfloat16");
  const float* bias_at = bias ? bias->const_data_ptr<float>() : nullptr;
  Tensor y = at::empty({x.rows, outputs}, scale.options().dtype(dtype));
  if (dtype == at::kFloat) {
    linear_all(x, w, bias_at, y.data_ptr<float>());
  } else {
    linear_all(x, w, bias_at, y.data_ptr<at::BFloat16>());
  }
  return y;
}

// ---- weights alone -----------------------------------------------------------------------------------------------

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

TORCH_LIBRARY(ditbench_vnni, library) {
  library.def(
      "quantize_rows(Tensor x, Tensor? scale, Tensor? zero_point, int groups, int sum_groups,"
      " int quant_max, bool symmetric, float clip)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
  library.def("pack_weight(Tensor codes, int bits) -> Tensor");
  library.def(
      "linear(Tensor codes, Tensor scale, Tensor offset, Tensor sum, Tensor packed, int bits, bool is_signed, int outputs,"
      " int channels, Tensor weight_scale, Tensor weight_sum, Tensor? weight_zero_point, Tensor? bias, ScalarType dtype)"
      " -> Tensor");
  library.def(
      "dequantize(Tensor packed, int bits, bool is_signed, Tensor scale, Tensor? zero_point, ScalarType dtype) -> Tensor");
}

TORCH_LIBRARY_IMPL(ditbench_vnni, CPU, library) {
  library.impl("quantize_rows", quantize_rows);
  library.impl("pack_weight", pack_weight);
  library.impl("linear", linear);
  library.impl("dequantize", dequantize);
}
