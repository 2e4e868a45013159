// What this library is, for Python to compare with the header that it reads: version and sizes.
#include <cstring>

#include "api.h"

extern "C" {

int32_t gateskip_abi_version(void) { return GATESKIP_ABI_VERSION; }

int64_t gateskip_struct_size(const char* name) {
  static const struct {
    const char* name;
    int64_t size;
  } sizes[] = {
      {"Matrix", sizeof(Matrix)}, {"Norm", sizeof(Norm)},   {"Shortcut", sizeof(Shortcut)},
      {"Layer", sizeof(Layer)},   {"Model", sizeof(Model)}, {"CacheView", sizeof(CacheView)},
      {"Step", sizeof(Step)},     {"Draft", sizeof(Draft)}, {"Sampling", sizeof(Sampling)},
      {"Embedding", sizeof(Embedding)}, {"DraftNetwork", sizeof(DraftNetwork)},
      {"Round", sizeof(Round)},   {"Speculation", sizeof(Speculation)}, {"PromptRows", sizeof(PromptRows)},
      {"Entry", sizeof(Entry)},   {"GroupSteps", sizeof(GroupSteps)},
  };
  for (const auto& each : sizes)
    if (!std::strcmp(each.name, name)) return each.size;
  return -1;
}

int32_t gateskip_has_decoder(void) {
#ifdef __AVX2__
  return 1;
#else
  return 0;
#endif
}

}  // extern "C"
