// The kernels for one instruction set. Included by one file per set, which names it in REPKERN_ISA_NAMESPACE.
#pragma once
#include "orepa_squeeze/orepa_squeeze_backward_body.h"
#include "orepa_squeeze/orepa_squeeze_forward_body.h"
#include "orepa_squeeze/orepa_squeeze_narrow_body.h"

namespace repkern {
namespace REPKERN_ISA_NAMESPACE {
namespace {

constexpr int64_t kNarrowBlock = 8;  // output channels in a unit of work of a narrow layer
constexpr int kSteps = 4;            // most parallel steps a pass has

// A layer with its place in the units of work of every step.
template <class Wide>
struct Job {
  Wide plan;
  bool narrow;
  int64_t start[kSteps];
};

// Groups so small that packing costs more than it gains: along the positions fewer lanes are empty.
template <class T>
bool is_narrow(const View<T>& in) {
  return 2 * in.cig <= Vec<T>::width && in.cig * in.cmg <= 4 * Vec<T>::width;
}

// The jobs of all layers and the scratch of one thread. With an empty workspace only its size is meaningful.
template <class T, class Wide>
struct Schedule {
  Job<Wide>* jobs = nullptr;
  T* scratch = nullptr;
  int64_t scratch_size = 0;
  int64_t total[kSteps] = {};
  int count = 0;

  // make(l) -> Wide; units(job, step), scratch_of(job) -> int64_t
  template <class Make, class Units, class Scratch>
  Schedule(Workspace& space, int layers, int threads, const Make& make, const Units& units, const Scratch& scratch_of)
      : jobs(space.take<Job<Wide>>(layers)), count(layers) {
    for (int l = 0; l < layers; ++l) {
      Job<Wide> job{make(l), false, {}};
      job.narrow = is_narrow(job.plan.in);
      if (!job.narrow) job.plan.take(space);
      for (int step = 0; step < kSteps; ++step) {
        job.start[step] = total[step];
        total[step] += units(job, step);
      }
      scratch_size = larger(scratch_size, round_up(scratch_of(job), 64));
      if (jobs != nullptr) jobs[l] = job;
    }
    scratch = space.take<T>(scratch_size * threads);
  }

  // The layer that owns a unit of a step.
  int owner(int step, int64_t unit) const {
    int low = 0, high = count;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (jobs[middle].start[step] <= unit ? low : high) = middle;
    }
    return low;
  }

