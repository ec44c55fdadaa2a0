// The points of F(m x m, 3x3) and the polynomials that follow from them; the same as repkern/ops/winograd_conv2d/
// matrices.py. Besides 0 and infinity the points come in pairs +-q, which share all but one product.
#pragma once
#include <cstdint>

namespace repkern {
namespace REPKERN_ISA_NAMESPACE {

template <int M>
struct Pairs;
template <>
struct Pairs<2> {
  static constexpr double q[1] = {1};
};
template <>
struct Pairs<4> {
  static constexpr double q[2] = {0.625, 1.5};
};
template <>
struct Pairs<6> {
  static constexpr double q[3] = {1, 2, 0.5};
};

// others[p][k]: the coefficient of x^2(n - k) in the product of (x^2 - q^2) over all n pairs but p; p = M / 2: over
// all. powers[p][i] = q_p^i.
template <int M>
struct Polynomials {
  static constexpr int H = M / 2;
  double others[H + 1][H + 1];
  double powers[H][M];

  constexpr Polynomials() : others{}, powers{} {
    for (int skip = 0; skip <= H; ++skip) {
      others[skip][0] = 1;
      for (int p = 0; p < H; ++p) {
        if (p == skip) continue;
        for (int k = H; k > 0; --k) others[skip][k] -= Pairs<M>::q[p] * Pairs<M>::q[p] * others[skip][k - 1];
      }
    }
    for (int p = 0; p < H; ++p) {
      powers[p][0] = 1;
      for (int i = 1; i < M; ++i) powers[p][i] = powers[p][i - 1] * Pairs<M>::q[p];
    }
  }
};

// G without its last row (0, 0, 1): `zero` is row 0, which has one entry; row[p] that of q_p; that of -q_p differs in
// the sign of its middle entry.
template <int M>
struct FilterRows {
  static constexpr int H = M / 2;
  double zero;
  double row[H][3];

  constexpr FilterRows() : zero(1), row{} {
    for (int p = 0; p < H; ++p) {
      const double q = Pairs<M>::q[p];
      double scale = 2 * q * q;
      for (int o = 0; o < H; ++o) {
        if (o != p) scale *= (q - Pairs<M>::q[o]) * (q + Pairs<M>::q[o]);
      }
      row[p][0] = 1 / scale;
      row[p][1] = q / scale;
      row[p][2] = q * q / scale;
      zero /= -q * q;
    }
  }
};

template <int M>
struct Filter {
  static constexpr int R = M + 2, P = R * R;
  double g[R][3];

  Filter() {
    double points[R - 1] = {0};
    for (int p = 0; p < M / 2; ++p) {
      points[2 * p + 1] = Pairs<M>::q[p];
      points[2 * p + 2] = -Pairs<M>::q[p];
    }
    for (int p = 0; p < R - 1; ++p) {
      double scale = 1;
      for (int q = 0; q < R - 1; ++q) {
        if (q != p) scale *= points[p] - points[q];
      }
      for (int i = 0; i < 3; ++i) g[p][i] = (i == 0 ? 1 : i == 1 ? points[p] : points[p] * points[p]) / scale;
    }
    g[R - 1][0] = g[R - 1][1] = 0;
    g[R - 1][2] = 1;
  }

  // u [P] = G w G^T of one kernel w [3, 3].
  void transform(const double w[9], double* u) const {
    double half[R][3];
    for (int a = 0; a < R; ++a) {
      for (int j = 0; j < 3; ++j) half[a][j] = g[a][0] * w[j] + g[a][1] * w[3 + j] + g[a][2] * w[6 + j];
    }
    for (int a = 0; a < R; ++a) {
      for (int b = 0; b < R; ++b) u[a * R + b] = half[a][0] * g[b][0] + half[a][1] * g[b][1] + half[a][2] * g[b][2];
    }
  }
};

}  // namespace REPKERN_ISA_NAMESPACE
}  // namespace repkern
