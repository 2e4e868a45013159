// Decodes a model that tests/helpers/dumped_model.py wrote, without Python: decode MODEL COUNT TOKEN... prints COUNT tokens
// that follow, and writes the logits after each token to MODEL.logits.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "api.h"

namespace {

class File {
 public:
  explicit File(const char* name) : file_(std::fopen(name, "rb")) {
    if (!file_) std::exit(EXIT_FAILURE);
  }

  void read(void* to, size_t bytes) {
    if (std::fread(to, 1, bytes, file_) != bytes) std::exit(EXIT_FAILURE);
  }

  template <class T>
  T number() {
    T value;
    read(&value, sizeof value);
    return value;
  }

  // Numbers, with how many bytes they take before them; null where those are none. They are held until the end.
  void* array() {
    const int64_t bytes = number<int64_t>();
    if (!bytes) return nullptr;
    void* memory = ::operator new(size_t(bytes), std::align_val_t(64));
    read(memory, size_t(bytes));
    return memory;
  }

  Matrix matrix() {
    Matrix w{};
    for (int32_t* field : {&w.kind, &w.n, &w.k, &w.group, &w.zero, &w.run, &w.stride}) *field = number<int32_t>();
    w.weights = array(), w.scale = array(), w.offset = array(), w.table = array();
    w.bias = static_cast<float*>(array());
    return w;
  }

  Norm norm() {
    Norm n{};
    n.weight = static_cast<float*>(array()), n.bias = static_cast<float*>(array());
    n.kind = number<int32_t>(), n.width = number<int32_t>(), n.epsilon = number<float>();
    return n;
  }

  Layer layer() {
    Layer l{};
    for (Matrix* w : {&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down}) *w = matrix();
    for (Norm* n : {&l.norm_attention, &l.norm_mlp, &l.after_attention, &l.after_mlp, &l.norm_q, &l.norm_k}) *n = norm();
    l.scaling = number<float>(), l.softcap = number<float>();
    for (int32_t* field : {&l.window, &l.rope, &l.rotary_dim, &l.activation, &l.parallel}) *field = number<int32_t>();
    return l;
  }

 private:
  std::FILE* file_;
};

}  // namespace

int main(int count, char** arguments) {
  if (count < 4) return EXIT_FAILURE;
  File file(arguments[1]);
  Model m{};
  for (int32_t* field : {&m.layers, &m.hidden, &m.heads, &m.kv_heads, &m.head_dim, &m.inner, &m.anchors})
    *field = file.number<int32_t>();
  m.norm_final = file.norm();
  std::vector<Layer> layers;
  for (int l = 0; l < m.layers; l++) layers.push_back(file.layer());
  m.layer = layers.data();
  Embedding embedding{file.matrix(), 0, 0};
  embedding.bf16 = file.number<int32_t>(), embedding.scale = file.number<float>();
  const Matrix head = file.matrix();
  CacheView cache{};
  cache.capacity = file.number<int32_t>(), cache.bf16 = file.number<int32_t>();
  std::vector<const void*> cos, sin;
  for (int tables = file.number<int32_t>(); tables > 0; tables--) cos.push_back(file.array()), sin.push_back(file.array());
  const size_t bytes = size_t(m.kv_heads) * cache.capacity * m.head_dim * (cache.bf16 ? 2 : 4);
  std::vector<std::vector<char>> stores(2 * m.layers, std::vector<char>(bytes));
  std::vector<void*> keys, values;
  for (int l = 0; l < m.layers; l++) keys.push_back(stores[2 * l].data()), values.push_back(stores[2 * l + 1].data());
  const std::vector<int32_t> slots_of_layers(m.layers, cache.capacity);
  cache.keys = keys.data(), cache.values = values.data(), cache.cos = cos.data(), cache.sin = sin.data();
  cache.slots = slots_of_layers.data();

  std::FILE* out = std::fopen((std::string(arguments[1]) + ".logits").c_str(), "wb");
  Arena* arena = gateskip_arena_new();
  std::vector<int32_t> tokens;
  for (int i = 3; i < count; i++) tokens.push_back(std::atoi(arguments[i]));
  std::vector<int64_t> kept(2 * m.layers);
  std::vector<double> spent(PARTS);
  int place = 0;
  for (int i = std::atoi(arguments[2]); i > 0; i--) {  // the whole prompt, then one token at a time
    const int rows = int(tokens.size());
    const size_t width = size_t(head.n + 7) / 8 * 8;
    std::vector<int32_t> row(rows), slot, next(rows);
    while (int(slot.size()) < rows) slot.push_back(place++);
    std::vector<float> hidden(size_t(rows) * m.hidden), logits(rows * width);
    const Step step{rows, 0, row.data(), slot.data(), hidden.data(), nullptr, kept.data(), spent.data(), nullptr, 0};
    gateskip_argmax(&m, &cache, &step, &embedding, tokens.data(), &head, next.data(), logits.data(), arena, 1);
    std::fwrite(&logits[(rows - 1) * width], sizeof(float), head.n, out);
    std::printf("%d\n", next[rows - 1]);
    tokens = {next[rows - 1]};
  }
  gateskip_arena_free(arena);
  std::fclose(out);
}
