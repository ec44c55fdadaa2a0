// The points of F(m x m, 3x3) and the polynomials that follow from them; the same as repkern/ops/winograd_conv2d/
// matrices.py: 0 where their number is even, then pairs +-q, which share all but one product, then infinity.
#pragma once
#include <cstdint>

namespace repkern {
namespace REPKERN_ISA_NAMESPACE {

// Of a side of a tile of M outputs. With stride 2 the even inputs are a convolution with two taps, by Winograd's
// algorithm, and the odd ones one product each: docs/ops/winograd_conv2d.md.
template <int M, int kStride>
struct Side {
  static constexpr int kPoints = kStride == 1 ? M + 2 : M + 1;     // of the algorithm, with infinity
  static constexpr int kPatch = kStride == 1 ? M + 2 : 2 * M + 1;  // inputs, and positions where products are formed
  static constexpr int kWeights = M + 2;                           // different ones among those of the positions
  static constexpr int kStep = M * kStride;                        // from patch to patch
  // The weight of a position: all odd inputs have the last one.
  static constexpr int weight(int position) { return position < kPoints ? position : kPoints; }
};

template <int N>
struct Pairs;
template <>
struct Pairs<4> {
  static constexpr double q[1] = {1};
};
template <>
struct Pairs<5> {  // of stride 2 only
  static constexpr double q[2] = {0.375, 1.25};
};
template <>
struct Pairs<6> {
  static constexpr double q[2] = {0.625, 1.5};
};
template <>
struct Pairs<7> {
  static constexpr double q[3] = {0.375, 0.875, 1.75};
};
template <>
struct Pairs<8> {
  static constexpr double q[3] = {1, 2, 0.5};
};

template <int N>
struct PointCounts {
  static constexpr int kZeros = N % 2 == 0 ? 1 : 0, kPairs = (N - 1) / 2;
};

// others[p][k]: the coefficient of x^2(n - k) in the product of (x^2 - q^2) over all n pairs but p; p = kPairs: over
// all. powers[p][i] = q_p^i.
template <int N>
struct Polynomials {
  static constexpr int H = PointCounts<N>::kPairs;
  double others[H + 1][H + 1];
  double powers[H][N];

  constexpr Polynomials() : others{}, powers{} {
    for (int skip = 0; skip <= H; ++skip) {
      others[skip][0] = 1;
      for (int p = 0; p < H; ++p) {
        if (p == skip) continue;
        for (int k = H; k > 0; --k) others[skip][k] -= Pairs<N>::q[p] * Pairs<N>::q[p] * others[skip][k - 1];
      }
    }
    for (int p = 0; p < H; ++p) {
      powers[p][0] = 1;
      for (int i = 1; i < N; ++i) powers[p][i] = powers[p][i - 1] * Pairs<N>::q[p];
    }
  }
};

// G of up to three taps without its last row, that of infinity: `zero` is that of 0, which has one entry; row[p] that
// of q_p; that of -q_p differs in the sign of its middle entry, or, where there is no 0, of the others.
struct PairRow {
  double entry[3];
};
template <int N>
struct FilterRows {
  static constexpr int H = PointCounts<N>::kPairs;
  double zero;
  PairRow row[H];

  constexpr FilterRows() : zero(1), row{} {
    for (int p = 0; p < H; ++p) {
      const double q = Pairs<N>::q[p];
      double scale = PointCounts<N>::kZeros ? 2 * q * q : 2 * q;
      for (int o = 0; o < H; ++o) {
        if (o != p) scale *= (q - Pairs<N>::q[o]) * (q + Pairs<N>::q[o]);
      }
      row[p].entry[0] = 1 / scale;
      row[p].entry[1] = q / scale;
      row[p].entry[2] = q * q / scale;
      zero /= -q * q;
    }
  }
};

// G of stride 1.
template <int M>
struct Filter {
  static constexpr int R = M + 2, P = R * R;
  double g[R][3];

  Filter() {
    constexpr int kZeros = PointCounts<R>::kZeros;
    double points[R - 1] = {0};
    for (int p = 0; p < PointCounts<R>::kPairs; ++p) {
      points[2 * p + kZeros] = Pairs<R>::q[p];
      points[2 * p + kZeros + 1] = -Pairs<R>::q[p];
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
