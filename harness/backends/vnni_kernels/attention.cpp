// softmax(q kᵀ · scale + mask) v for CPUs with AVX512-BF16: products in bfloat16 with float32 sums, softmax in float32.
//
// Keys and values are packed once per head: keys in panels of 16 keys × 2 channels, values in panels of 16 channels × 2 keys,
// what one vdpbf16ps takes. Blocks of keys stay in the first- or second-level cache while a task's queries go past them; a row's
// maximum and sum run along (Dao et al. 2022, arXiv:2205.14135, without the backward pass). Probabilities are rounded to
// bfloat16 before they meet the values, as torch's kernel does it. Any even head size, and any number of keys.

#include "functions.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <limits>

namespace ditbench {
namespace {

using Half = at::BFloat16;

constexpr int64_t PAIR = 2;             // what one instruction sums
constexpr int64_t CELL = LANES * PAIR;  // of a panel
constexpr int64_t ROWS = 4, PANELS = 5; // multiplied together: 20 sums stay in registers
constexpr int64_t KEYS = 128;           // of a block
constexpr int64_t QUERIES = 64;         // of a task
constexpr float NOTHING = -std::numeric_limits<float>::infinity();

struct Rows {  // (B, N, T, D) with channels side by side
  const Half* at;
  int64_t batch, head, row;
};

// sums[r][p] (+)= Σ over pairs; a: rows `a_row` apart; b: panels `b_panel` apart.
template <int R, int P>
void multiply(const Half* a, int64_t a_row, const Half* b, int64_t b_panel, int64_t pairs, float* out, int64_t out_row, bool add) {
  __m512 sums[R][P];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) sums[r][p] = add ? _mm512_loadu_ps(out + r * out_row + p * LANES) : _mm512_setzero_ps();
  for (int64_t k = 0; k < pairs; ++k) {
    __m512i right[P];
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      right[p] = _mm512_loadu_si512(b + p * b_panel + k * CELL);
      asm("" : "+v"(right[p]));  // or the compiler reads it from memory again for every row
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      int32_t two;
      std::memcpy(&two, a + r * a_row + k * PAIR, sizeof two);
      const __m512i left = _mm512_set1_epi32(two);
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) sums[r][p] = _mm512_dpbf16_ps(sums[r][p], (__m512bh)left, (__m512bh)right[p]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) _mm512_storeu_ps(out + r * out_row + p * LANES, sums[r][p]);
}

using Multiply = void (*)(const Half*, int64_t, const Half*, int64_t, int64_t, float*, int64_t, bool);

template <int R>
constexpr Multiply of_panels[PANELS] = {multiply<R, 1>, multiply<R, 2>, multiply<R, 3>, multiply<R, 4>, multiply<R, 5>};
constexpr const Multiply* of_rows[ROWS] = {of_panels<1>, of_panels<2>, of_panels<3>, of_panels<4>};

// `panels` panels in pieces of nearly one size: 5 at once, 8 as 4 and 4.
void multiply_panels(
    int64_t rows, int64_t panels, const Half* a, int64_t a_row, const Half* b, int64_t b_panel, int64_t pairs, float* out,
    int64_t out_row, bool add) {
  const int64_t pieces = ceil_div(panels, PANELS);
  for (int64_t piece = 0, p = 0; piece < pieces; ++piece) {
    const int64_t width = ceil_div(panels - p, pieces - piece);
    of_rows[rows - 1][width - 1](a, a_row, b + p * b_panel, b_panel, pairs, out + p * LANES, out_row, add);
    p += width;
  }
}

// Keys (T, D) → (⌈T/16⌉ panels, D/2, 16 keys, 2 channels); what is beyond the last key is zero.
void pack_keys(const Half* from, int64_t row, int64_t keys, int64_t width, Half* to) {
  for (int64_t panel = 0; panel < ceil_div(keys, LANES); ++panel) {
    const int64_t here = std::min(LANES, keys - panel * LANES);
    Half* cells = to + panel * LANES * width;
    if (here < LANES) std::memset(static_cast<void*>(cells), 0, LANES * width * sizeof(Half));
    for (int64_t t = 0; t < here; ++t) {
      const Half* key = from + (panel * LANES + t) * row;
      for (int64_t pair = 0; pair < width / PAIR; ++pair)
        std::memcpy(static_cast<void*>(cells + pair * CELL + t * PAIR), key + pair * PAIR, PAIR * sizeof(Half));
    }
  }
}

// Values (T, D) → (⌈D/16⌉ panels, ⌈T/2⌉ pairs, 16 channels, 2 keys); what is beyond the last one is zero.
void pack_values(const Half* from, int64_t row, int64_t keys, int64_t width, int64_t pairs, Half* to) {
  for (int64_t panel = 0; panel < ceil_div(width, LANES); ++panel) {
    const __mmask16 mask = first(width - panel * LANES);
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const Half* value = from + pair * PAIR * row + panel * LANES;
      const __m256i none = _mm256_setzero_si256();
      const __m256i even = pair * PAIR < keys ? _mm256_maskz_loadu_epi16(mask, value) : none;
      const __m256i odd = pair * PAIR + 1 < keys ? _mm256_maskz_loadu_epi16(mask, value + row) : none;
      const __m512i both =
          _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
      _mm512_storeu_si512(to + (panel * pairs + pair) * CELL, both);
    }
  }
}

