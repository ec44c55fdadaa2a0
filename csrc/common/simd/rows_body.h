// Operations on rows, for one instruction set: REPKERN_ISA_NAMESPACE is that of the vectors already included.
// `n` counts elements; nothing is read or written past them. "flat" is [lane][row] in memory, "split" is [row][lane].
#pragma once
#include <cstdint>

#include "common/simd/half.h"
#include "common/types.h"

namespace repkern {
namespace REPKERN_ISA_NAMESPACE {

template <class T>
struct Rows {
  using V = Vec<T>;
  using Reg = typename V::Reg;
  static constexpr int W = V::width;
  static constexpr DType kOwn = sizeof(T) == 8 ? DType::f64 : DType::f32;
  static constexpr int64_t kLine = 64 / sizeof(T);  // elements in a cache line

  static int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }

  // y += a x
  static void axpy(T* y, const T* x, T a, int64_t n) {
    const Reg factor = V::set1(a);
    int64_t j = 0;
    for (; j + W <= n; j += W) V::store(y + j, V::fma(factor, V::load(x + j), V::load(y + j)));
    if (j < n) V::store_n(y + j, V::fma(factor, V::load_n(x + j, n - j), V::load_n(y + j, n - j)), n - j);
  }

  // y = a x
  static void scale(T* y, const T* x, T a, int64_t n) {
    const Reg factor = V::set1(a);
    int64_t j = 0;
    for (; j + W <= n; j += W) V::store(y + j, V::mul(factor, V::load(x + j)));
    if (j < n) V::store_n(y + j, V::mul(factor, V::load_n(x + j, n - j)), n - j);
  }

  // y = a x; returns sum z x, the gradient of a.
  static T scale_dot(T* y, const T* x, const T* z, T a, int64_t n) {
    const Reg factor = V::set1(a);
    Reg even = V::zero(), odd = V::zero();  // two chains of additions, for their latency
    int64_t j = 0;
    for (; j + 2 * W <= n; j += 2 * W) {
      const Reg v = V::load(x + j), w = V::load(x + j + W);
      V::store(y + j, V::mul(factor, v));
      V::store(y + j + W, V::mul(factor, w));
      even = V::fma(v, V::load(z + j), even);
      odd = V::fma(w, V::load(z + j + W), odd);
    }
    for (; j < n; j += W) {
      const Reg v = V::load_n(x + j, n - j);
      V::store_n(y + j, V::mul(factor, v), n - j);
      even = V::fma(v, V::load_n(z + j, n - j), even);
    }
    return V::sum(V::add(even, odd));
  }

  // out = flat + a x; `x` may be null. `out` is of any dtype: see store_as.
  static void add_and_store(void* out, int64_t at, DType dtype, T* flat, const T* x, T a, int64_t n) {
    if (dtype != kOwn) {
      if (x != nullptr) axpy(flat, x, a, n);
      return store_as(out, at, dtype, flat, n);
    }
    T* to = static_cast<T*>(out) + at;
    const Reg factor = V::set1(a);
    int64_t j = 0;
    for (; j + W <= n; j += W) {
      const Reg v = V::load(flat + j);
      V::store(to + j, x == nullptr ? v : V::fma(factor, V::load(x + j), v));
    }
    if (j < n) {
      const Reg v = V::load_n(flat + j, n - j);
      V::store_n(to + j, x == nullptr ? v : V::fma(factor, V::load_n(x + j, n - j), v), n - j);
    }
  }

  // Asks for n elements that will be needed after the next product; null is fine.
  static void prefetch(const T* x, int64_t n) {
    if (x == nullptr) return;
    for (int64_t j = 0; j < n; j += kLine) __builtin_prefetch(x + j, 0, 2);
  }
  static void prefetch_to_write(const T* x, int64_t n) {
    if (x == nullptr) return;
    for (int64_t j = 0; j < n; j += kLine) __builtin_prefetch(x + j, 1, 2);
  }

