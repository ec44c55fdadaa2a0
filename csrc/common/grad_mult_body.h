// The walk of an optimizer step over chunks of tensors, for one instruction set. M is never stored: along a stretch of
// a row it is one number, or a number and a pattern that repeats with the kernel's positions, and once a one is added;
// only vectors that cross the end of a stretch are put together element by element.
#pragma once
#include <algorithm>

#include "common/grad_mult.h"
#include "common/parallel.h"

namespace repkern {
namespace REPKERN_ISA_NAMESPACE {

template <class T>
class ChannelWalk {
 public:
  using V = Vec<T>;
  using Reg = typename V::Reg;
  static constexpr int W = V::width;
  static constexpr int64_t kMostTaps = 128;  // beyond, the stretches between two centres are long enough

  explicit ChannelWalk(const GradMultTensor& t)
      : t_(t),
        scale_(static_cast<const T*>(t.multiplier)),
        centre_(static_cast<const T*>(t.centre)),
        central_(t.kind == GradMultKind::centre),
        period_(t.taps * t.inner),
        middle_(t.taps / 2 * t.inner),
        periodic_(central_ && t.inner == 1 && t.taps > 1 && t.taps <= kMostTaps) {
    one_[W] = static_cast<T>(t.identity);
    if (!periodic_) return;
    for (int64_t j = 0; j < t.taps + W; ++j) pattern_[j] = static_cast<T>(j % t.taps == t.taps / 2);
  }

  // update.full(at, M) for W elements and update.part(at, count, M) for fewer, from `begin` to `end`.
  template <class Update>
  void run(int64_t begin, int64_t end, const Update& update) {
    o_ = begin / t_.row;
    r_ = begin % t_.row;
    for (int64_t at = begin; at < end;) {
      const int64_t stop = std::min(end, at + stretch());
      if (stop - at < W) {
        at += mixed(at, std::min<int64_t>(W, end - at), update);
      } else {
        at += periodic_ ? repeat(at, stop, update) : constant(at, stop, update);
      }
    }
  }

 private:
  int64_t diagonal() const { return t_.identity != 0 ? grad_mult_diagonal(t_, o_) : -1; }
  bool in_centre() const { return central_ && r_ % period_ / t_.inner == t_.taps / 2; }

  // How many elements from here on follow one rule.
  int64_t stretch() const {
    int64_t stop = t_.row;
    if (central_ && !periodic_ && t_.taps > 1) {
      const int64_t q = r_ % period_, start = r_ - q;
      const int64_t edge = q < middle_ ? middle_ : q < middle_ + t_.inner ? middle_ + t_.inner : period_ + middle_;
      stop = std::min(stop, start + edge);
    }
    return stop - r_;
  }

  // M of the vector at position r, with the identity's one where the diagonal at `one` passes through it.
  Reg with_one(Reg m, int64_t one, int64_t r) const {
    const uint64_t lane = static_cast<uint64_t>(one - r);
    return lane < W ? V::add(m, V::load(one_ + W - lane)) : m;
  }

  void advance(int64_t count) {
    r_ += count;
    if (r_ == t_.row) r_ = 0, ++o_;
  }

  template <class Update>
  int64_t constant(int64_t at, int64_t stop, const Update& update) {
    const Reg m = V::set1(in_centre() ? scale_[o_] + centre_[o_] : scale_[o_]);
    const int64_t one = diagonal();
    int64_t done = 0;
    for (; at + done + W <= stop; done += W) update.full(at + done, with_one(m, one, r_ + done));
    advance(done);
    return done;
  }

  template <class Update>
  int64_t repeat(int64_t at, int64_t stop, const Update& update) {
    const Reg scale = V::set1(scale_[o_]), centre = V::set1(centre_[o_]);
    const int64_t step = W % t_.taps, one = diagonal();
    int64_t done = 0, phase = r_ % t_.taps;
    for (; at + done + W <= stop; done += W) {
      update.full(at + done, with_one(V::fma(centre, V::load(pattern_ + phase), scale), one, r_ + done));
      phase += step;
      if (phase >= t_.taps) phase -= t_.taps;
    }
    advance(done);
    return done;
  }

  template <class Update>
  int64_t mixed(int64_t at, int64_t count, const Update& update) {
    T m[W] = {};
    int64_t q = r_ % period_, one = diagonal();
    for (int64_t j = 0; j < count; ++j) {
      m[j] = scale_[o_];
      if (central_ && q >= middle_ && q < middle_ + t_.inner) m[j] += centre_[o_];
      if (r_ == one) m[j] += static_cast<T>(t_.identity);
      if (++q == period_) q = 0;
      if (++r_ == t_.row) r_ = 0, ++o_, one = diagonal();
    }
    if (count == W) {
      update.full(at, V::load(m));
    } else {
      update.part(at, count, V::load(m));
    }
    return count;
  }

  const GradMultTensor& t_;
  const T *scale_, *centre_;
  const bool central_;
  const int64_t period_, middle_;
  const bool periodic_;
  int64_t o_ = 0, r_ = 0;
  T one_[2 * W] = {};
  T pattern_[kMostTaps + W];
};

// One chunk of one tensor.
template <class T, class Update>
void grad_mult_chunk(const GradMultTensor& t, int64_t begin, int64_t end, const Update& update) {
  using V = Vec<T>;
  constexpr int W = V::width;
  if (t.kind == GradMultKind::scale || t.kind == GradMultKind::centre) return ChannelWalk<T>(t).run(begin, end, update);
  const T* dense = static_cast<const T*>(t.multiplier);
  int64_t at = begin;
  if (t.kind == GradMultKind::none) {
    const typename V::Reg one = V::set1(1);
    for (; at + W <= end; at += W) update.full(at, one);
    if (at < end) update.part(at, end - at, one);
  } else {
    for (; at + W <= end; at += W) update.full(at, V::load(dense + at));
    if (at < end) update.part(at, end - at, V::load_n(dense + at, end - at));
  }
}

// body(X(), tensor, begin, end) for every chunk, X the type that the tensor's numbers are stored in.
template <class Body>
void for_each_chunk(const GradMultTable& table, int threads, const Body& body) {
  parallel_for(table.chunk_count, threads, [&](int64_t chunk, int) {
    const GradMultTensor t = grad_mult_tensor(table, table.chunks[2 * chunk]);
    const int64_t begin = table.chunks[2 * chunk + 1] * table.chunk_size;
    const int64_t end = std::min(t.size, begin + table.chunk_size);
    switch (t.dtype) {
      case DType::f32:
        return body(float(), t, begin, end);
      case DType::f64:
        return body(double(), t, begin, end);
      case DType::bf16:
        return body(Bf16(), t, begin, end);
      default:
        return body(F16(), t, begin, end);
    }
  });
}

}  // namespace REPKERN_ISA_NAMESPACE
}  // namespace repkern
