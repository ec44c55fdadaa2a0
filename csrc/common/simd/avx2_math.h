// What elementwise kernels need besides Vec; Io loads and stores a storage type. Meanings: scalar_math.h.
#pragma once
#include "common/simd/avx2.h"
#include "common/simd/exp.h"
#include "common/simd/storage.h"

namespace repkern {
namespace avx2 {

template <class T>
struct Math;

template <>
struct Math<float> {
  using V = Vec<float>;
  using Reg = V::Reg;

  static Reg sub(Reg a, Reg b) { return _mm256_sub_ps(a, b); }
  static Reg div(Reg a, Reg b) { return _mm256_div_ps(a, b); }
  static Reg sqrt(Reg a) { return _mm256_sqrt_ps(a); }
  static Reg max(Reg a, Reg b) { return _mm256_max_ps(a, b); }
  static Reg min(Reg a, Reg b) { return _mm256_min_ps(a, b); }
  static Reg select_le(Reg a, Reg b, Reg x, Reg y) { return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LE_OQ)); }
  static Reg select_lt(Reg a, Reg b, Reg x, Reg y) { return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
  static Reg keep(Reg a, int64_t n) { return _mm256_and_ps(a, _mm256_castsi256_ps(V::mask(n))); }
  static Reg round(Reg a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static Reg scale_by_power(Reg a, Reg n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
  }
  static Reg exp(Reg a) { return exp_of<Math>(a, 0.0f); }
  static void fence() { _mm_sfence(); }
};

template <>
struct Math<double> {
  using V = Vec<double>;
  using Reg = V::Reg;

  static Reg sub(Reg a, Reg b) { return _mm256_sub_pd(a, b); }
  static Reg div(Reg a, Reg b) { return _mm256_div_pd(a, b); }
  static Reg sqrt(Reg a) { return _mm256_sqrt_pd(a); }
  static Reg max(Reg a, Reg b) { return _mm256_max_pd(a, b); }
  static Reg min(Reg a, Reg b) { return _mm256_min_pd(a, b); }
  static Reg select_le(Reg a, Reg b, Reg x, Reg y) { return _mm256_blendv_pd(y, x, _mm256_cmp_pd(a, b, _CMP_LE_OQ)); }
  static Reg select_lt(Reg a, Reg b, Reg x, Reg y) { return _mm256_blendv_pd(y, x, _mm256_cmp_pd(a, b, _CMP_LT_OQ)); }
  static Reg keep(Reg a, int64_t n) { return _mm256_and_pd(a, _mm256_castsi256_pd(V::mask(n))); }
  static Reg round(Reg a) { return _mm256_round_pd(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static Reg scale_by_power(Reg a, Reg n) {
    const __m256i exponent = _mm256_cvtepi32_epi64(_mm256_cvtpd_epi32(n));
    const __m256i biased = _mm256_add_epi64(exponent, _mm256_set1_epi64x(1023));
    return _mm256_mul_pd(a, _mm256_castsi256_pd(_mm256_slli_epi64(biased, 52)));
  }
  static Reg exp(Reg a) { return exp_of<Math>(a, 0.0); }
  static void fence() { _mm_sfence(); }
};

template <class X>
struct Io : Vec<X> {
  static constexpr int kStreamAlignment = 32;
  static void stream(float* p, __m256 r) { _mm256_stream_ps(p, r); }
  static void stream(double* p, __m256d r) { _mm256_stream_pd(p, r); }
};

// A part of a vector goes through a buffer: there is no masked move of 16-bit elements.
template <class X, class Own>
struct HalfIo {
  using V = Vec<float>;
  using Reg = V::Reg;

  static Reg load(const X* p) { return Own::wide(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static Reg load_n(const X* p, int64_t n) {
    if (n >= V::width) return load(p);
    X part[V::width] = {};
    for (int64_t j = 0; j < n; ++j) part[j] = p[j];
    return load(part);
  }
  static void store(X* p, Reg r) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), Own::narrow(r)); }
  static constexpr int kStreamAlignment = 16;
  static void stream(X* p, Reg r) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), Own::narrow(r)); }
  static void store_n(X* p, Reg r, int64_t n) {
    if (n >= V::width) return store(p, r);
    X part[V::width];
    store(part, r);
    for (int64_t j = 0; j < n; ++j) p[j] = part[j];
  }
};

template <>
struct Io<F16> : HalfIo<F16, Io<F16>> {
  static __m256 wide(__m128i x) { return _mm256_cvtph_ps(x); }
  static __m128i narrow(__m256 r) { return _mm256_cvtps_ph(r, _MM_FROUND_TO_NEAREST_INT); }
};

template <>
struct Io<Bf16> : HalfIo<Bf16, Io<Bf16>> {
  static __m256 wide(__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
  // Round to nearest even; NaN to the quiet one, since rounding could make it an infinity.
  static __m128i narrow(__m256 r) {
    const __m256i bits = _mm256_castps_si256(r);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(r, r, _CMP_UNORD_Q));
    const __m256i rounded = _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), _mm256_set1_epi32(0x7fc0), nan);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0xd8);
    return _mm256_castsi256_si128(packed);
  }
};

}  // namespace avx2
}  // namespace repkern
