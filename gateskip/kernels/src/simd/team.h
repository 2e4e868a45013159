// Threads that work on one call and wait for each other.
//
// OpenMP's barrier spins for milliseconds. Where another process has a core, the thread that is waited for does not run,
// and the one that spins has the core that it could run on: beside another run's two threads a token took fifty to a
// hundred times as long. Here a thread spins for about as long as threads of an idle machine are apart, and then sleeps.
#pragma once
#include <atomic>
#include <cstdint>

#include "target.h"
#ifdef _OPENMP
#include <omp.h>
#else
#include <chrono>
#endif
#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <thread>
#endif

#ifndef _OPENMP  // one thread, where the compiler has none
inline int omp_get_thread_num() { return 0; }
inline int omp_get_num_threads() { return 1; }
inline double omp_get_wtime() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}
#endif

class Team {
 public:
  // Return once all `size` threads have called this
  void wait(int size) {
    const uint32_t turn = turn_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
      arrived_.store(0, std::memory_order_relaxed);
      turn_.store(turn + 1);
      if (asleep_.load()) wake();
      return;
    }
    for (int i = 0; i < SPINS; i++) {
      if (turn_.load(std::memory_order_acquire) != turn) return;
      relax();
    }
    asleep_.fetch_add(1);
    while (turn_.load() == turn) sleep(turn);
    asleep_.fetch_sub(1);
  }

 private:
  static constexpr int SPINS = 1000;  // about 40 us

  // Leave the core to its other threads for a moment
  static void relax() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(GATESKIP_NEON)
    asm volatile("isb" ::: "memory");  // `yield` returns at once on most cores
#endif
  }

#ifdef __linux__
  void sleep(uint32_t turn) { syscall(SYS_futex, &turn_, FUTEX_WAIT_PRIVATE, turn, nullptr); }
  void wake() { syscall(SYS_futex, &turn_, FUTEX_WAKE_PRIVATE, INT32_MAX); }
#else
  void sleep(uint32_t) { std::this_thread::yield(); }
  void wake() {}
#endif

  std::atomic<int> arrived_{0};
  std::atomic<uint32_t> turn_{0};  // counts the times that all were here
  std::atomic<int> asleep_{0};
};

// The calling thread's team, and how many it is
struct Membership {
  Team* team = nullptr;
  int size = 1;
};
inline thread_local Membership membership;

inline void wait_for_all() {
  if (membership.size > 1) membership.team->wait(membership.size);
}
