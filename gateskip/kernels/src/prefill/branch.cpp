// A branch of a prefill in one call: the norm, the gate, the products of the tokens that enter, what lies between them,
// and what is added. The functions are those of other prompts, and so are the bits.
#include "../simd/memory.h"
#include "../simd/rows.h"

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

// A branch's norm and gate
struct NormAndGate {
  const Norm& norm;
  const float* weight;
  float bias;
};

// Places of the tokens that enter a branch, and of those that its shortcut stands in for
class BranchRows {
 public:
  // x [rows, width] becomes what the branch reads of hidden [rows, width]
  BranchRows(const NormAndGate& how, const Entry* entry, const uint16_t* hidden, int64_t rows, int64_t width, uint16_t* x,
      int32_t threads)
      : entry_(entry), rows_(rows), width_(width) {
    const bool gated = entry && how.weight;
    std::vector<float> logits(gated ? rows : 0);
    gateskip_norm(hidden, &how.norm, rows, int32_t(width), 1, x, gated ? how.weight : nullptr, how.bias,
                  logits.data(), threads);
    for (int64_t r = 0; entry && r < rows; r++) {
      const uint8_t token = entry->tokens[r];
      const bool enters = token == ALWAYS || (token == BY_GATE && (!gated || logits[r] >= entry->thresholds[r / entry->alike]));
      if (enters) enter_.push_back(r);
      else if (token != PADDING) skip_.push_back(r);
      if (entry->entered) entry->entered[r] = enters;
    }
  }

  bool all() const { return !entry_ || count() == rows_; }
  int64_t count() const { return entry_ ? int64_t(enter_.size()) : rows_; }
  int64_t place(int64_t i) const { return all() ? i : enter_[i]; }

  // Rows [count, width] of those that enter, out of from [rows, width]: in `to`, or where they are if that is all
  template <class T>
  const T* gather(const T* from, int64_t width, T* to) const {
    if (all()) return from;
    for (int64_t i = 0; i < count(); i++) std::memcpy(to + i * width, from + enter_[i] * width, sizeof(T) * width);
    return to;
  }

  // hidden [rows, width] of the others += their shortcut of x [rows, width]
  void add_shortcuts(uint16_t* hidden, const uint16_t* x, int32_t threads) const {
    if (skip_.empty() || !entry_->rank) return;
    gateskip_shortcut(hidden, x, 1, skip_.data(), int64_t(skip_.size()), int32_t(width_), entry_->down, entry_->up,
                      entry_->bias, entry_->rank, threads);
  }

 private:
  const Entry* entry_;  // or null: all enter
  const int64_t rows_, width_;
  std::vector<int64_t> enter_, skip_;
};

// hidden [.., width] of those that enter += what a branch added [count, width], after its norm where there is one
void add(uint16_t* hidden, uint16_t* added, const Norm& after, const BranchRows& in, int64_t width, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < in.count(); i++) {
    uint16_t *to = hidden + in.place(i) * width, *from = added + i * width;
    norm_row(after, from, int(width), from);
    for (int64_t c = 0; c < width; c += 8) store(to + c, load(to + c) + load(from + c));
  }
}

// Queries or keys, normed in place by head or a token at a time, where the layer does
void norm_heads(const Norm& norm, uint16_t* x, int64_t numbers, int32_t threads) {
  if (norm.weight) gateskip_norm(x, &norm, numbers / norm.width, norm.width, 1, x, nullptr, 0, nullptr, threads);
}

