// A fiber: a stack of its own and a switch to and from the scheduler. AddressSanitizer is told about every switch.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdlib>
#include <new>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define SIMT_ASAN 1
#else
#define SIMT_ASAN 0
#endif

namespace simt {

#if defined(__x86_64__)
// Saves the callee-saved registers on the current stack, stores its pointer in *save and continues on `to`.
extern "C" void repkern_simt_switch(void** save, void* to);
// Weak: every translation unit that includes this header defines it, the linker keeps one.
asm(R"(
.pushsection .text
.weak repkern_simt_switch
.hidden repkern_simt_switch
.type repkern_simt_switch,@function
repkern_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size repkern_simt_switch,.-repkern_simt_switch
.popsection
)");
#endif

// Stack memory with a page below it that faults: a kernel with too many locals stops instead of corrupting another.
class Stack {
 public:
  static constexpr size_t kBytes = 256 << 10;

  Stack() {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    mapped_ = kBytes + page;
    void* memory = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    base_ = static_cast<char*>(memory);
    mprotect(base_, page, PROT_NONE);
    bottom_ = base_ + page;
  }
  ~Stack() {
    if (base_ != nullptr) munmap(base_, mapped_);
  }
  Stack(Stack&& other) noexcept : base_(other.base_), bottom_(other.bottom_), mapped_(other.mapped_) {
    other.base_ = nullptr;
  }
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;

  char* bottom() const { return bottom_; }
  char* top() const { return bottom_ + kBytes; }

 private:
  char* base_;
  char* bottom_;
  size_t mapped_;
};

// The scheduler's side of every switch. One per process: launches take turns (executor.h holds a lock).
struct Home {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  void* fake_stack = nullptr;
  const void* bottom = nullptr;
  size_t size = 0;
};
inline Home home;

class Fiber {
 public:
  // Makes the next enter() begin at `main`, which must never return: it ends with leave(true).
  void start(void (*main)()) {
#if SIMT_ASAN
    // Whatever ran here before may have been abandoned in the middle of a frame.
    ASAN_UNPOISON_MEMORY_REGION(stack_.bottom(), Stack::kBytes);
#endif
    fake_stack_ = nullptr;
#if defined(__x86_64__)
    constexpr int kSavedRegisters = 6;
    void** at = reinterpret_cast<void**>(stack_.top() - 16);
    *--at = nullptr;  // the return address of `main`
    *--at = reinterpret_cast<void*>(main);
    for (int i = 0; i < kSavedRegisters; ++i) *--at = nullptr;
    stack_pointer_ = at;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_.bottom();
    context_.uc_stack.ss_size = Stack::kBytes;
    context_.uc_link = nullptr;
    makecontext(&context_, main, 0);
#endif
  }

  // Scheduler -> fiber; returns when the fiber leaves.
  void enter() {
#if SIMT_ASAN
    __sanitizer_start_switch_fiber(&home.fake_stack, stack_.bottom(), Stack::kBytes);
#endif
#if defined(__x86_64__)
    repkern_simt_switch(&home.stack_pointer, stack_pointer_);
#else
    swapcontext(&home.context, &context_);
#endif
#if SIMT_ASAN
    __sanitizer_finish_switch_fiber(home.fake_stack, nullptr, nullptr);
#endif
  }

  // Fiber -> scheduler; returns at the next enter().
  void leave(bool for_good) {
#if SIMT_ASAN
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_stack_, home.bottom, home.size);
#endif
    (void)for_good;
#if defined(__x86_64__)
    repkern_simt_switch(&stack_pointer_, home.stack_pointer);
#else
    swapcontext(&context_, &home.context);
#endif
    arrived();
  }

  // The first thing after a switch into the fiber.
  void arrived() {
#if SIMT_ASAN
    __sanitizer_finish_switch_fiber(fake_stack_, &home.bottom, &home.size);
#endif
  }

 private:
  Stack stack_;
#if defined(__x86_64__)
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
  void* fake_stack_ = nullptr;
};

}  // namespace simt
