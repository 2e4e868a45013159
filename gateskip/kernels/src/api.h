/* The boundary between Python and the kernels: every structure and every function that crosses it.
 *
 * Each folder of C++ sources stands on those below it, and so does each file on those its folder has below it:
 *
 *   decode/   whole tokens: speculate -> decode, argmax -> pass -> attention -> int8_cache; sampling
 *   prefill/  branches of a prompt: branch -> products, attention, rows; products -> amx -> int8, panels
 *   linear/   weights times rows: layers, share -> matvec, int8; rounding
 *   simd/     one processor: amx, rows, code_vectors -> codes -> memory, team, vectors -> neon, avx512 -> avx; target
 *   api.h     this file
 *
 * The C++ files include this header, so that a definition which differs does not compile. Python reads it, too:
 * gateskip/kernels/abi.py takes the fields of its structures and each function's argument types from here, and asks a
 * loaded library for ABI_VERSION and for the size of every structure. Write one declaration a line and one type a
 * declaration: the parser there is small.
 *
 * H is the hidden size, D the width of a head, V the vocabulary. A flag `bf16` says that a `void*` points to
 * bfloat16 numbers; else they are float32. `threads` is how many threads of OpenMP share the work.
 */
#pragma once
#include <stdint.h>

#define GATESKIP_ABI_VERSION 19 /* raised with every change of this file */

