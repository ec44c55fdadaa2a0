// AVX-512 (F, BW, DQ, VL) vectors.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace repkern {
namespace avx512 {

template <class T>
struct Vec;

template <>
struct Vec<float> {
  using Scalar = float;
  using Reg = __m512;
  static constexpr int width = 16;
  static constexpr int panel = 3;                        // most vectors in a panel
  static constexpr int columns(int) { return 9; }        // of a micro-tile whose panel is that wide
  static constexpr int lane_rows = 3, lane_columns = 9;  // of a lane product

  static __mmask16 mask(int64_t n) { return n < width ? static_cast<__mmask16>((1u << n) - 1) : __mmask16(0xffff); }
  static Reg zero() { return _mm512_setzero_ps(); }
  static Reg set1(float x) { return _mm512_set1_ps(x); }
  static Reg load(const float* p) { return _mm512_loadu_ps(p); }
  static Reg load_n(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(mask(n), p); }
  static void store(float* p, Reg r) { _mm512_storeu_ps(p, r); }
  static void store_n(float* p, Reg r, int64_t n) { _mm512_mask_storeu_ps(p, mask(n), r); }
  static Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  static float sum(Reg r) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(r), _mm512_extractf32x8_ps(r, 1));
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
  }
};

template <>
struct Vec<double> {
  using Scalar = double;
  using Reg = __m512d;
  static constexpr int width = 8;
  static constexpr int panel = 3;
  static constexpr int columns(int) { return 9; }
  static constexpr int lane_rows = 3, lane_columns = 9;  // of a lane product

  static __mmask8 mask(int64_t n) { return n < width ? static_cast<__mmask8>((1u << n) - 1) : __mmask8(0xff); }
  static Reg zero() { return _mm512_setzero_pd(); }
  static Reg set1(double x) { return _mm512_set1_pd(x); }
  static Reg load(const double* p) { return _mm512_loadu_pd(p); }
  static Reg load_n(const double* p, int64_t n) { return _mm512_maskz_loadu_pd(mask(n), p); }
  static void store(double* p, Reg r) { _mm512_storeu_pd(p, r); }
  static void store_n(double* p, Reg r, int64_t n) { _mm512_mask_storeu_pd(p, mask(n), r); }
  static Reg add(Reg a, Reg b) { return _mm512_add_pd(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm512_mul_pd(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_pd(a, b, c); }
  static double sum(Reg r) {
    const __m256d four = _mm256_add_pd(_mm512_castpd512_pd256(r), _mm512_extractf64x4_pd(r, 1));
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
  }
};

// Four consecutive elements of each of the `width` rows of `flat` <-> four vectors. See common/simd/rows_body.h.
template <class T>
struct Quads;

template <>
struct Quads<float> {
  static constexpr int size = 4;

  static void transpose(__m512 v[4]) {
    const __m512 a = _mm512_unpacklo_ps(v[0], v[1]), b = _mm512_unpackhi_ps(v[0], v[1]);
    const __m512 c = _mm512_unpacklo_ps(v[2], v[3]), d = _mm512_unpackhi_ps(v[2], v[3]);
    v[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(c)));
    v[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(c)));
    v[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(b), _mm512_castps_pd(d)));
    v[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(b), _mm512_castps_pd(d)));
  }
  static void split(const float* flat, int64_t row, float* to, int64_t stride) {
    __m512 v[4];
    for (int j = 0; j < 4; ++j) {
      const float* p = flat + j * row;
      __m512 r = _mm512_castps128_ps512(_mm_loadu_ps(p));
      r = _mm512_mask_broadcast_f32x4(r, 0x00f0, _mm_loadu_ps(p + 4 * row));
      r = _mm512_mask_broadcast_f32x4(r, 0x0f00, _mm_loadu_ps(p + 8 * row));
      v[j] = _mm512_mask_broadcast_f32x4(r, 0xf000, _mm_loadu_ps(p + 12 * row));
    }
    transpose(v);
    for (int j = 0; j < 4; ++j) _mm512_storeu_ps(to + j * stride, v[j]);
  }
  static void join(const float* from, int64_t stride, float* flat, int64_t row) {
    __m512 v[4];
    for (int j = 0; j < 4; ++j) v[j] = _mm512_loadu_ps(from + j * stride);
    transpose(v);
    for (int j = 0; j < 4; ++j) {
      float* p = flat + j * row;
      _mm_storeu_ps(p, _mm512_castps512_ps128(v[j]));
      _mm_storeu_ps(p + 4 * row, _mm512_extractf32x4_ps(v[j], 1));
      _mm_storeu_ps(p + 8 * row, _mm512_extractf32x4_ps(v[j], 2));
      _mm_storeu_ps(p + 12 * row, _mm512_extractf32x4_ps(v[j], 3));
    }
  }
};

template <>
struct Quads<double> {
  static constexpr int size = 4;

  static void transpose(__m256d v[4]) {
    const __m256d a = _mm256_unpacklo_pd(v[0], v[1]), b = _mm256_unpackhi_pd(v[0], v[1]);
    const __m256d c = _mm256_unpacklo_pd(v[2], v[3]), d = _mm256_unpackhi_pd(v[2], v[3]);
    v[0] = _mm256_permute2f128_pd(a, c, 0x20);
    v[1] = _mm256_permute2f128_pd(b, d, 0x20);
    v[2] = _mm256_permute2f128_pd(a, c, 0x31);
    v[3] = _mm256_permute2f128_pd(b, d, 0x31);
  }
  static void split(const double* flat, int64_t row, double* to, int64_t stride) {
    for (int half = 0; half < 2; ++half, flat += 4 * row) {
      __m256d v[4];
      for (int j = 0; j < 4; ++j) v[j] = _mm256_loadu_pd(flat + j * row);
      transpose(v);
      for (int j = 0; j < 4; ++j) _mm256_storeu_pd(to + j * stride + 4 * half, v[j]);
    }
  }
  static void join(const double* from, int64_t stride, double* flat, int64_t row) {
    for (int half = 0; half < 2; ++half, flat += 4 * row) {
      __m256d v[4];
      for (int j = 0; j < 4; ++j) v[j] = _mm256_loadu_pd(from + j * stride + 4 * half);
      transpose(v);
      for (int j = 0; j < 4; ++j) _mm256_storeu_pd(flat + j * row, v[j]);
    }
  }
};

static inline void store_f16(uint16_t* out, const float* in, int64_t n) {
  for (int64_t j = 0; j < n; j += 16) {
    const __mmask16 m = Vec<float>::mask(n - j);
    _mm256_mask_storeu_epi16(out + j, m, _mm512_maskz_cvtps_ph(m, _mm512_maskz_loadu_ps(m, in + j), 0));
  }
}

}  // namespace avx512
}  // namespace repkern
