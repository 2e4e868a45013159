// A whole branch of a prompt in one call, all of whose tokens enter it and all of whose weights are packed: the norm, the
// products, what lies between them, and what is added. The functions are those of other prompts, and so are the bits.
#include "rows.h"

#ifdef GATESKIP_WIDE
#include <initializer_list>
#include <utility>
#include <vector>

namespace {

// Parts of one piece of memory, each on a cache line of its own
class Parts {
 public:
  explicit Parts(std::initializer_list<int64_t> sizes) {  // numbers of two bytes
    static thread_local Arena memory;
    int64_t total = 0;
    for (int64_t size : sizes) total += rounded(size);
    next_ = reinterpret_cast<uint16_t*>(memory.reserve(total * sizeof(uint16_t)));
  }
  uint16_t* take(int64_t size) { return std::exchange(next_, next_ + rounded(size)); }

 private:
  static int64_t rounded(int64_t size) { return (size + 31) / 32 * 32; }
  uint16_t* next_;
};

// hidden [rows, width] += what a branch left [rows, width], after its norm where there is one
void add(uint16_t* hidden, uint16_t* left, const Norm& after, int64_t rows, int64_t width, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    uint16_t *to = hidden + r * width, *from = left + r * width;
    norm_row(after, from, int(width), from);
    for (int64_t i = 0; i < width; i += 8) store(to + i, load(to + i) + load(from + i));
  }
}

// A layer's new keys or values [batch, count, kv_heads, width] into its cache
void keep(const PromptRows& at, const uint16_t* from, uint16_t* cache, int64_t kv_heads, int64_t width, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < at.batch * kv_heads; i++) {
    const int64_t row = i / kv_heads, head = i % kv_heads;
    uint16_t* to = cache + (i * at.capacity + at.first) * width;
    for (int64_t t = 0; t < at.count; t++)
      std::memcpy(to + t * width, from + ((row * at.count + t) * kv_heads + head) * width, sizeof(uint16_t) * width);
  }
}

}  // namespace

extern "C" {

void gateskip_prompt_mlp_branch(const Layer* layer, uint16_t* hidden, int64_t rows, int32_t threads) {
  const int64_t width = layer->down.n, size = rows * width;
  Parts parts{size, size};
  uint16_t *x = parts.take(size), *left = parts.take(size);
  gateskip_norm(hidden, &layer->norm_mlp, rows, int32_t(width), 1, x, nullptr, 0, nullptr, threads);
  gateskip_prompt_mlp(layer, x, rows, left, threads);
  add(hidden, left, layer->after_mlp, rows, width, threads);
}

void gateskip_prompt_attention_branch(const Model* model, const Layer* layer, const PromptRows* at, uint16_t* hidden,
                                      int32_t threads) {
  const int64_t width = model->hidden, heads = model->heads, kv_heads = model->kv_heads, d = model->head_dim;
  const int64_t rows = int64_t(at->batch) * at->count, size = rows * width, all = rows * heads * d, few = rows * kv_heads * d;
  const int64_t used = (at->first + at->count + SIMD_WIDTH - 1) / SIMD_WIDTH * SIMD_WIDTH;
  const int64_t packed_size = 2 * at->batch * kv_heads * used * d;
  Parts parts{size, all + 2 * few, all, size, packed_size};
  uint16_t *x = parts.take(size), *queries = parts.take(all + 2 * few), *mixed = parts.take(all);
  uint16_t *left = parts.take(size), *keys = queries + all, *values = keys + few;
  uint32_t* packed = reinterpret_cast<uint32_t*>(parts.take(packed_size));
  gateskip_norm(hidden, &layer->norm_attention, rows, int32_t(width), 1, x, nullptr, 0, nullptr, threads);
  gateskip_prompt_products(&layer->q, 3, x, rows, queries, threads);
  if (layer->rope >= 0) {
    gateskip_rotate(queries, 1, rows, int32_t(heads), int32_t(d), layer->rotary_dim, at->cos, at->sin, threads);
    gateskip_rotate(keys, 1, rows, int32_t(kv_heads), int32_t(d), layer->rotary_dim, at->cos, at->sin, threads);
  }
  keep(*at, keys, at->keys, kv_heads, d, threads);
  keep(*at, values, at->values, kv_heads, d, threads);
  const int64_t head_stride = int64_t(at->capacity) * d;
  gateskip_pack(at->keys, at->values, at->batch, kv_heads, d, kv_heads * head_stride, head_stride, at->capacity, used,
                packed, threads);
  const std::vector<int64_t> counts(at->batch, at->count);
  gateskip_attend(queries, at->slots, counts.data(), at->batch, heads, kv_heads, d, layer->window, layer->scaling,
                  layer->softcap, used, packed, mixed, threads);
  gateskip_prompt_products(&layer->o, 1, mixed, rows, left, threads);
  add(hidden, left, layer->after_attention, rows, width, threads);
}

}  // extern "C"
#endif
