// Loads a library of kernels as Python does: load LIBRARY prints its ABI, whether it has a decoder, and the sums of the
// squares from 0 to 10 and of their negatives, from a matrix product.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>

#include "api.h"

namespace {

template <class Function>
Function* find(void* library, const char* name) {
  return reinterpret_cast<Function*>(dlsym(library, name));
}

}  // namespace

int main(int, char** arguments) {
  void* library = dlopen(arguments[1], RTLD_NOW);
  if (!library) {
    std::puts(dlerror());
    return EXIT_FAILURE;
  }
  constexpr int K = 11;
  float w[2][K], x[K], y[2];
  for (int i = 0; i < K; i++) w[0][i] = x[i] = float(i), w[1][i] = float(-i);
  find<decltype(gateskip_dense)>(library, "gateskip_dense")(w[0], 2, K, x, 1, y, 1);
  std::printf("%d %d %g %g\n", find<decltype(gateskip_abi_version)>(library, "gateskip_abi_version")(),
              find<decltype(gateskip_has_decoder)>(library, "gateskip_has_decoder")(), y[0], y[1]);
  return EXIT_SUCCESS;
}
