// Memory that kernels use again, and what they ask of it ahead of time.
#pragma once
#include <cstddef>
#include <new>

#include "../api.h"
#include "target.h"

// Memory that calls use again: a pass asks for megabytes, and what the system gives anew has to be cleared first.
struct Arena {
  char* start = nullptr;
  size_t size = 0;
  ~Arena() { release(); }
  // At least `bytes`, from the beginning of a cache line on; what was there before is gone.
  char* reserve(size_t bytes) {
    if (bytes <= size) return start;
    release();
    start = static_cast<char*>(::operator new(bytes, std::align_val_t(64)));
    size = bytes;
    return start;
  }

 private:
  void release() {
    if (start) ::operator delete(start, std::align_val_t(64));
    start = nullptr, size = 0;
  }
};

// Parts of some memory, one after the other, each from the beginning of a cache line on. Without memory it
// counts what they would take.
struct Slices {
  char* start;
  size_t used = 0;
  template <class T>
  T* take(size_t count) {
    T* taken = start ? reinterpret_cast<T*>(start + used) : nullptr;
    used = (used + count * sizeof(T) + 63) / 64 * 64;
    return taken;
  }
};

#ifdef GATESKIP_SIMD
constexpr int AHEAD = 8192;  // bytes: what the processor fetches ahead by itself ends with a page of 4 KiB

// Ask for a cache line; no function, which would change what compilers make of the loops around it
#ifdef GATESKIP_NEON
#define ASK_FOR(p) __builtin_prefetch(p, 0, 3)
#else
#define ASK_FOR(p) _mm_prefetch(p, _MM_HINT_T0)
#endif

// What is read next is asked for ahead of time: two cores read memory faster than they ask for it.
static inline void prefetch(const void* here, int64_t ahead) {
  ASK_FOR(static_cast<const char*>(here) + ahead);
}

// Fetch what a stream of keys or values will reach soon, as much of it as `count` numbers at p are
template <class T>
static inline void fetch_ahead(const T* p, int count) {
  const char* begin = reinterpret_cast<const char*>(p) + AHEAD;
  for (int i = 0; i < count * int(sizeof(T)); i += 64) ASK_FOR(begin + i);
}
#endif
