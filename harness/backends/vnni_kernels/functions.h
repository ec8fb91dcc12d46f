// Functions of 16 values that attention and epilogues share.
#pragma once

#include "common.h"

#include <type_traits>

namespace ditbench {

constexpr float LOG2_E = 1.44269504f;

// 2^y to 4·10⁻⁶, 500 times finer than the rounding to bfloat16 that follows: 2ⁿ · 2ʳ with a polynomial on −½ … ½. 0 at −∞.
inline __m512 power_of_two(__m512 y) {
  const __m512 n = _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 r = _mm512_sub_ps(y, n);
  __m512 p = _mm512_set1_ps(9.66636837e-3f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.59219755e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.40223497e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.93121016e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

inline __m512 exponential(__m512 x) { return power_of_two(_mm512_mul_ps(x, _mm512_set1_ps(LOG2_E))); }

// What may follow a product. The numbers are those of `backends/activations.py`.
enum class Activation : int64_t { none = 0, gelu_tanh = 1, silu = 2, gelu_erf = 3, last = gelu_erf };

// x / (1 + e^−y) to 10⁻⁵: NaN stays NaN, and e^88 is the largest that float32 holds.
inline __m512 times_logistic(__m512 x, __m512 y) {
  const __m512 power = _mm512_min_ps(_mm512_set1_ps(80.0f), _mm512_sub_ps(_mm512_setzero_ps(), y));
  const __m512 divisor = _mm512_add_ps(_mm512_set1_ps(1.0f), exponential(power));
  const __m512 rough = _mm512_rcp14_ps(divisor);  // and one step of Newton's
  return _mm512_mul_ps(x, _mm512_mul_ps(rough, _mm512_fnmadd_ps(divisor, rough, _mm512_set1_ps(2.0f))));
}

// ½ x (1 + tanh u) = x / (1 + e^−2u) with u = √(2/π) (x + 0.044715 x³).
inline __m512 gelu_tanh(__m512 x) {
  const __m512 inner = _mm512_fmadd_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(0.0713548163f), _mm512_set1_ps(1.5957691216f));
  return times_logistic(x, _mm512_mul_ps(x, inner));
}

// x Φ(x) = ½ x (1 + erf(x / √2)) to 4·10⁻⁷; 1 − erf for x ≥ 0 by Abramowitz and Stegun, 7.1.26.
inline __m512 gelu_erf(__m512 x) {
  const __m512 z = _mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(0.7071067812f)), one = _mm512_set1_ps(1.0f);
  const __m512 t = _mm512_div_ps(one, _mm512_fmadd_ps(z, _mm512_set1_ps(0.3275911f), one));
  __m512 p = _mm512_set1_ps(1.061405429f);
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-1.453152027f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(1.421413741f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-0.284496736f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.254829592f));
  const __m512 tail = exponential(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_mul_ps(z, z)));
  const __m512 half = _mm512_mul_ps(_mm512_set1_ps(0.5f), _mm512_mul_ps(_mm512_mul_ps(p, t), tail));
  const __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
  return _mm512_mul_ps(x, _mm512_mask_mov_ps(_mm512_sub_ps(one, half), negative, half));
}

template <Activation activation>
inline __m512 activated(__m512 x) {
  switch (activation) {
    case Activation::gelu_tanh: return gelu_tanh(x);
    case Activation::silu: return times_logistic(x, x);
    case Activation::gelu_erf: return gelu_erf(x);
    default: return x;
  }
}

// run(std::integral_constant of the activation): what is compiled for each of them.
template <typename F>
inline void with_activation(Activation activation, F&& run) {
  switch (activation) {
    case Activation::gelu_tanh: return run(std::integral_constant<Activation, Activation::gelu_tanh>());
    case Activation::silu: return run(std::integral_constant<Activation, Activation::silu>());
    case Activation::gelu_erf: return run(std::integral_constant<Activation, Activation::gelu_erf>());
    default: return run(std::integral_constant<Activation, Activation::none>());
  }
}

}  // namespace ditbench
