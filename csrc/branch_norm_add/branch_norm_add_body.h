// The kernels for one instruction set. Included by one file per set, which names it in REPKERN_ISA_NAMESPACE.
#pragma once
#include <type_traits>

#include "branch_norm_add/branch_norm_add_contiguous_body.h"
#include "branch_norm_add/branch_norm_add_isa.h"
#include "branch_norm_add/branch_norm_add_lanes_body.h"
#include "branch_norm_add/branch_norm_add_statistics_backward_body.h"

namespace repkern {
namespace REPKERN_ISA_NAMESPACE {
namespace {

constexpr int kSlices = 4;  // units of work a thread should have, where it matters
// What is written of at least this size is stored past the caches: it would not be found in them, and a line need not
// be read before it is overwritten.
constexpr int64_t kStreamBytes = 4 << 20;
constexpr int64_t kChannelsOfUnit = 8;  // neighbours in memory, so that the next channel can be fetched ahead

// Where everything of a call lies. With an empty workspace only its size is meaningful.
template <class X>
struct Job {
  using T = typename View<X>::T;
  using One = OneChannel<T>;
  using Each = EachChannel<T>;

  View<X> in;
  Contiguous<X> contiguous;
  ChannelsLast<X> lanes;
  Terms<X> terms;
  ChannelRows<T> slopes, offsets;  // of a gradient: see GradRun
  double* of_chunks =
      nullptr;             // contiguous: partial results of [branch][channel][chunk][2] or [channel][chunk][1 + Bn]
  T* of_blocks = nullptr;  // channels_last: rows of numbers per channel, [branch][block][3] or [block][1 + Bn]
  int threads;

  Job(Workspace& space, const NormParams& p, int threads_used)
      : in(p),
        contiguous(in),
        lanes(in),
        terms(space, in),
        slopes(space, in.branches, in.lanes),
        offsets(space, in.branches, in.lanes),
        threads(threads_used) {
    // Enough for the statistics of all branches (2 or 3 numbers each) and for the sums (1 + Bn).
    const int64_t numbers = ChannelsLast<X>::kStatisticsRows * in.branches;
    if (in.channels_last) {
      of_blocks = space.take<T>(numbers * lanes.cut.count * in.lanes);
    } else {
      of_chunks = space.take<double>(numbers * in.c * contiguous.cut.count);
    }
  }
  Job(const Job&) = delete;

  // --- a channel's numbers out of the partial results ---

  // n, mean and sum of squared differences of part `i` of a channel of branch b
  struct Part {
    double size, mean, squares;
  };
  Part part(int b, int64_t channel, int64_t i) const {
    if (!in.channels_last) {
      const double* two = of_chunks + ((b * in.c + channel) * contiguous.cut.count + i) * 2;
      return {static_cast<double>(contiguous.chunk(i).size()), two[0], two[1]};
    }
    const T* three = of_blocks + (b * lanes.cut.count + i) * ChannelsLast<X>::kStatisticsRows * in.lanes + channel;
    const double size = static_cast<double>(lanes.cut.size(i)), off = three[in.lanes];
    return {size, three[0] + off / size, three[2 * in.lanes] - off * off / size};
  }
  int64_t parts() const { return in.channels_last ? lanes.cut.count : contiguous.cut.count; }

  void finish_statistics(int b, int64_t channel) const {
    const double all = static_cast<double>(in.count());
    double mean = 0, squares = 0;
    for (int64_t i = 0; i < parts(); ++i) {
      const Part here = part(b, channel, i);
      mean += here.size * here.mean;
    }
    mean /= all;
    for (int64_t i = 0; i < parts(); ++i) {
      const Part here = part(b, channel, i);
      squares += here.squares + here.size * (here.mean - mean) * (here.mean - mean);
    }
    static_cast<T*>(in.p.branch[b].mean)[channel] = static_cast<T>(mean);
    static_cast<T*>(in.p.branch[b].var)[channel] = static_cast<T>(squares < 0 ? 0 : squares / all);
  }

