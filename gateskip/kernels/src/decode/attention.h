// One thread's share of a pass's attention: new keys and values into the cache, queries over what is there.
#pragma once
#include "../simd/memory.h"

#ifdef GATESKIP_SIMD
constexpr int HEADS_PER_PASS = 4;                  // queries that share one pass over the keys and values
constexpr int SLOTS_PER_PART = 512;                // of a row, whose scores stay in the first cache
constexpr int SCORE_STRIDE = SLOTS_PER_PART + 16;  // from one head's scores to the next one's

// What all threads write and read: [rows, ...] each
struct AttentionRows {
  float *q, *k, *v, *mixed;
  float* parts;  // [rows, heads, max_parts, head_dim + 2], where slots come in parts
  int max_parts;
  AttentionRows(const Model& m, const CacheView& c, int rows, Slices& memory)
      : max_parts((c.capacity - 1) / SLOTS_PER_PART + 1) {
    auto take = [&](int width) { return memory.take<float>(size_t(rows) * width); };
    q = take(m.heads * m.head_dim);
    k = take(m.kv_heads * m.head_dim);
    v = take(m.kv_heads * m.head_dim);
    mixed = take(m.heads * m.head_dim);
    parts = take(max_parts > 1 ? m.heads * max_parts * (m.head_dim + 2) : 0);
  }
};

class Attention {
 public:
  // Without memory it only counts what it would take
  Attention(const Model& model, const CacheView& cache, const Step& step, const AttentionRows& shared, int id,
            int threads, Slices& scratch);

  // All rows' keys and values of a layer into the cache; under KV rule `copy` those that do not enter take the layer's
  // below
  void store_kv(int l, const bool* enters);

  // Attention of the `count` rows whose numbers are in `rows`, one after the other in `mixed`
  void attend(int l, const int* rows, int count);

 private:
  void norm_and_rotate(const Layer& a, const Norm& norm, const float* all, int first, int count, int slot,
                       float* out) const;

  int64_t line(int l, int row, int head, int slot) const;
  template <class Stored>
  Stored* entry(void* const* store, int l, int row, int head, int slot) const;
  template <class Stored>
  void store_head(int l, int r, int head, bool copies);
  int first_seen(int l, int row) const;
  int parts_of(int l, int row) const;
  template <class Stored>
  void attend_all(int l);
  template <class Stored>
  int attend_some(int l, int place, int head, int max_heads, int part);
  template <class Stored, int n>
  void attend_heads(int l, int place, int head, int part);
  float* part_of(int place, int head, int part) const;
  void join(int l, int place, int head) const;
  bool multiplies_bytes() const;
  template <int n>
  void score_bytes(const void* keys, const float* scales, int whole, int around, int seen);
  template <int n>
  void mix_bytes(const void* values, int whole, int64_t around, int seen, const float* factor, float* out,
                 int64_t step);
  template <class Stored, int n>
  void score(const float* query, const Stored* keys, int first, int last);
  template <int n>
  void scale(const float* scales, int whole, int around, int seen);
  float softmax(const Layer& a, float* scores, int seen, float& highest) const;
  template <class Stored, int n>
  void mix(const Stored* values, int whole, int64_t around, int seen, const float* factor, float* out,
           int64_t step) const;

  const Model& m;
  const CacheView& c;
  const Step& s;
  const AttentionRows at;
  const int id, threads;
  float *const scores_, *const query_;
  uint8_t* const bytes_;   // [HEADS_PER_PASS, head_dim]: queries of 8 bits
  int16_t* const shares_;  // [HEADS_PER_PASS, SCORE_STRIDE]: of attention, of 16 bits
  const int* rows_ = nullptr;  // that attend
  int count_ = 0;
};
#endif
