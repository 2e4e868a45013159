// What this library is, for Python to compare with the header that it reads, and the memory that its calls share.
#include <cstring>

#include "simd/memory.h"

#define GATESKIP_SIZE(structure) \
  if (!std::strcmp(name, #structure)) return sizeof(structure)

extern "C" {

int32_t gateskip_abi_version(void) { return GATESKIP_ABI_VERSION; }

int64_t gateskip_struct_size(const char* name) {
  GATESKIP_SIZE(Matrix);
  GATESKIP_SIZE(Norm);
  GATESKIP_SIZE(Shortcut);
  GATESKIP_SIZE(Layer);
  GATESKIP_SIZE(Model);
  GATESKIP_SIZE(CacheView);
  GATESKIP_SIZE(Step);
  GATESKIP_SIZE(Sampling);
  GATESKIP_SIZE(Embedding);
  GATESKIP_SIZE(DraftNetwork);
  GATESKIP_SIZE(Draft);
  GATESKIP_SIZE(DecodeRequest);
  GATESKIP_SIZE(Round);
  GATESKIP_SIZE(Speculation);
  GATESKIP_SIZE(PrefillRows);
  GATESKIP_SIZE(Entry);
  GATESKIP_SIZE(GroupSteps);
  GATESKIP_SIZE(DescentBlock);
  GATESKIP_SIZE(RangeSearch);
  return -1;
}

int32_t gateskip_has_decoder(void) {
#ifdef GATESKIP_SIMD
  return 1;
#else
  return 0;
#endif
}

Arena* gateskip_arena_new(void) { return new Arena; }

void gateskip_arena_free(Arena* arena) { delete arena; }

}  // extern "C"