  // Row r of *_sums before the division by the standard deviation.
  double total(int r, int64_t channel) const {
    double sum = 0;
    const int64_t rows = 1 + in.norms;
    for (int64_t i = 0; i < parts(); ++i)
      sum += in.channels_last ? static_cast<double>(of_blocks[(i * rows + r) * in.lanes + channel])
                              : of_chunks[(channel * contiguous.cut.count + i) * rows + r];
    return sum;
  }

  template <class Write>  // write(row, value)
  void finish_sums(int64_t channel, const Write& write) const {
    write(0, total(0, channel));
    for (int b = 0, row = 1; b < in.branches; ++b) {
      if (!in.normed(b)) continue;
      write(row, total(row, channel) * in.inverse(b, channel));
      ++row;
    }
  }

  void finish_backward(const NormGrads& g, int64_t channel) const {
    double sums[1 + kMostNormBranches];
    double count = static_cast<double>(in.count());
    if (g.sums == nullptr) {
      finish_sums(channel, [&](int row, double value) { sums[row] = value; });
    } else {
      for (int row = 0; row <= in.norms; ++row) sums[row] = static_cast<const T*>(g.sums)[row * in.c + channel];
      count = static_cast<const T*>(g.count)[0];
    }
    set_value_at(g.bias, in.p.param_dtype, channel, sums[0]);
    for (int b = 0, row = 1; b < in.branches; ++b) {
      if (!in.normed(b)) continue;
      set_value_at(g.weight, in.p.param_dtype, (row - 1) * in.c + channel, sums[row]);
      const double scale = terms.scale(b)[channel];
      slopes.at(b, channel) = static_cast<T>(-scale * in.inverse(b, channel) * (sums[row] / count));
      offsets.at(b, channel) = static_cast<T>(-scale * (sums[0] / count));
      ++row;
    }
  }

  // --- the order of work ---

  // Whether these maps, of which some may be null, are big enough and begin where streaming stores may.
  template <class Maps>
  bool streams(const Maps& maps) const {
    int64_t written = 0;
    for (const X* map : maps) {
      if (reinterpret_cast<uintptr_t>(map) % Io<X>::kStreamAlignment != 0) return false;
      written += map != nullptr;
    }
    return written * in.count() * in.c * static_cast<int64_t>(sizeof(X)) >= kStreamBytes;
  }

  // first(part) and second(part) over all parts of a channel, middle() in between. One thread takes a whole channel
  // where there are enough of them, so that the second reading finds the channel in its cache.
  template <class First, class Middle, class Second>
  void by_channel(const First& first, const Middle& middle, const Second& second) const {
    const int64_t chunks = contiguous.cut.count;
    if (threads <= 1 || in.c >= kSlices * threads) {
      const int64_t group = larger(lesser(in.c / (kSlices * threads), kChannelsOfUnit), 1);
      parallel_for(divide_up(in.c, group), threads, [&](int64_t unit, int) {
        for (int64_t channel = unit * group; channel < lesser((unit + 1) * group, in.c); ++channel) {
          for (int64_t i = 0; i < chunks; ++i) first(channel, i);
          middle(channel);
          for (int64_t i = chunks; i-- > 0;) second(channel, i);  // what was read last is in the cache for sure
        }
        Math<T>::fence();
      });
      return;
    }
    parallel_for(in.c * chunks, threads, [&](int64_t unit, int) { first(unit / chunks, unit % chunks); });
    parallel_for(in.c, threads, [&](int64_t channel, int) { middle(channel); });
    parallel_for(in.c * chunks, threads, [&](int64_t unit, int) {
      second(unit / chunks, unit % chunks);
      Math<T>::fence();
    });
  }

  template <class First, class Middle, class Second>
  void by_block(const First& first, const Middle& middle, const Second& second) const {
    const int64_t slice = larger(divide_up(in.c, kSlices * threads), 16);
    parallel_for(lanes.cut.count, threads, [&](int64_t block, int) { first(block); });
    parallel_for(divide_up(in.c, slice), threads, [&](int64_t unit, int) {
      for (int64_t channel = unit * slice; channel < lesser((unit + 1) * slice, in.c); ++channel) middle(channel);
    });
    parallel_for(lanes.cut.count, threads, [&](int64_t block, int) {
      second(lanes.cut.count - 1 - block);  // what was read last may still be in a cache
      Math<T>::fence();
    });
  }

