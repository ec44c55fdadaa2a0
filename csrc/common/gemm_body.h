// The one matrix product, for one instruction set: C[column][lane] (+)= sum over depth of A[depth][lane]
// B[depth][column]. A is packed in panels (`vectors` registers wide), C is a tile of rows of the same width; B is read
// where it lies, one element broadcast at a time, so it may be any strided view of a tensor.
#pragma once
#include <cstdint>

#include "common/simd/rows_body.h"

namespace repkern {
namespace REPKERN_ISA_NAMESPACE {

// The depth runs over three nested loops; strides in elements.
struct Depth {
  int64_t count[3], a[3], b[3];

  static Depth flat(int64_t count, int64_t a, int64_t b) { return {{1, 1, count}, {0, 0, a}, {0, 0, b}}; }
  static Depth nested(int64_t outer, int64_t a1, int64_t b1, int64_t inner, int64_t a2, int64_t b2) {
    return {{1, outer, inner}, {0, a1, a2}, {0, b1, b2}};
  }
};

// Column c lies at offset c / width * outer + c % width * inner.
struct Columns {
  int64_t width, inner, outer;

  static Columns strided(int64_t stride) { return {INT64_MAX, stride, 0}; }
};

template <class T>
struct Gemm {
  using V = Vec<T>;
  using Reg = typename V::Reg;
  static constexpr int W = V::width;
  static constexpr int kMostColumns = 9;

  template <int MV, int NC, bool kDense>
  static void micro(const Depth& d, const T* a, const T* b, const int64_t* at_b, T* c, const int64_t* at_c, bool add) {
    Reg sum[NC][MV];
    int64_t offset[NC];
#pragma GCC unroll 16
    for (int n = 0; n < NC; ++n) {
      offset[n] = kDense ? n : at_b[n];
#pragma GCC unroll 16
      for (int v = 0; v < MV; ++v) sum[n][v] = add ? V::load(c + at_c[n] + v * W) : V::zero();
    }
    const int64_t count = d.count[2], a_step = d.a[2], b_step = d.b[2];
    for (int64_t i = 0; i < d.count[0]; ++i) {
      for (int64_t j = 0; j < d.count[1]; ++j) {
        const T* x = a + i * d.a[0] + j * d.a[1];
        const T* y = b + i * d.b[0] + j * d.b[1];
        for (int64_t k = 0; k < count; ++k, x += a_step, y += b_step) {
          Reg lanes[MV];
#pragma GCC unroll 16
          for (int v = 0; v < MV; ++v) lanes[v] = V::load(x + v * W);
#pragma GCC unroll 16
          for (int n = 0; n < NC; ++n) {
            const Reg factor = V::set1(kDense ? y[n] : y[offset[n]]);
#pragma GCC unroll 16
            for (int v = 0; v < MV; ++v) sum[n][v] = V::fma(lanes[v], factor, sum[n][v]);
          }
        }
      }
    }
#pragma GCC unroll 16
    for (int n = 0; n < NC; ++n) {
#pragma GCC unroll 16
      for (int v = 0; v < MV; ++v) V::store(c + at_c[n] + v * W, sum[n][v]);
    }
  }

  using Micro = void (*)(const Depth&, const T*, const T*, const int64_t*, T*, const int64_t*, bool);

  template <int MV, bool kDense>
  static Micro micro_of(int columns) {
    constexpr int most = V::columns(MV);
    switch (columns) {
      case 1:
        return micro<MV, 1, kDense>;
      case 2:
        return micro<MV, 2, kDense>;
      case 3:
        return micro<MV, 3, kDense>;
      case 4:
        return micro<MV, (most < 4 ? 1 : 4), kDense>;
      case 5:
        return micro<MV, (most < 5 ? 1 : 5), kDense>;
      case 6:
        return micro<MV, (most < 6 ? 1 : 6), kDense>;
      case 7:
        return micro<MV, (most < 7 ? 1 : 7), kDense>;
      case 8:
        return micro<MV, (most < 8 ? 1 : 8), kDense>;
      default:
        return micro<MV, (most < 9 ? 1 : 9), kDense>;
    }
  }

  template <int MV>
  static void run_panel(const Depth& d, const T* a, const T* b, const Columns& at_b, T* c, const Columns& at_c,
                        int64_t columns, bool add) {
    constexpr int most = V::columns(MV);
    static_assert(most <= kMostColumns, "micro_of knows no wider tile");
    const bool dense = at_b.inner == 1 && at_b.width >= columns;
    int64_t place_b = 0, place_c = 0, row_b = 0, row_c = 0;
    // As many tiles as needed, of nearly equal width: a last tile of one column would waste the registers.
    for (int64_t tiles = (columns + most - 1) / most, left = columns; tiles > 0; --tiles) {
      const int width = static_cast<int>((left + tiles - 1) / tiles);
      int64_t offset_b[kMostColumns], offset_c[kMostColumns];
      for (int n = 0; n < width; ++n) {
        offset_b[n] = row_b + place_b * at_b.inner;
        offset_c[n] = row_c + place_c * at_c.inner;
        if (++place_b == at_b.width) place_b = 0, row_b += at_b.outer;
        if (++place_c == at_c.width) place_c = 0, row_c += at_c.outer;
      }
      if (dense) {
        micro_of<MV, true>(width)(d, a, b + offset_b[0], offset_b, c, offset_c, add);
      } else {
        micro_of<MV, false>(width)(d, a, b, offset_b, c, offset_c, add);
      }
      left -= width;
    }
  }

  // One panel of `vectors` registers against `columns` columns.
  static void run(int vectors, const Depth& d, const T* a, const T* b, const Columns& at_b, T* c, const Columns& at_c,
                  int64_t columns, bool add) {
    static_assert(V::panel <= 4, "no case for wider panels");
    switch (vectors) {
      case 1:
        return run_panel<1>(d, a, b, at_b, c, at_c, columns, add);
      case 2:
        return run_panel<2>(d, a, b, at_b, c, at_c, columns, add);
      case 3:
        return run_panel<(V::panel < 3 ? 1 : 3)>(d, a, b, at_b, c, at_c, columns, add);
      default:
        return run_panel<(V::panel < 4 ? 1 : 4)>(d, a, b, at_b, c, at_c, columns, add);
    }
  }
};

// `lanes` lanes cut into panels of at most V::panel vectors, of nearly equal width.
template <class T>
struct Panels {
  int64_t vectors, count;

  explicit Panels(int64_t lanes)
      : vectors((lanes + Vec<T>::width - 1) / Vec<T>::width), count((vectors + Vec<T>::panel - 1) / Vec<T>::panel) {}
  int64_t first_vector(int64_t panel) const { return vectors * panel / count; }
  int width(int64_t panel) const { return static_cast<int>(first_vector(panel + 1) - first_vector(panel)); }
  int64_t first_lane(int64_t panel) const { return first_vector(panel) * Vec<T>::width; }
};

}  // namespace REPKERN_ISA_NAMESPACE
}  // namespace repkern