  // body(job, l, unit within the layer, scratch)
  template <class Body>
  void run(int step, int threads, const Body& body) const {
    parallel_for(total[step], threads, [&](int64_t unit, int thread) {
      const int l = owner(step, unit);
      body(jobs[l], l, unit - jobs[l].start[step], scratch + thread * scratch_size);
    });
  }
};

template <class T>
Schedule<T, ForwardPlan<T>> schedule_forward(Workspace& space, const SqueezeLayer* layers, int count, int threads) {
  using Plan = ForwardPlan<T>;
  return Schedule<T, Plan>(
      space, count, threads, [&](int l) { return Plan(View<T>(layers[l]), threads); },
      [](const Job<Plan>& job, int step) -> int64_t {
        if (step == 0) return job.narrow ? 0 : job.plan.pack_units();
        if (step == 1) return job.narrow ? divide_up(job.plan.in.co, kNarrowBlock) : job.plan.units();
        return 0;
      },
      [](const Job<Plan>& job) { return job.narrow ? Narrow<T>::forward_scratch(job.plan.in) : job.plan.scratch(); });
}

template <class T>
void forward(const SqueezeLayer* layers, void* const* out, int count, DType out_dtype, bool channels_last,
             void* workspace, int threads) {
  using Plan = ForwardPlan<T>;
  Workspace space(workspace);
  const auto schedule = schedule_forward<T>(space, layers, count, threads);
  schedule.run(0, threads, [](const Job<Plan>& job, int, int64_t unit, T*) { job.plan.pack(unit); });
  schedule.run(1, threads, [&](const Job<Plan>& job, int l, int64_t unit, T* scratch) {
    if (!job.narrow) return job.plan.run(unit, out[l], out_dtype, channels_last, scratch);
    const int64_t end = lesser((unit + 1) * kNarrowBlock, job.plan.in.co);
    for (int64_t o = unit * kNarrowBlock; o < end; ++o)
      Narrow<T>::forward(job.plan.in, o, out[l], out_dtype, channels_last, scratch);
  });
}

template <class T>
Schedule<T, BackwardPlan<T>> schedule_backward(Workspace& space, const SqueezeLayer* layers, const SqueezeGrads* grads,
                                               int count, int threads) {
  using Plan = BackwardPlan<T>;
  return Schedule<T, Plan>(
      space, count, threads,
      [&](int l) {
        return Plan(View<T>(layers[l]), GradView<T>(grads == nullptr ? SqueezeGrads{} : grads[l]), threads);
      },
      [](const Job<Plan>& job, int step) -> int64_t {
        const Plan& p = job.plan;
        if (job.narrow) {
          if (step == 1) return divide_up(p.in.co, kNarrowBlock);
          if (step == 2) return p.in.project == nullptr ? 0 : p.in.groups * p.in.cig;
          return step == 3 && p.in.expand != nullptr ? p.in.groups * p.in.cmg : 0;
        }
        const int64_t units[kSteps] = {p.pack_units(), p.pass_units(), p.expand_units(), p.reduce_units()};
        return units[step];
      },
      [](const Job<Plan>& job) { return job.narrow ? int64_t(0) : job.plan.scratch(); });
}

template <class T>
void backward(const SqueezeLayer* layers, const SqueezeGrads* grads, int count, void* workspace, int threads) {
  using Plan = BackwardPlan<T>;
  Workspace space(workspace);
  const auto schedule = schedule_backward<T>(space, layers, grads, count, threads);
  schedule.run(0, threads, [](const Job<Plan>& job, int, int64_t unit, T*) { job.plan.pack(unit); });
  schedule.run(1, threads, [](const Job<Plan>& job, int, int64_t unit, T* scratch) {
    if (!job.narrow) return job.plan.pass(unit, scratch);
    const int64_t end = lesser((unit + 1) * kNarrowBlock, job.plan.in.co);
    for (int64_t o = unit * kNarrowBlock; o < end; ++o) Narrow<T>::backward_output(job.plan.in, job.plan.to, o);
  });
  schedule.run(2, threads, [](const Job<Plan>& job, int, int64_t unit, T* scratch) {
    if (!job.narrow) return job.plan.expand(unit, scratch);
    Narrow<T>::backward_depthwise(job.plan.in, job.plan.to, unit);
  });
  schedule.run(3, threads, [](const Job<Plan>& job, int, int64_t unit, T* scratch) {
    if (!job.narrow) return job.plan.reduce_range(unit, scratch);
    Narrow<T>::backward_reduce(job.plan.in, job.plan.to, unit);
  });
}

template <class T>
size_t forward_size(const SqueezeLayer* layers, int count, int threads) {
  Workspace space(nullptr);
  schedule_forward<T>(space, layers, count, threads);
  return space.used();
}

template <class T>
size_t backward_size(const SqueezeLayer* layers, int count, int threads) {
  Workspace space(nullptr);
  schedule_backward<T>(space, layers, nullptr, count, threads);
  return space.used();
}

}  // namespace

size_t squeeze_forward_workspace(const SqueezeLayer* layers, int count, DType dtype, int threads) {
  return dtype == DType::f64 ? forward_size<double>(layers, count, threads)
                             : forward_size<float>(layers, count, threads);
}

Status squeeze_forward(const SqueezeLayer* layers, void* const* out, int count, DType dtype, DType out_dtype,
                       bool channels_last, void* workspace, int threads) {
  if (dtype == DType::f64) {
    forward<double>(layers, out, count, out_dtype, channels_last, workspace, threads);
  } else {
    forward<float>(layers, out, count, out_dtype, channels_last, workspace, threads);
  }
  return nullptr;
}

size_t squeeze_backward_workspace(const SqueezeLayer* layers, int count, DType dtype, int threads) {
  return dtype == DType::f64 ? backward_size<double>(layers, count, threads)
                             : backward_size<float>(layers, count, threads);
}

Status squeeze_backward(const SqueezeLayer* layers, const SqueezeGrads* grads, int count, DType dtype, void* workspace,
                        int threads) {
  if (dtype == DType::f64) {
    backward<double>(layers, grads, count, workspace, threads);
  } else {
    backward<float>(layers, grads, count, workspace, threads);
  }
  return nullptr;
}

}  // namespace REPKERN_ISA_NAMESPACE
}  // namespace repkern
