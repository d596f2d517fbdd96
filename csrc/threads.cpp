// Threads: those that PyTorch already has.
//
// Two pools on the same cores get in each other's way, each spinning while the other works. So the
// work is given to the OpenMP runtime that is loaded in this process: libgomp, or libomp and
// libiomp5, which answer to the same name. It is looked up, not linked: a linked one could be a
// second copy beside PyTorch's. Without any, threads are started for the call.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

#ifdef __linux__
#include <dlfcn.h>
#include <link.h>

#include <cstring>
#endif

#include "layer.h"

namespace gsm {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

#ifdef __linux__
int find_openmp(dl_phdr_info* info, size_t, void* result) {
  const char* slash = std::strrchr(info->dlpi_name, '/');
  const char* name = slash ? slash + 1 : info->dlpi_name;
  if (std::strncmp(name, "libgomp", 7) && std::strncmp(name, "libomp", 6) &&
      std::strncmp(name, "libiomp", 7))
    return 0;
  void* library = dlopen(info->dlpi_name, RTLD_LAZY | RTLD_NOLOAD);
  if (!library) return 0;
  void* symbol = dlsym(library, "GOMP_parallel");
  dlclose(library);  // the process holds it
  *static_cast<void**>(result) = symbol;
  return symbol != nullptr;
}
#endif

GompParallel openmp() {
  void* symbol = nullptr;
#ifdef __linux__
  dl_iterate_phdr(find_openmp, &symbol);
#endif
  return reinterpret_cast<GompParallel>(symbol);
}

struct Team {
  void (*work)(void*, int64_t);
  void* context;
  int64_t count;
  std::atomic<int64_t> next{0};
};

// Whoever is free takes the next piece, so that a busy core does not hold up the others.
void member(void* data) {
  Team& team = *static_cast<Team*>(data);
  for (int64_t i; (i = team.next.fetch_add(1, std::memory_order_relaxed)) < team.count;)
    team.work(team.context, i);
}

}  // namespace

void parallel(int threads, int64_t count, void (*work)(void*, int64_t), void* context) {
  Team team{work, context, count};
  const unsigned wanted = unsigned(std::min<int64_t>(threads, count));
  if (wanted <= 1) return member(&team);
  static const GompParallel gomp = openmp();
  if (gomp) return gomp(member, &team, wanted, 0);
  std::vector<std::thread> others;
  try {
    for (unsigned i = 1; i < wanted; ++i) others.emplace_back(member, &team);
  } catch (const std::system_error&) {  // no more threads to be had: those that run do it all
  }
  member(&team);
  for (std::thread& other : others) other.join();
}

}  // namespace gsm