  static T dot(const T* x, const T* y, int64_t n) {
    Reg total = V::zero();
    int64_t j = 0;
    for (; j + W <= n; j += W) total = V::fma(V::load(x + j), V::load(y + j), total);
    if (j < n) total = V::fma(V::load_n(x + j, n - j), V::load_n(y + j, n - j), total);
    return V::sum(total);
  }

  static T sum(const T* x, int64_t n) {
    Reg total = V::zero();
    int64_t j = 0;
    for (; j + W <= n; j += W) total = V::add(V::load(x + j), total);
    if (j < n) total = V::add(V::load_n(x + j, n - j), total);
    return V::sum(total);
  }

  static void clear(T* x, int64_t n) {
    for (int64_t j = 0; j < n; ++j) x[j] = 0;
  }

  // split[r][lane] = flat[lane][r] for `lanes` <= W lanes and `rows` rows; lanes beyond are set to zero.
  // `pitch`: elements from one lane's row in `flat` to the next; `stride`: from one row of `split` to the next.
  static void split(const T* flat, int64_t pitch, int64_t lanes, int64_t rows, T* to, int64_t stride) {
    using Q = Quads<T>;
    if (Q::size > 0 && lanes == W && rows >= Q::size) {
      int64_t r = 0;
      for (; r + Q::size <= rows; r += Q::size) Q::split(flat + r, pitch, to + r * stride, stride);
      // The last rows again rather than element by element: a vector load cannot be served from 16 small stores.
      if (r < rows) Q::split(flat + rows - Q::size, pitch, to + (rows - Q::size) * stride, stride);
      return;
    }
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t lane = 0; lane < lanes; ++lane) to[r * stride + lane] = flat[lane * pitch + r];
      for (int64_t lane = lanes; lane < W; ++lane) to[r * stride + lane] = 0;
    }
  }

  // flat[lane][r] = split[r][lane]: the inverse.
  static void join(const T* from, int64_t stride, int64_t lanes, int64_t rows, T* flat, int64_t pitch) {
    using Q = Quads<T>;
    if (Q::size > 0 && lanes == W && rows >= Q::size) {
      int64_t r = 0;
      for (; r + Q::size <= rows; r += Q::size) Q::join(from + r * stride, stride, flat + r, pitch);
      for (; r < rows; ++r) {
        for (int lane = 0; lane < W; ++lane) flat[lane * pitch + r] = from[r * stride + lane];
      }
      return;
    }
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t lane = 0; lane < lanes; ++lane) flat[lane * pitch + r] = from[r * stride + lane];
    }
  }

  // Writes `n` elements as `dtype` at element `at` of `out`. Like torch, float64 goes to 16 bits through float32.
  static void store_as(void* out, int64_t at, DType dtype, const T* x, int64_t n) {
    if (dtype == DType::f64) {
      double* to = static_cast<double*>(out) + at;
      for (int64_t j = 0; j < n; ++j) to[j] = static_cast<double>(x[j]);
    } else if (dtype == DType::f32) {
      float* to = static_cast<float*>(out) + at;
      for (int64_t j = 0; j < n; ++j) to[j] = static_cast<float>(x[j]);
    } else {
      constexpr int kBlock = 64;
      uint16_t* to = static_cast<uint16_t*>(out) + at;
      for (int64_t start = 0; start < n; start += kBlock) {
        const int64_t count = lesser(kBlock, n - start);
        float block[kBlock];
        for (int64_t j = 0; j < count; ++j) block[j] = static_cast<float>(x[start + j]);
        if (dtype == DType::f16) {
          store_f16(to + start, block, count);
        } else {
          for (int64_t j = 0; j < count; ++j) to[start + j] = bfloat16_bits(block[j]);
        }
      }
    }
  }
};

}  // namespace REPKERN_ISA_NAMESPACE
}  // namespace repkern