  // --- the passes ---

  void chunk_statistics(int64_t channel, int64_t i) const {
    for (int b = 0; b < in.branches; ++b) {
      if (in.mode[b] == NormMode::batch)
        contiguous.statistics(b, channel, i, of_chunks + ((b * in.c + channel) * contiguous.cut.count + i) * 2);
    }
  }
  void block_statistics(int64_t block) const {
    const int64_t size = ChannelsLast<X>::kStatisticsRows * in.lanes;
    for (int b = 0; b < in.branches; ++b) {
      if (in.mode[b] == NormMode::batch) lanes.statistics(b, block, of_blocks + (b * lanes.cut.count + block) * size);
    }
  }
  void finish_all_statistics(int64_t channel) const {
    for (int b = 0; b < in.branches; ++b) {
      if (in.mode[b] == NormMode::batch) finish_statistics(b, channel);
    }
  }

  void statistics() const {
    const auto middle = [&](int64_t channel) { finish_all_statistics(channel); };
    if (in.channels_last) return by_block([&](int64_t block) { block_statistics(block); }, middle, [](int64_t) {});
    by_channel([&](int64_t channel, int64_t i) { chunk_statistics(channel, i); }, middle, [](int64_t, int64_t) {});
  }

  template <Known K>
  void forward(void* out) const {
    X* to = static_cast<X*>(out);
    const X* maps[] = {to};
    const bool stream = streams(maps);
    const auto middle = [&](int64_t channel) {
      finish_all_statistics(channel);
      terms.prepare(in, channel);
    };
    if (in.channels_last) {
      const auto run = lanes.run_of(terms);
      return by_block([&](int64_t block) { block_statistics(block); }, middle,
                      [&](int64_t block) { lanes.template forward<K>(run, block, to, stream); });
    }
    by_channel([&](int64_t channel, int64_t i) { chunk_statistics(channel, i); }, middle,
               [&](int64_t channel, int64_t i) {
                 contiguous.template forward<K>(contiguous.run_of(terms, channel), channel, i, to, stream);
               });
  }

  void prepare_all() const {
    for (int64_t channel = 0; channel < in.c; ++channel) terms.prepare(in, channel);
  }

  template <Known K>
  void block_sums(int64_t block, const X* grad) const {
    lanes.template sums<K>(lanes.run_of(terms), block, grad, of_blocks + block * (1 + in.norms) * in.lanes);
  }
  template <Known K>
  void chunk_sums(int64_t channel, int64_t i, const X* grad) const {
    double* to = of_chunks + (channel * contiguous.cut.count + i) * (1 + in.norms);
    contiguous.template sums<K>(contiguous.run_of(terms, channel), channel, i, grad, to);
  }

  template <Known K>
  void sums(const void* grad_out, void* out) const {
    const X* grad = static_cast<const X*>(grad_out);
    T* to = static_cast<T*>(out);
    prepare_all();
    const auto middle = [&](int64_t channel) {
      finish_sums(channel, [&](int row, double value) { to[row * in.c + channel] = static_cast<T>(value); });
    };
    if (in.channels_last) return by_block([&](int64_t block) { block_sums<K>(block, grad); }, middle, [](int64_t) {});
    by_channel([&](int64_t channel, int64_t i) { chunk_sums<K>(channel, i, grad); }, middle, [](int64_t, int64_t) {});
  }

  template <class Numbers>
  GradRun<X, Numbers> grad_run(const Numbers& slope, const Numbers& offset, const NormGrads& g) const {
    GradRun<X, Numbers> to{slope, offset, static_cast<const X*>(g.out), {}, static_cast<X*>(g.as_is)};
    for (int b = 0; b < in.branches; ++b) to.y[b] = in.normed(b) ? in.grad(b) : nullptr;
    return to;
  }

