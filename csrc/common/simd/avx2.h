// AVX2 + FMA + F16C vectors.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace repkern {
namespace avx2 {

template <class T>
struct Vec;

template <>
struct Vec<float> {
  using Scalar = float;
  using Reg = __m256;
  static constexpr int width = 8;
  static constexpr int panel = 4;  // most vectors in a panel
  // of a micro-tile whose panel is that wide: 12 sums stay in registers
  static constexpr int columns(int vectors) { return vectors == 1 ? 9 : 12 / vectors; }
  static constexpr int lane_rows = 2, lane_columns = 5;  // of a lane product

  static __m256i mask(int64_t n) {
    const int used = n < width ? static_cast<int>(n) : width;
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(used), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static Reg zero() { return _mm256_setzero_ps(); }
  static Reg set1(float x) { return _mm256_set1_ps(x); }
  static Reg load(const float* p) { return _mm256_loadu_ps(p); }
  static Reg load_n(const float* p, int64_t n) { return _mm256_maskload_ps(p, mask(n)); }
  static void store(float* p, Reg r) { _mm256_storeu_ps(p, r); }
  static void store_n(float* p, Reg r, int64_t n) { _mm256_maskstore_ps(p, mask(n), r); }
  static Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  static float sum(Reg r) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(r), _mm256_extractf128_ps(r, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
  }
};

template <>
struct Vec<double> {
  using Scalar = double;
  using Reg = __m256d;
  static constexpr int width = 4;
  static constexpr int panel = 4;
  static constexpr int columns(int vectors) { return vectors == 1 ? 9 : 12 / vectors; }
  static constexpr int lane_rows = 2, lane_columns = 5;  // of a lane product

  static __m256i mask(int64_t n) {
    const int64_t used = n < width ? n : width;
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(used), _mm256_setr_epi64x(0, 1, 2, 3));
  }
  static Reg zero() { return _mm256_setzero_pd(); }
  static Reg set1(double x) { return _mm256_set1_pd(x); }
  static Reg load(const double* p) { return _mm256_loadu_pd(p); }
  static Reg load_n(const double* p, int64_t n) { return _mm256_maskload_pd(p, mask(n)); }
  static void store(double* p, Reg r) { _mm256_storeu_pd(p, r); }
  static void store_n(double* p, Reg r, int64_t n) { _mm256_maskstore_pd(p, mask(n), r); }
  static Reg add(Reg a, Reg b) { return _mm256_add_pd(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm256_mul_pd(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_pd(a, b, c); }
  static double sum(Reg r) {
    const __m128d half = _mm_add_pd(_mm256_castpd256_pd128(r), _mm256_extractf128_pd(r, 1));
    return _mm_cvtsd_f64(_mm_add_sd(half, _mm_unpackhi_pd(half, half)));
  }
};

// Four consecutive elements of each of the `width` rows of `flat` <-> four vectors. See common/simd/rows_body.h.
template <class T>
struct Quads;

template <>
struct Quads<float> {
  static constexpr int size = 4;

  static void transpose(__m256 v[4]) {
    const __m256 a = _mm256_unpacklo_ps(v[0], v[1]), b = _mm256_unpackhi_ps(v[0], v[1]);
    const __m256 c = _mm256_unpacklo_ps(v[2], v[3]), d = _mm256_unpackhi_ps(v[2], v[3]);
    v[0] = _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(a), _mm256_castps_pd(c)));
    v[1] = _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(a), _mm256_castps_pd(c)));
    v[2] = _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(b), _mm256_castps_pd(d)));
    v[3] = _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(b), _mm256_castps_pd(d)));
  }
  static void split(const float* flat, int64_t row, float* to, int64_t stride) {
    __m256 v[4];
    for (int j = 0; j < 4; ++j)
      v[j] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(flat + j * row)),
                                  _mm_loadu_ps(flat + (4 + j) * row), 1);
    transpose(v);
    for (int j = 0; j < 4; ++j) _mm256_storeu_ps(to + j * stride, v[j]);
  }
  static void join(const float* from, int64_t stride, float* flat, int64_t row) {
    __m256 v[4];
    for (int j = 0; j < 4; ++j) v[j] = _mm256_loadu_ps(from + j * stride);
    transpose(v);
    for (int j = 0; j < 4; ++j) {
      _mm_storeu_ps(flat + j * row, _mm256_castps256_ps128(v[j]));
      _mm_storeu_ps(flat + (4 + j) * row, _mm256_extractf128_ps(v[j], 1));
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
    __m256d v[4];
    for (int j = 0; j < 4; ++j) v[j] = _mm256_loadu_pd(flat + j * row);
    transpose(v);
    for (int j = 0; j < 4; ++j) _mm256_storeu_pd(to + j * stride, v[j]);
  }
  static void join(const double* from, int64_t stride, double* flat, int64_t row) {
    __m256d v[4];
    for (int j = 0; j < 4; ++j) v[j] = _mm256_loadu_pd(from + j * stride);
    transpose(v);
    for (int j = 0; j < 4; ++j) _mm256_storeu_pd(flat + j * row, v[j]);
  }
};

static inline void store_f16(uint16_t* out, const float* in, int64_t n) {
  int64_t j = 0;
  for (; j + 8 <= n; j += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + j), _mm256_cvtps_ph(_mm256_loadu_ps(in + j), 0));
  for (; j < n; ++j) out[j] = static_cast<uint16_t>(_mm_cvtsi128_si32(_mm_cvtps_ph(_mm_set_ss(in[j]), 0)));
}

}  // namespace avx2
}  // namespace repkern