// A layer's new keys or values [batch, count, kv_heads, width] into its cache
void keep(const PrefillRows& at, const uint16_t* from, uint16_t* cache, int64_t kv_heads, int64_t width, int32_t threads) {
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

int64_t gateskip_prefill_mlp_branch(const Layer* layer, const Entry* entry, uint16_t* hidden, int64_t rows,
                                   int32_t threads) {
  const int64_t width = layer->down.n, size = rows * width;
  Parts parts{size, size, size};
  uint16_t *x = parts.take(size), *gathered = parts.take(size), *added = parts.take(size);
  const BranchRows in({layer->norm_mlp, layer->weight_mlp, layer->bias_mlp}, entry, hidden, rows, width, x, threads);
  if (in.count()) gateskip_prefill_mlp(layer, in.gather(x, width, gathered), in.count(), added, threads);
  add(hidden, added, layer->after_mlp, in, width, threads);
  in.add_shortcuts(hidden, x, threads);
  return in.count();
}

int64_t gateskip_prefill_attention_branch(const Model* model, const Layer* layer, const PrefillRows* at, const Entry* entry,
                                         uint16_t* hidden, int32_t threads) {
  const int64_t width = model->hidden, heads = model->heads, kv_heads = model->kv_heads, d = model->head_dim;
  const int64_t rows = int64_t(at->batch) * at->count, rotary_dim = layer->rotary_dim;
  const int64_t size = rows * width, all = rows * heads * d, few = rows * kv_heads * d;
  const int64_t used = (at->first + at->count + SLOTS_PER_PACK - 1) / SLOTS_PER_PACK * SLOTS_PER_PACK;
  const int64_t packed_size = 2 * at->batch * kv_heads * used * d;
  Parts parts{size, size, all + 2 * few, all, size, packed_size, rows * rotary_dim, rows * rotary_dim};
  uint16_t *x = parts.take(size), *gathered = parts.take(size), *queries = parts.take(all + 2 * few);
  uint16_t *keys = queries + all, *values = keys + few, *mixed = parts.take(all), *added = parts.take(size);
  uint32_t* packed = reinterpret_cast<uint32_t*>(parts.take(packed_size));
  uint16_t *cos = parts.take(rows * rotary_dim), *sin = parts.take(rows * rotary_dim);
  const BranchRows in({layer->norm_attention, layer->weight_attention, layer->bias_attention}, entry, hidden, rows,
                      width, x, threads);
  if (in.all()) {
    gateskip_prefill_products(&layer->q, 3, x, rows, queries, threads);
  } else {
    gateskip_prefill_products(&layer->k, 2, x, rows, keys, threads);
    if (in.count())
      gateskip_prefill_products(&layer->q, 1, in.gather(x, width, gathered), in.count(), queries, threads);
  }
  norm_heads(layer->norm_q, queries, in.count() * heads * d, threads);
  norm_heads(layer->norm_k, keys, few, threads);
  if (layer->rope >= 0) {
    gateskip_rotate(queries, 1, in.count(), int32_t(heads), int32_t(d), int32_t(rotary_dim),
                    in.gather(at->cos, rotary_dim, cos), in.gather(at->sin, rotary_dim, sin), threads);
    gateskip_rotate(keys, 1, rows, int32_t(kv_heads), int32_t(d), int32_t(rotary_dim), at->cos, at->sin, threads);
  }
  keep(*at, keys, at->keys, kv_heads, d, threads);
  keep(*at, values, at->values, kv_heads, d, threads);
  if (in.count()) {
    const int64_t head_stride = int64_t(at->capacity) * d;
    gateskip_pack(at->keys, at->values, at->batch, kv_heads, d, kv_heads * head_stride, head_stride, at->capacity, used,
                  packed, threads);
    std::vector<int64_t> slots(in.count()), counts(at->batch);
    for (int64_t i = 0; i < in.count(); i++) slots[i] = at->slots[in.place(i)], counts[in.place(i) / at->count]++;
    gateskip_attend(queries, slots.data(), counts.data(), at->batch, heads, kv_heads, d, layer->window, layer->scaling,
                    layer->softcap, used, packed, mixed, threads);
    gateskip_prefill_products(&layer->o, 1, mixed, in.count(), added, threads);
    add(hidden, added, layer->after_attention, in, width, threads);
  }
  in.add_shortcuts(hidden, x, threads);
  return in.count();
}

}  // extern "C"
#endif