  template <Known K>
  void backward(const NormGrads& g) const {
    const X* grad = static_cast<const X*>(g.out);
    const bool own = g.sums == nullptr;
    const X* maps[kMostNormBranches + 1] = {static_cast<const X*>(g.as_is)};
    for (int b = 0; b < in.branches; ++b) maps[1 + b] = in.normed(b) ? in.grad(b) : nullptr;
    const bool stream = streams(maps);
    prepare_all();
    const auto middle = [&](int64_t channel) { finish_backward(g, channel); };
    if (in.channels_last) {
      const auto run = lanes.run_of(terms);
      const auto to = grad_run(Each(slopes, 0), Each(offsets, 0), g);
      return by_block(
          [&](int64_t block) {
            if (own) block_sums<K>(block, grad);
          },
          middle, [&](int64_t block) { lanes.template backward<K>(run, to, block, stream); });
    }
    by_channel(
        [&](int64_t channel, int64_t i) {
          if (own) chunk_sums<K>(channel, i, grad);
        },
        middle,
        [&](int64_t channel, int64_t i) {
          const auto to = grad_run(One(slopes, 0, in.branches, channel), One(offsets, 0, in.branches, channel), g);
          contiguous.template backward<K>(contiguous.run_of(terms, channel), to, channel, i, stream);
        });
  }
};

// function(Job of the maps' type), with all of a call's memory.
template <class Function>
size_t with_job(const NormParams& p, void* workspace, int threads, const Function& function) {
  Workspace space(workspace);
  switch (p.dtype) {
    case DType::f64:
      function(Job<double>(space, p, threads));
      break;
    case DType::f32:
      function(Job<float>(space, p, threads));
      break;
    case DType::bf16:
      function(Job<Bf16>(space, p, threads));
      break;
    default:
      function(Job<F16>(space, p, threads));
  }
  return space.used();
}

template <Known K>
using KnownTag = std::integral_constant<Known, K>;

// function(KnownTag): with none or relu known at compile time.
template <class Function>
void with_activation(const NormParams& p, const Function& function) {
  switch (static_cast<NormActivation>(p.activation)) {
    case NormActivation::none:
      return function(KnownTag<Known::none>());
    case NormActivation::relu:
      return function(KnownTag<Known::relu>());
    default:
      return function(KnownTag<Known::no>());
  }
}

}  // namespace

size_t branch_norm_workspace(const NormParams& p, int threads) {
  return with_job(p, nullptr, threads, [](const auto&) {});
}

Status branch_norm_forward(const NormParams& p, void* out, void* workspace, int threads) {
  with_job(p, workspace, threads, [&](const auto& job) {
    with_activation(p, [&](auto known) { job.template forward<decltype(known)::value>(out); });
  });
  return nullptr;
}

Status branch_norm_backward(const NormParams& p, const NormGrads& g, void* workspace, int threads) {
  with_job(p, workspace, threads, [&](const auto& job) {
    with_activation(p, [&](auto known) { job.template backward<decltype(known)::value>(g); });
  });
  return nullptr;
}

Status branch_norm_sums(const NormParams& p, const void* out, void* sums, void* workspace, int threads) {
  with_job(p, workspace, threads, [&](const auto& job) {
    with_activation(p, [&](auto known) { job.template sums<decltype(known)::value>(out, sums); });
  });
  return nullptr;
}

Status branch_norm_statistics(const NormParams& p, void* workspace, int threads) {
  with_job(p, workspace, threads, [](const auto& job) { job.statistics(); });
  return nullptr;
}

Status branch_norm_statistics_backward(const NormParams& p, const void* grad_mean, const void* grad_var, int threads) {
  switch (p.dtype) {
    case DType::f64:
      StatisticsBackward<double>(p, grad_mean, grad_var).run(threads);
      break;
    case DType::f32:
      StatisticsBackward<float>(p, grad_mean, grad_var).run(threads);
      break;
    case DType::bf16:
      StatisticsBackward<Bf16>(p, grad_mean, grad_var).run(threads);
      break;
    default:
      StatisticsBackward<F16>(p, grad_mean, grad_var).run(threads);
  }
  return nullptr;
}

}  // namespace REPKERN_ISA_NAMESPACE
}  // namespace repkern