#ifdef __cplusplus
extern "C" {
#endif

/* Sizes that both sides know. */
static const int32_t MAX_ROWS = 64;       /* rows of activations in one pass over the weights: what fits a second cache */
static const int32_t ROWS_PER_TILE = 16;  /* rows of packed weights that lie together */
static const int32_t BLOCK = 32;          /* columns of them */
static const int32_t SLOTS_PER_PACK = 32; /* keys and values that gateskip_pack takes at a time */

/* How a matrix is stored. A8: activations are rounded to 8 bits, and products are summed in integers. A code of b
 * bits stands for itself less `zero`, which is 2^(b - 1) where activations are float32. */
enum MatrixKind {
  FP32 = 0,
  BF16 = 1,
  INT2 = 2,
  INT3 = 3,
  INT4 = 4,
  INT4_TABLE = 5, /* a code stands for an entry of a table of 16 (NF4) */
  INT6 = 6,
  INT8 = 7,
  INT2_A8 = 8,
  INT3_A8 = 9,
  INT4_A8 = 10,
  INT4_TABLE_A8 = 11,
  INT6_A8 = 12,
  INT8_A8 = 13,
};

/* What an MLP does to its gate, or to its only projection. GELU_TANH is its approximation by tanh. */
enum Activation {
  SILU = 0,
  GELU_TANH = 1,
  GELU = 2,
};

/* RMS_NORM rounds rows of a bfloat16 model to that type before they meet the weight, RMS_NORM_FP32 after. LAYER_NORM
 * takes the mean off first and adds a bias last. */
enum NormKind {
  RMS_NORM = 0,
  RMS_NORM_FP32 = 1,
  LAYER_NORM = 2,
};

/* Whether a token of a prompt enters a branch: padding does not, others as the gate says, or all the same. */
enum Entering {
  PADDING = 0,
  BY_GATE = 1,
  ALWAYS = 2,
};

/* What multiplies the rows of a prefill: vectors of 512 bits with products of bytes (AVX-512 with VNNI), or units for whole
 * matrices (AMX), which multiply bfloat16. */
enum PrefillUnits {
  NO_UNITS = 0,
  VECTORS = 1,
  TILE_UNITS = 2,
};

/* What time is spent on, as indices of Step.spent. GATES: norms, gates and shortcuts. */
enum Part {
  PART_LINEAR = 0,
  PART_ATTENTION = 1,
  PART_GATES = 2,
  PART_HEAD = 3,
  PARTS = 4,
};

/* A weight [n, k] and its bias. Packed weights lie in tiles of 16 rows: see codes.h. A weight is scale times what its
 * code stands for, plus offset. */
typedef struct Matrix {
  int32_t kind;        /* a MatrixKind */
  int32_t n;
  int32_t k;
  int32_t group;       /* columns that share a scale */
  int32_t zero;        /* what is taken off a code */
  int32_t run;         /* rows that lie together: n, or a multiple of 16 where they are parts of a larger weight */
  int32_t stride;      /* rows from the beginning of one run to that of the next */
  const void* weights; /* [n, k], or codes: the first row's */
  const void* scale;   /* [tiles, k / group, 16] float32, bfloat16 for A8 kinds; null for dense kinds */
  const void* offset;  /* as scale, or null */
  const int8_t* exponent; /* [tiles, 16], or null. Of A8 kinds: with it scales are bytes, each times 2^exponent of the
                             row, and offsets are bytes, each times -2^(b - 1 + exponent) */
  const void* table;   /* INT4_TABLE: 16 floats; INT4_TABLE_A8: 16 bytes, each 128 too large */
  const float* bias;   /* [n], or null */
} Matrix;

/* A norm of rows [width], a multiple of 8; nothing is normed where the weight is null */
typedef struct Norm {
  const float* weight; /* [width]: all that is multiplied by */
  const float* bias;   /* [width], or null */
  int32_t kind;        /* a NormKind */
  int32_t width;
  float epsilon;
} Norm;

/* What a row gets that skips a branch: up (down x) + bias. All null where there is none. */
typedef struct Shortcut {
  const uint16_t* down; /* float16 [rank, H] */
  const uint16_t* up;   /* float16 [H, rank] */
  const float* bias;    /* [H] */
  int32_t rank;         /* a multiple of 8 */
} Shortcut;

typedef struct Layer {
  Matrix q;
  Matrix k;
  Matrix v;
  Matrix o;
  Matrix gate; /* n is 0 where the MLP has none */
  Matrix up;
  Matrix down;
  Norm norm_attention;  /* of what the attention branch reads */
  Norm norm_mlp;
  Norm after_attention; /* of what the attention branch adds */
  Norm after_mlp;
  Norm norm_q;          /* of a head's queries, or of all of a token's */
  Norm norm_k;
  const float* weight_attention; /* the attention branch's gate [H], or null */
  const float* weight_mlp;       /* the MLP branch's gate [H], or null */
  Shortcut short_attention;
  Shortcut short_mlp;
  float bias_attention;
  float bias_mlp;
  float scaling;      /* of attention scores */
  float softcap;      /* which scores do not exceed, above or below 0; 0 is none */
  int32_t window;     /* of attention, in tokens; 0 is none */
  int32_t rope;       /* which of the cache's tables rotates queries and keys; -1 for none */
  int32_t rotary_dim; /* channels of a head that are rotated */
  int32_t activation; /* an Activation */
  int32_t parallel;   /* whether the MLP branch reads what the attention branch read */
} Layer;

typedef struct Model {
  int32_t layers;
  int32_t hidden; /* H, a multiple of 8 */
  int32_t heads;
  int32_t kv_heads;
  int32_t head_dim; /* D, a multiple of 8 */
  int32_t inner;    /* neurons of an MLP, any number */
  int32_t anchors; /* first positions of a text, which enter every branch */
  int32_t widest_shortcut;
  Norm norm_final;
  const Layer* layer; /* [layers] */
} Model;

/* A KV cache: a layer's keys and values [B, kv_heads, slots, D]. A position lies at its remainder by the layer's slots,
 * of which a layer with a window has at least MAX_ROWS more than the window. Where there are scales, keys and values are
 * signed bytes times the scale of their position and head. */
typedef struct CacheView {
  void* const* keys;   /* [layers] */
  void* const* values; /* [layers] */
  const void* const* cos; /* one table a Layer.rope: [capacity, rotary_dim] float32 */
  const void* const* sin;
  float* const* key_scales;   /* [layers] of [B, kv_heads, slots], or null */
  float* const* value_scales; /* the same */
  const int32_t* slots; /* [layers] */
  int32_t capacity;     /* positions of a row */
  int32_t bf16;         /* else float32, or bytes where there are scales */
} CacheView;

/* Tokens of one forward pass, each a row with its own place in the cache. */
typedef struct Step {
  int32_t rows;
  int32_t copies;           /* KV rule `copy`: a skipped layer shows its predecessor's entries */
  const int32_t* cache_row; /* [rows] */
  const int32_t* slot;      /* [rows] */
  float* hidden;            /* [rows, H]: embeddings in, final normed states out */
  const float* thresholds;  /* [2 * layers], or null: every branch is entered */
  int64_t* kept;            /* [2 * layers]: counts of rows that entered, added up */
  double* spent;            /* [PARTS]: seconds, added up */
  uint8_t* entered;         /* [rows, 2 * layers], or null: becomes 1 where a row enters a branch; where one row takes
                               several steps, [steps, 2 * layers] */
  int32_t stride;           /* from one row's thresholds to the next one's; 0 where all rows share them */
} Step;

/* How a token is drawn from logits. */
typedef struct Sampling {
  float temperature; /* above 0 */
  int32_t top_k;     /* 0 is all */
  float top_p;       /* 1 is all */
  float min_p;       /* of the largest probability */
} Sampling;

/* What tokens are at the input. */
typedef struct Embedding {
  Matrix table;  /* [V, H]: dense, or packed without offsets, a whole weight */
  int32_t bf16;  /* what its numbers are rounded to */
  float scale;   /* which they are multiplied by, and rounded again */
} Embedding;

/* A small network that drafts without a cache: from the final state before a token and the token's embedding it makes
 * the state after, as x + down(silu(gate n(x)) up n(x)) of x = fuse [n(state), n(embedding)], normed; n are norms. */
typedef struct DraftNetwork {
  Norm norm_state;
  Norm norm_token;
  Norm norm_mlp;
  Norm norm_final;
  Matrix fuse; /* [H, 2 H] */
  Matrix gate; /* [inner, H] */
  Matrix up;
  Matrix down; /* [H, inner] */
} DraftNetwork;

/* Told of each token; decoding ends where it returns 1. */
typedef int32_t OnToken(int32_t token);

/* What a draft has beyond the tokens of a row. */
typedef struct Draft {
  float min_acceptance;       /* it ends once all of it is less likely than this to be accepted */
  const float* acceptance;    /* [levels]: how likely a token is accepted, by its probability from 0 to 1 */
  int32_t levels;
  const int32_t* head_tokens; /* [rows of the head]: the token that each row is of; null where it has all tokens */
  const Matrix* rerank_head;  /* of all tokens: decides among the head's best, or null */
  float* probabilities;       /* [count]: out, each token's as the draft sees it */
  float* distributions;       /* [count, rows of the head rounded up to 8]: out, what tokens are drawn from; or null */
} Draft;

/* Tokens of one row to decode one after the other: those of its text, or of a draft. */
typedef struct DecodeRequest {
  int32_t token;            /* the last committed one */
  int32_t count;            /* tokens at most; afterwards, tokens decoded */
  Embedding embedding;
  float cap;                /* which logits do not exceed, above or below 0; 0 is none */
  const Matrix* head;       /* the LM head, or what ranks a draft's tokens in its place */
  int32_t* tokens;          /* [count]: out */
  OnToken* on_token;        /* called with each token; or null */
  int32_t stopped;          /* what it returned last */
  const Sampling* sampling; /* how tokens are drawn; null is greedy */
  const double* uniform;    /* [count]: a number from 0 to 1 for each token that is drawn */
  Draft* draft;             /* or null */
} DecodeRequest;

/* A draft of one row, and what became of it. */
typedef struct Round {
  int32_t drafted;
  int32_t accepted;
  int32_t looked_up; /* whether the draft came out of the text */
  float draft_s;
  float verify_s;
} Round;

/* Writes up to `count` tokens that the text proposes next: how many. */
typedef int32_t Propose(int32_t* tokens, int32_t count);

/* Rounds of speculation of one row: in each a draft, out of the text or by a model or network, and a pass over the
 * row's last token and the draft, which accepts the part of it that the model would have sampled. */
typedef struct Speculation {
  int32_t token;         /* the last committed one */
  int32_t remaining;     /* tokens that may follow */
  int32_t rounds;        /* at most; afterwards, those that there were */
  int32_t max_drafts;    /* rounds with a draft */
  int32_t draft_length;  /* tokens that a model or network drafts at most; 0 is none */
  int32_t lookup_length; /* tokens that the text proposes at most; 0 is none */
  Embedding embedding;         /* of the model that verifies */
  const Model* draft_model;    /* with `draft_step`, a step of one row whose slot is moved; or null */
  const Step* draft_step;
  const CacheView* draft_cache; /* the draft model's own, which has the row's text up to the last token; or null: both
                                   models share a cache */
  const DraftNetwork* network; /* drafts from `state`; or null */
  DecodeRequest* drafting;     /* how either drafts; its token, count and probabilities are set in every round */
  float* state;                /* [H]: the final state before the last token, in and out */
  Propose* propose;
  OnToken* on_token;     /* called with each token that is committed */
  float cap;             /* of the logits of the model that verifies, as in DecodeRequest */
  float* logits;         /* [1 + max(draft_length, lookup_length), V rounded up to 8] where tokens are drawn, or null */
  float* shares;         /* [V rounded up to 8], the same */
  const double* uniform; /* [rounds, 1 + draft_length + max(draft_length, lookup_length)], from 0 to 1: for each that is
                            drawn */
  Round* round;          /* [rounds]: out */
  float* probabilities;  /* [rounds, draft_length]: out, each drafted token's as the draft sees it */
} Speculation;

/* Where the tokens of a prefill stand: all rows of a cache, `count` tokens each from position `first` on. */
typedef struct PrefillRows {
  int32_t batch;
  int32_t count;
  int32_t first;
  int32_t capacity;     /* slots of the layer's cache, none of which is used twice by then */
  const int64_t* slots; /* [batch * count]: first, first + 1, ... */
  const uint16_t* cos;  /* [batch * count, rotary_dim] */
  const uint16_t* sin;
  uint16_t* keys;       /* [batch, kv_heads, capacity, D] */
  uint16_t* values;
} PrefillRows;

/* Which tokens of a prompt enter a branch, and what those get that skip it. */
typedef struct Entry {
  const uint8_t* tokens;   /* [rows]: an Entering each */
  const float* thresholds; /* [rows / alike]: which a gate's logit must reach */
  uint8_t* entered;        /* [rows]: becomes 1 for tokens that enter, 0 for others; or null */
  int32_t alike;           /* rows that follow each other and share a threshold */
  int32_t rank;            /* of the branch's shortcut, a multiple of 8; 0 for none */
  const uint16_t* down;    /* float16 [H, rank] */
  const uint16_t* up;      /* float16 [rank, H] */
  const float* bias;       /* [H] */
} Entry;

/* What one group of columns can be, for each of n rows of a weight: `scale * code + lowest`. */
typedef struct GroupSteps {
  const float* scale;   /* [n] */
  const float* inverse; /* [n]: 1 / scale, 0 where that is 0 */
  const float* lowest;  /* [n] */
  int32_t n;
  int32_t group; /* columns, at most 128 */
  int32_t min_code;
  int32_t max_code;
  int32_t threads;
} GroupSteps;

/* Columns of a weight whose lines and codes are chosen anew, group after group: gateskip/rounding/descent.py */
typedef struct DescentBlock {
  const float* moments; /* [block, block]: mean products of these columns' inputs */
  const float* seen;    /* [block, n]: mean products of their inputs with all inputs, times what each row lost there */
  const float* zeros;   /* [block / group, n]: the code of the value zero; NULL where minima are free */
  const float* steps;   /* [n]: powers of two, of which lines are whole numbers; NULL where they need not be */
  float* lost;          /* [block, n]: weights less values */
  uint8_t* codes;       /* [block, n] */
  float* scale;         /* [block / group, n] */
  float* lowest;        /* [block / group, n]: the value of code 0 */
  int32_t n;
  int32_t block; /* columns, at most 128 */
  int32_t group;
  int32_t bits;
  int32_t min_code;
  int32_t threads;
} DescentBlock;

/* What a group of weights has beside its scale: a minimum, an integer code of the value zero, or nothing. */
enum GroupOffset {
  OFFSET_REAL = 0,
  OFFSET_INTEGER = 1,
  OFFSET_NONE = 2,
};

/* A weight [n, k] whose groups each get the best of several ranges: gateskip/quantization/rounding.py */
typedef struct RangeSearch {
  const float* weight;     /* its rows and columns lie `row` and `column` numbers apart */
  const float* importance; /* of each squared error; its rows lie `importance_row` numbers apart */
  const float* cut;        /* [cuts]: parts of a group's range that are cut off */
  uint8_t* codes;          /* [n, k] */
  float* scale;            /* [n, k / group] */
  float* lowest;           /* [n, k / group]: the value of code 0; not of use without an offset */
  int64_t row;
  int64_t column;
  int64_t importance_row;
  int32_t n;
  int32_t k;
  int32_t group; /* columns, at most 128 */
  int32_t bits;
  int32_t offset; /* GroupOffset */
  int32_t cuts;
  int32_t in_steps; /* whether scales and lowest values are whole numbers of a step for each row */
  int32_t threads;
} RangeSearch;

/* Memory that the calls of one model use again and again; not for two calls at a time. */
typedef struct Arena Arena;

/* -- what this library is: api.cpp -- */

int32_t gateskip_abi_version(void);
/* sizeof a structure of this header; -1 for another name */
int64_t gateskip_struct_size(const char* name);
/* whether it has what follows `gateskip_embed` below, less rounding: it needs AVX2 or NEON */
int32_t gateskip_has_decoder(void);
Arena* gateskip_arena_new(void);
void gateskip_arena_free(Arena* arena);

/* -- linear layers one by one, for models that run in torch: linear/layers.cpp -- */

/* y [m, n] = x [m, k] times w [n, k] transposed */
void gateskip_dense(const float* w, int32_t n, int32_t k, const float* x, int32_t m, float* y, int32_t threads);
/* the same for packed weights of 2, 3, 4, 6 or 8 bits; table [16], or null; scratch [m, k / group] */
void gateskip_packed(const uint8_t* codes, const float* scale, const float* offset, const float* table, int32_t bits,
                     int32_t n, int32_t k, int32_t group, const float* x, int32_t m, float* y, float* scratch,
                     int32_t threads);
/* the weights [n, k] that codes stand for */
void gateskip_unpack(const uint8_t* codes, const float* scale, const float* offset, const float* table, int32_t bits,
                     int32_t n, int32_t k, int32_t group, int32_t bf16, void* out, int32_t threads);
/* rows [count, H] of tokens */
void gateskip_embed(const Embedding* embedding, const int32_t* tokens, int32_t count, float* out);

/* y [rows, n] of one matrix, such as the LM head, for any number of rows x [rows, k]: linear/share.cpp */
void gateskip_multiply(const Matrix* w, const float* x, int32_t rows, float* y, Arena* arena, int32_t threads);

/* -- rounding to integers: linear/rounding.cpp -- */

/* nearest codes [group, n] of columns left [group, n]; what each loses, over upper's diagonal, goes into errors
 * [group, n], and the later columns take it over by upper [group, group] */
void gateskip_round_columns(const GroupSteps* steps, const float* upper, const float* left, uint8_t* codes,
                            float* errors);
/* lines and codes of less error, and what is lost by them, in place: linear/descent.cpp */
void gateskip_descend_block(const DescentBlock* block);
/* codes, scales and lowest values: linear/ranges.cpp */
void gateskip_search_ranges(const RangeSearch* search);

/* -- whole tokens: decode/ -- */

/* any number of rows, at most MAX_ROWS of them in one pass over the weights: pass.cpp */
void gateskip_step(const Model* model, const CacheView* cache, const Step* step, Arena* arena, int32_t threads);
/* tokens of the step's only row, whose slot goes up with them; request->count becomes their number: decode.cpp */
void gateskip_decode(const Model* model, const CacheView* cache, const Step* step, DecodeRequest* request, Arena* arena,
                     int32_t threads);
/* the same by a small network, whose `state` [H] is that before request->token and becomes that of the last token;
 * nothing is reranked */
void gateskip_decode_by_network(const DraftNetwork* network, float* state, DecodeRequest* request, Arena* arena,
                                int32_t threads);
/* the token of the largest logit after each of a step's rows, whose hidden states come from `tokens` [rows], and where it
 * is not null all their `logits` [rows, V rounded up to 8]: argmax.cpp */
void gateskip_argmax(const Model* model, const CacheView* cache, const Step* step, const Embedding* embedding,
                     const int32_t* tokens, const Matrix* head, int32_t* next, float* logits, Arena* arena,
                     int32_t threads);
/* rounds of speculation; the step has room for 1 + max(draft_length, lookup_length) rows, whose slots it counts up from
 * the first one's: speculate.cpp */
void gateskip_speculate(const Model* model, const CacheView* cache, const Step* step, const Matrix* head,
                        Speculation* speculation, Arena* arena, int32_t threads);
/* a token of logits [n], drawn by a number from 0 to 1; shares has room for n numbers, rounded up to 8: sampling.cpp */
int32_t gateskip_sample(const float* logits, int32_t n, const Sampling* sampling, double uniform, float* shares);
/* the probabilities from which that token is drawn, into `shares` */
void gateskip_distribution(const float* logits, int32_t n, const Sampling* sampling, float* shares);
/* one of n shares, zeros behind them up to a multiple of 8, by a number from 0 to 1; they need not add up to 1 */
int32_t gateskip_draw(const float* shares, int32_t n, double uniform);

/* -- weights times the rows of a prefill: prefill/products.cpp, prefill/branch.cpp -- */

/* what the functions below multiply with, a PrefillUnits; they and those of attention are there unless it is NO_UNITS */
int32_t gateskip_prefill_units(void);
/* rows x [rows, k], bfloat16, times each of `count` w [n, k], into out: [rows, n] of the first, then of the next. All are
 * packed or bfloat16, and k is a multiple of 32. In vectors activations are rounded to 8 bits where a matrix's kind says
 * so; else packed weights are rounded to bfloat16. */
void gateskip_prefill_products(const Matrix* w, int32_t count, const uint16_t* x, int64_t rows, uint16_t* out,
                              int32_t threads);
/* out [rows, H] of a layer's MLP for rows x [rows, H], all bfloat16 */
void gateskip_prefill_mlp(const Layer* layer, const uint16_t* x, int64_t rows, uint16_t* out, int32_t threads);
/* hidden [rows, H], bfloat16, += what a layer's MLP branch adds, norms and shortcuts included; how many tokens entered,
 * all without an `entry` */
int64_t gateskip_prefill_mlp_branch(const Layer* layer, const Entry* entry, uint16_t* hidden, int64_t rows,
                                   int32_t threads);
/* the same of its attention branch, which keeps keys and values of all tokens */
int64_t gateskip_prefill_attention_branch(const Model* model, const Layer* layer, const PrefillRows* at, const Entry* entry,
                                         uint16_t* hidden, int32_t threads);

/* -- between the matrix products of a prefill: prefill/rows.cpp -- */

/* rows x [rows, width], normed, into out; with a gate [width], its logits [rows] of what comes out */
void gateskip_norm(const void* x, const Norm* norm, int64_t rows, int32_t width, int32_t bf16, void* out,
                   const float* gate, float bias, float* logits, int32_t threads);
/* hidden [.., width] at `places` += added [count, width]; no place comes twice */
void gateskip_add_rows(void* hidden, const int64_t* places, int64_t count, int32_t width, int32_t bf16,
                       const void* added, int32_t threads);
/* hidden [.., width] at `places` += up (down x) + bias; down [width, rank] and up [rank, width] in float16 */
void gateskip_shortcut(void* hidden, const void* x, int32_t bf16, const int64_t* places, int64_t count, int32_t width,
                       const uint16_t* down, const uint16_t* up, const float* bias, int32_t rank, int32_t threads);
/* rotary positions in place: x [rows, heads, width] by cos and sin [rows, rotary_dim] */
void gateskip_rotate(void* x, int32_t bf16, int64_t rows, int32_t heads, int32_t width, int32_t rotary_dim,
                     const void* cos, const void* sin, int32_t threads);
/* causal softmax in place of scores [blocks, rows, width] times `scaling`, then capped where `softcap` is not 0;
 * width a multiple of 8 */
void gateskip_softmax(void* scores, int32_t bf16, int64_t blocks, int32_t rows, int32_t real, int32_t group,
                      int32_t width, const int64_t* slots, int64_t begin, int32_t window, float scaling,
                      float softcap, int32_t threads);
/* gate [n] = activation(gate), times up [n] where that is not null */
void gateskip_activate(void* gate, const void* up, int64_t n, int32_t activation, int32_t bf16, int32_t threads);

/* -- attention of a prefill over a bfloat16 cache: prefill/attention.cpp -- */

/* keys and values [rows, kv_heads, capacity, width] -> what gateskip_attend reads of `used` slots, a multiple of
 * SLOTS_PER_PACK; width is a multiple of 16 */
void gateskip_pack(const uint16_t* keys, const uint16_t* values, int64_t rows, int64_t kv_heads, int64_t width,
                   int64_t row_stride, int64_t head_stride, int64_t capacity, int64_t used, uint32_t* packed,
                   int32_t threads);
/* queries [N, heads, width], counts[b] of them in row b, at ascending slots [N] -> out [N, heads, width] */
void gateskip_attend(const uint16_t* queries, const int64_t* slots, const int64_t* counts, int64_t rows, int64_t heads,
                     int64_t kv_heads, int64_t width, int64_t window, float scaling, float softcap, int64_t used,
                     uint32_t* packed, uint16_t* out, int32_t threads);

#ifdef __cplusplus
}
#endif
