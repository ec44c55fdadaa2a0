// What elementwise kernels need besides Vec; Io loads and stores a storage type. Meanings: scalar_math.h.
#pragma once
#include "common/simd/avx512.h"
#include "common/simd/exp.h"
#include "common/simd/storage.h"

namespace repkern {
namespace avx512 {

template <class T>
struct Math;

template <>
struct Math<float> {
  using V = Vec<float>;
  using Reg = V::Reg;

  static Reg sub(Reg a, Reg b) { return _mm512_sub_ps(a, b); }
  static Reg div(Reg a, Reg b) { return _mm512_div_ps(a, b); }
  static Reg sqrt(Reg a) { return _mm512_sqrt_ps(a); }
  static Reg max(Reg a, Reg b) { return _mm512_max_ps(a, b); }
  static Reg min(Reg a, Reg b) { return _mm512_min_ps(a, b); }
  static Reg select_le(Reg a, Reg b, Reg x, Reg y) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LE_OQ), y, x);
  }
  static Reg select_lt(Reg a, Reg b, Reg x, Reg y) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x);
  }
  static Reg keep(Reg a, int64_t n) { return _mm512_maskz_mov_ps(V::mask(n), a); }
  static Reg round(Reg a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static Reg scale_by_power(Reg a, Reg n) { return _mm512_scalef_ps(a, n); }
  static Reg exp(Reg a) { return exp_of<Math>(a, 0.0f); }
  static void fence() { _mm_sfence(); }
};

template <>
struct Math<double> {
  using V = Vec<double>;
  using Reg = V::Reg;

  static Reg sub(Reg a, Reg b) { return _mm512_sub_pd(a, b); }
  static Reg div(Reg a, Reg b) { return _mm512_div_pd(a, b); }
  static Reg sqrt(Reg a) { return _mm512_sqrt_pd(a); }
  static Reg max(Reg a, Reg b) { return _mm512_max_pd(a, b); }
  static Reg min(Reg a, Reg b) { return _mm512_min_pd(a, b); }
  static Reg select_le(Reg a, Reg b, Reg x, Reg y) {
    return _mm512_mask_blend_pd(_mm512_cmp_pd_mask(a, b, _CMP_LE_OQ), y, x);
  }
  static Reg select_lt(Reg a, Reg b, Reg x, Reg y) {
    return _mm512_mask_blend_pd(_mm512_cmp_pd_mask(a, b, _CMP_LT_OQ), y, x);
  }
  static Reg keep(Reg a, int64_t n) { return _mm512_maskz_mov_pd(V::mask(n), a); }
  static Reg round(Reg a) { return _mm512_roundscale_pd(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static Reg scale_by_power(Reg a, Reg n) { return _mm512_scalef_pd(a, n); }
  static Reg exp(Reg a) { return exp_of<Math>(a, 0.0); }
  static void fence() { _mm_sfence(); }
};

template <class X>
struct Io : Vec<X> {
  static constexpr int kStreamAlignment = 64;
  static void stream(float* p, __m512 r) { _mm512_stream_ps(p, r); }
  static void stream(double* p, __m512d r) { _mm512_stream_pd(p, r); }
};

template <class X, class Own>
struct HalfIo {
  using V = Vec<float>;
  using Reg = V::Reg;

  static Reg load(const X* p) { return Own::wide(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static Reg load_n(const X* p, int64_t n) { return Own::wide(_mm256_maskz_loadu_epi16(V::mask(n), p)); }
  static void store(X* p, Reg r) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), Own::narrow(r)); }
  static constexpr int kStreamAlignment = 32;
  static void stream(X* p, Reg r) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), Own::narrow(r)); }
  static void store_n(X* p, Reg r, int64_t n) { _mm256_mask_storeu_epi16(p, V::mask(n), Own::narrow(r)); }
};

template <>
struct Io<F16> : HalfIo<F16, Io<F16>> {
  static __m512 wide(__m256i x) { return _mm512_cvtph_ps(x); }
  static __m256i narrow(__m512 r) { return _mm512_cvtps_ph(r, _MM_FROUND_TO_NEAREST_INT); }
};

template <>
struct Io<Bf16> : HalfIo<Bf16, Io<Bf16>> {
  static __m512 wide(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
  // Round to nearest even; NaN to the quiet one, since rounding could make it an infinity.
  static __m256i narrow(__m512 r) {
    const __m512i bits = _mm512_castps_si512(r);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i sum = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(r, r, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(sum, 16), nan, _mm512_set1_epi32(0x7fc0)));
  }
};

}  // namespace avx512
}  // namespace repkern