// A mask times log₂ e; what is finite stays so: a row whose keys all have the lowest number has their mean, with −∞ it has nothing.
__m512 in_powers_of_two(__m512 mask) {
  const __m512 scaled = _mm512_mul_ps(mask, _mm512_set1_ps(LOG2_E));
  const __mmask16 finite = _mm512_cmp_ps_mask(mask, _mm512_set1_ps(NOTHING), _CMP_GT_OQ);
  return _mm512_mask_max_ps(scaled, finite, scaled, _mm512_set1_ps(std::numeric_limits<float>::lowest()));
}

// One row of scores against a block of keys → probabilities that are not yet divided by their sum, in bfloat16.
// Scores are counted in powers of two: `scale` has log₂ e in it, and so have `largest` and the mask once it is added.
// → the factor by which what was summed of earlier blocks has to shrink.
float softmax_block(float* scores, int64_t keys, float scale, const float* mask, float& largest, float& sum, Half* probabilities) {
  __m512 most = _mm512_set1_ps(NOTHING);
  const __m512 scales = _mm512_set1_ps(scale);
  for (int64_t k = 0; k < keys; k += LANES) {
    const __mmask16 here = first(keys - k);
    __m512 score = _mm512_mul_ps(_mm512_loadu_ps(scores + k), scales);
    if (mask) score = _mm512_add_ps(score, in_powers_of_two(_mm512_maskz_loadu_ps(here, mask + k)));
    score = _mm512_mask_mov_ps(_mm512_set1_ps(NOTHING), here, score);
    _mm512_storeu_ps(scores + k, score);
    most = _mm512_max_ps(most, score);
  }
  const float before = largest;
  largest = std::max(largest, _mm512_reduce_max_ps(most));
  const float base = largest == NOTHING ? 0.0f : largest;  // nothing is allowed so far
  const __m512 bases = _mm512_set1_ps(base);
  __m512 sums = _mm512_setzero_ps();
  for (int64_t k = 0; k < keys; k += LANES) {
    const __m512 p = power_of_two(_mm512_sub_ps(_mm512_loadu_ps(scores + k), bases));
    sums = _mm512_add_ps(sums, p);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(probabilities + k), (__m256i)_mm512_cvtneps_pbh(p));
  }
  const float shrink = std::exp2(before - base);
  sum = sum * shrink + _mm512_reduce_add_ps(sums);
  return shrink;
}

struct Problem {
  Rows q;
  const Half *keys, *values;  // packed, of all heads
  const float* mask;          // or null
  int64_t mask_batch, mask_head, mask_row;
  int64_t heads, queries, num_keys, width, key_panels, value_pairs;
  float scale;
  Half* out;  // (B, T, N, D)
};

