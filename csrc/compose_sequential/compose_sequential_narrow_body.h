// Groups of few channels: nothing is transposed, the vectors run along rows of the kernels.
#pragma once
#include "common/parallel.h"
#include "common/simd/rows_body.h"
#include "common/workspace.h"
#include "compose_sequential/compose_sequential.h"

namespace repkern {
namespace REPKERN_ISA_NAMESPACE {

// Sizes of one call; the channel counts are those of one group.
struct Composition {
  int64_t groups, cog, cig, cmg, k1, k2, k;
  explicit Composition(const ComposeParams& p)
      : groups(p.groups),
        cog(p.co / p.groups),
        cig(p.ci / p.groups),
        cmg(p.cm / p.groups),
        k1(p.k1),
        k2(p.k2),
        k(p.k1 + p.k2 - 1) {}
};

template <class T>
struct NarrowCompose {
  using R = Rows<T>;

  // The kernel of output channel `o`, [Ci/g, K, K].
  static void forward(const Composition& c, const T* first, const T* second, int64_t o, T* out) {
    const int64_t g = o / c.cog, size1 = c.k1 * c.k1, size2 = c.k2 * c.k2, size = c.k * c.k;
    out += o * c.cig * size;
    R::clear(out, c.cig * size);
    for (int64_t t = 0; t < c.cmg; ++t) {
      const T* left = second + (o * c.cmg + t) * size2;
      for (int64_t i = 0; i < c.cig; ++i) {
        const T* right = first + ((g * c.cmg + t) * c.cig + i) * size1;
        for (int64_t a = 0; a < size2; ++a) {
          T* corner = out + i * size + a / c.k2 * c.k + a % c.k2;
          for (int64_t row = 0; row < c.k1; ++row) R::axpy(corner + row * c.k, right + row * c.k1, left[a], c.k1);
        }
      }
    }
  }

  // grad of second[o]: [Cm/g, K2, K2].
  static void backward_second(const Composition& c, const T* grad, const T* first, int64_t o, T* grad_second) {
    const int64_t g = o / c.cog, size1 = c.k1 * c.k1, size2 = c.k2 * c.k2, size = c.k * c.k;
    for (int64_t t = 0; t < c.cmg; ++t) {
      for (int64_t a = 0; a < size2; ++a) {
        T total = 0;
        for (int64_t i = 0; i < c.cig; ++i) {
          const T* corner = grad + (o * c.cig + i) * size + a / c.k2 * c.k + a % c.k2;
          const T* right = first + ((g * c.cmg + t) * c.cig + i) * size1;
          for (int64_t row = 0; row < c.k1; ++row) total += R::dot(corner + row * c.k, right + row * c.k1, c.k1);
        }
        grad_second[(o * c.cmg + t) * size2 + a] = total;
      }
    }
  }

  // grad of first[channel]: [Ci/g, K1, K1].
  static void backward_first(const Composition& c, const T* grad, const T* second, int64_t channel, T* grad_first) {
    const int64_t g = channel / c.cmg, t = channel % c.cmg;
    const int64_t size1 = c.k1 * c.k1, size2 = c.k2 * c.k2, size = c.k * c.k;
    T* to = grad_first + channel * c.cig * size1;
    R::clear(to, c.cig * size1);
    for (int64_t o = g * c.cog; o < (g + 1) * c.cog; ++o) {
      const T* left = second + (o * c.cmg + t) * size2;
      for (int64_t i = 0; i < c.cig; ++i) {
        for (int64_t a = 0; a < size2; ++a) {
          const T* corner = grad + (o * c.cig + i) * size + a / c.k2 * c.k + a % c.k2;
          for (int64_t row = 0; row < c.k1; ++row)
            R::axpy(to + i * size1 + row * c.k1, corner + row * c.k, left[a], c.k1);
        }
      }
    }
  }
};

}  // namespace REPKERN_ISA_NAMESPACE
}  // namespace repkern
