// What lies between the matrix products of a prefill: norms, shortcuts, rotary positions, softmax and activations.
#include "../simd/memory.h"
#include "../simd/rows.h"

#ifdef GATESKIP_SIMD
#include <vector>

namespace {

// Rows of activations that share one pass over a shortcut's weights, and vectors of columns beside each other: as
// many sums as registers hold
#ifdef __AVX512F__
constexpr int SHORTCUT_ROWS = 8, ACROSS = 2;
#else
constexpr int SHORTCUT_ROWS = 4, ACROSS = 2;
#endif

// out [SHORTCUT_ROWS, n] = start [n] (or nothing) + x [SHORTCUT_ROWS, k] @ w [k, n]: `across` vectors of columns, from
// column `c` on
template <class V, int across>
void product_columns(const float* x, int k, const Float16* w, int n, const float* start, float* out, int c) {
  constexpr int lanes = sizeof(V) / sizeof(float);
  V total[SHORTCUT_ROWS][across];
#pragma GCC unroll 8
  for (int r = 0; r < SHORTCUT_ROWS; r++)
#pragma GCC unroll 8
    for (int v = 0; v < across; v++) total[r][v] = start ? load_as<V>(start + c + lanes * v) : V{};
  for (int i = 0; i < k; i++) {
    V weights[across];
#pragma GCC unroll 8
    for (int v = 0; v < across; v++) weights[v] = load_as<V>(w + int64_t(i) * n + c + lanes * v);
#pragma GCC unroll 8
    for (int r = 0; r < SHORTCUT_ROWS; r++) {
      const V factor = all<V>(x[int64_t(r) * k + i]);
#pragma GCC unroll 8
      for (int v = 0; v < across; v++) total[r][v] = fma(factor, weights[v], total[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < SHORTCUT_ROWS; r++)
#pragma GCC unroll 8
    for (int v = 0; v < across; v++) store(out + int64_t(r) * n + c + lanes * v, total[r][v]);
}

// All columns of it, n a multiple of 8
void product(const float* x, int k, const Float16* w, int n, const float* start, float* out) {
  constexpr int lanes = sizeof(Widest) / sizeof(float);
  int c = 0;
  for (; c + ACROSS * lanes <= n; c += ACROSS * lanes) product_columns<Widest, ACROSS>(x, k, w, n, start, out, c);
  for (; c + lanes <= n; c += lanes) product_columns<Widest, 1>(x, k, w, n, start, out, c);
  for (; c < n; c += 8) product_columns<F32X8, 1>(x, k, w, n, start, out, c);
}

}  // namespace

extern "C" {

void gateskip_norm(const void* x, const Norm* norm, int64_t rows, int32_t width, int32_t bf16, void* out,
                   const float* gate, float bias, float* logits, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    auto norm_one = [&](auto* from, auto* to) {
      norm_row(*norm, from, width, to);
      if (gate) logits[r] = dot(gate, to, width) + bias;
    };
    if (bf16) norm_one(static_cast<const uint16_t*>(x) + r * width, static_cast<uint16_t*>(out) + r * width);
    else norm_one(static_cast<const float*>(x) + r * width, static_cast<float*>(out) + r * width);
  }
}

void gateskip_add_rows(void* hidden, const int64_t* places, int64_t count, int32_t width, int32_t bf16,
                       const void* added, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < count; r++) {
    auto add = [&](auto* to, const auto* from) {
      for (int i = 0; i < width; i += 8) store(to + i, load(to + i) + load(from + i));
    };
    const int64_t to = places[r] * width, from = r * width;
    if (bf16) add(static_cast<uint16_t*>(hidden) + to, static_cast<const uint16_t*>(added) + from);
    else add(static_cast<float*>(hidden) + to, static_cast<const float*>(added) + from);
  }
}

void gateskip_shortcut(void* hidden, const void* x, int32_t bf16, const int64_t* places, int64_t count,
                       int32_t width, const uint16_t* down, const uint16_t* up, const float* bias, int32_t rank,
                       int32_t threads) {
  auto run = [&](auto* to, const auto* from) {
#pragma omp parallel num_threads(threads)
    {
      std::vector<float> inputs(SHORTCUT_ROWS * size_t(width)), sums(SHORTCUT_ROWS * size_t(width));
      std::vector<float> low(SHORTCUT_ROWS * size_t(rank));
#pragma omp for schedule(static)
      for (int64_t first = 0; first < count; first += SHORTCUT_ROWS) {
        const int real = int(std::min<int64_t>(SHORTCUT_ROWS, count - first));  // rows beyond them are left over
        for (int r = 0; r < real; r++)
          for (int i = 0; i < width; i += 8)
            store(inputs.data() + r * width + i, load(from + places[first + r] * width + i));
        product(inputs.data(), width, as_float16(down), rank, nullptr, low.data());
        product(low.data(), rank, as_float16(up), width, bias, sums.data());
        for (int r = 0; r < real; r++) {
          auto* row = to + places[first + r] * width;
          for (int i = 0; i < width; i += 8) store(row + i, load(row + i) + load(sums.data() + r * width + i));
        }
      }
    }
  };
  if (bf16) run(static_cast<uint16_t*>(hidden), static_cast<const uint16_t*>(x));
  else run(static_cast<float*>(hidden), static_cast<const float*>(x));
}

void gateskip_rotate(void* x, int32_t bf16, int64_t rows, int32_t heads, int32_t width, int32_t rotary_dim,
                     const void* cos, const void* sin, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    auto rotate = [&](auto* x, const auto* cos, const auto* sin) {
      for (int h = 0; h < heads; h++)
        rotate_head(x + (r * heads + h) * width, rotary_dim, cos + r * rotary_dim, sin + r * rotary_dim);
    };
    if (bf16) rotate(static_cast<uint16_t*>(x), static_cast<const uint16_t*>(cos), static_cast<const uint16_t*>(sin));
    else rotate(static_cast<float*>(x), static_cast<const float*>(cos), static_cast<const float*>(sin));
  }
}

// Row r of a block, `group` to a query, sees the columns that stand for slots up to slots[r / group], the first
// column for slot `begin`; a window hides what lies further back. Rows beyond the `real` queries only fill up.
void gateskip_softmax(void* scores, int32_t bf16, int64_t blocks, int32_t rows, int32_t real, int32_t group,
                      int32_t width, const int64_t* slots, int64_t begin, int32_t window, float scaling,
                      float softcap, int32_t threads) {
#pragma omp parallel num_threads(threads)
  {
    Arena memory;
    float* seen = reinterpret_cast<float*>(memory.reserve(sizeof(float) * width));
    auto softmax_row = [&](auto* row, int first, int last) {  // columns `first` to `last` are in sight
      const int from = first / 8 * 8, to = last / 8 * 8 + 8;
      F32X8 highest = broadcast(-INFINITY), mass = {};
      for (int t = from; t < to; t += 8) {
        F32X8 v = load(row + t) * broadcast(scaling);
        if (softcap) v = capped(v, softcap);
        if (t < first || t + 7 > last)
          for (int i = 0; i < 8; i++) v[i] = t + i < first || t + i > last ? -INFINITY : v[i];
        store(seen + t, v);
        highest = larger(highest, v);
      }
      const float top = largest(highest);
      for (int t = from; t < to; t += 8) {
        const F32X8 share = exp_of(load(seen + t) - broadcast(top));
        store(seen + t, share);
        mass += share;
      }
      const F32X8 inverse = broadcast(1.0f / sum(mass));
      for (int t = 0; t < from; t += 8) store(row + t, F32X8{});
      for (int t = from; t < to; t += 8) store(row + t, load(seen + t) * inverse);
      for (int t = to; t < width; t += 8) store(row + t, F32X8{});
    };
#pragma omp for schedule(static)
    for (int64_t place = 0; place < blocks * rows; place++) {
      const int q = place % rows / group;
      if (q >= real) continue;
      const int last = std::min<int64_t>(slots[q] - begin, width - 1);
      const int first = window ? std::max<int64_t>(slots[q] - window + 1 - begin, 0) : 0;
      if (bf16) softmax_row(static_cast<uint16_t*>(scores) + place * width, first, last);
      else softmax_row(static_cast<float*>(scores) + place * width, first, last);
    }
  }
}

// Rounded as a bfloat16 model does
void gateskip_activate(void* gate, const void* up, int64_t n, int32_t activation, int32_t bf16, int32_t threads) {
  auto activate = [&](auto* g, const auto* u, auto act) {
    auto product = [&](auto gates, auto times) { return rounded_as(g, act.of(gates)) * times; };
    constexpr int lanes = SIMD_WIDTH;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n / lanes * lanes; i += lanes) {
      const FullVector gates = load_as<FullVector>(g + i);
      store(g + i, u ? product(gates, load_as<FullVector>(u + i)) : act.of(gates));
    }
    for (int64_t i = n / lanes * lanes; i < n; i += 8) {
      const int rest = int(std::min<int64_t>(8, n - i));
      const F32X8 gates = load_some(g + i, rest);
      store_some(g + i, u ? product(gates, load_some(u + i, rest)) : act.of(gates), rest);
    }
  };
  with_activation(activation, [&](auto act) {
    if (bf16) activate(static_cast<uint16_t*>(gate), static_cast<const uint16_t*>(up), act);
    else activate(static_cast<float*>(gate), static_cast<const float*>(up), act);
  });
}

}  // extern "C"
#endif