// `rows` queries of one head, from `row` on.
void attend(const Problem& p, int64_t batch, int64_t head, int64_t row, int64_t rows, float* sums, int64_t padded) {
  const int64_t at = batch * p.heads + head, panels = padded / LANES;
  const Half* keys = p.keys + at * p.key_panels * LANES * p.width;
  const Half* values = p.values + at * panels * p.value_pairs * CELL;
  const Half* q = p.q.at + batch * p.q.batch + head * p.q.head + row * p.q.row;
  const float* mask = p.mask ? p.mask + batch * p.mask_batch + head * p.mask_head + row * p.mask_row : nullptr;
  float largest[QUERIES], total[QUERIES];
  alignas(64) float scores[ROWS * KEYS];
  alignas(64) Half probabilities[ROWS * KEYS];
  std::fill_n(largest, rows, NOTHING);
  std::fill_n(total, rows, 0.0f);
  for (int64_t key = 0; key < p.num_keys; key += KEYS) {
    const int64_t here = std::min(KEYS, p.num_keys - key);
    for (int64_t r = 0; r < rows; r += ROWS) {
      const int64_t few = std::min(ROWS, rows - r);
      multiply_panels(
          few, ceil_div(here, LANES), q + r * p.q.row, p.q.row, keys + key * p.width, LANES * p.width, p.width / PAIR, scores,
          KEYS, false);
      for (int64_t i = r; i < r + few; ++i) {
        const float* allowed = mask ? mask + i * p.mask_row + key : nullptr;
        const float shrink = softmax_block(
            scores + (i - r) * KEYS, here, p.scale, allowed, largest[i], total[i], probabilities + (i - r) * KEYS);
        if (key > 0 && shrink != 1.0f) {
          for (int64_t c = 0; c < padded; c += LANES)
            _mm512_storeu_ps(
                sums + i * padded + c, _mm512_mul_ps(_mm512_loadu_ps(sums + i * padded + c), _mm512_set1_ps(shrink)));
        }
      }
      multiply_panels(
          few, panels, probabilities, KEYS, values + key / PAIR * CELL, p.value_pairs * CELL, ceil_div(here, PAIR),
          sums + r * padded, padded, key > 0);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    const __m512 share = _mm512_set1_ps(total[r] == 0.0f ? 0.0f : 1.0f / total[r]);  // no key is allowed: zero, as torch's
    Half* out = p.out + ((batch * p.queries + row + r) * p.heads + head) * p.width;
    for (int64_t c = 0; c < p.width; c += LANES)
      store16(out + c, first(p.width - c), _mm512_mul_ps(_mm512_loadu_ps(sums + r * padded + c), share));
  }
}

Rows rows_of(const Tensor& x) { return {x.const_data_ptr<Half>(), x.stride(0), x.stride(1), x.stride(2)}; }

// q (B, N, T, D), k and v (B, N, S, D) bfloat16 with channels side by side; mask (B, N, T, S) float32, added, its last
// dimension side by side → (B, T, N, D).
Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask, double scale) {
  for (const Tensor* x : {&q, &k, &v}) {
    TORCH_CHECK(x->dim() == 4 && x->scalar_type() == at::kBFloat16, "q, k and v are bfloat16 (B, N, T, D)");
    TORCH_CHECK(x->stride(3) == 1 || x->size(3) == 1, "channels of q, k and v lie side by side");
  }
  const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2), width = q.size(3), num_keys = k.size(2);
  TORCH_CHECK(width % PAIR == 0, "heads have an even number of channels, got ", width);
  TORCH_CHECK(k.sizes() == v.sizes() && k.sizes() == at::IntArrayRef({batch, heads, num_keys, width}),
      "k and v have the batch, heads and channels of q, got ", k.sizes(), " and ", v.sizes(), " for ", q.sizes());
  TORCH_CHECK(!mask || (mask->scalar_type() == at::kFloat && mask->sizes() == at::IntArrayRef({batch, heads, queries, num_keys})
      && (mask->stride(3) == 1 || num_keys == 1)), "the mask is float32 (B, N, T, S)");
  const int64_t key_panels = ceil_div(num_keys, LANES), value_pairs = ceil_div(num_keys, PAIR);
  const int64_t padded = ceil_div(width, LANES) * LANES, tasks = ceil_div(queries, QUERIES);
  Tensor keys = at::empty({batch * heads, key_panels * LANES, width}, q.options());
  Tensor values = at::empty({batch * heads, padded, value_pairs * PAIR}, q.options());
  Tensor out = at::empty({batch, queries, heads, width}, q.options());
  Half *keys_at = keys.data_ptr<Half>(), *values_at = values.data_ptr<Half>();
  const Rows k_rows = rows_of(k), v_rows = rows_of(v);
  Problem problem{
      rows_of(q), keys_at, values_at, mask ? mask->const_data_ptr<float>() : nullptr, mask ? mask->stride(0) : 0,
      mask ? mask->stride(1) : 0, mask ? mask->stride(2) : 0, heads, queries, num_keys, width, key_panels, value_pairs,
      float(scale) * LOG2_E, out.data_ptr<Half>()};
  at::parallel_for(0, batch * heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t b = at / heads, n = at % heads;
      pack_keys(
          k_rows.at + b * k_rows.batch + n * k_rows.head, k_rows.row, num_keys, width, keys_at + at * key_panels * LANES * width);
      pack_values(
          v_rows.at + b * v_rows.batch + n * v_rows.head, v_rows.row, num_keys, width, value_pairs,
          values_at + at * padded * value_pairs * PAIR);
    }
  });
  at::parallel_for(0, batch * heads * tasks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> sums(QUERIES * padded);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t at = task / tasks, row = task % tasks * QUERIES;
      attend(problem, at / heads, at % heads, row, std::min(QUERIES, queries - row), sums.data(), padded);
    }
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ditbench_vnni, library) {
  library.def("attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale) -> Tensor");
}

TORCH_LIBRARY_IMPL(ditbench_vnni, CPU, library) {
  library.impl("attention", attention);
}

}  // namespace ditbench
