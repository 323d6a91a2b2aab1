// Facts about the machine's memory: the sizes of its caches, and whether pages are present.
#pragma once

#include <cstdint>
#include <cstdio>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace {

// Bytes of the first core's cache of a level; `usual` where the system does not tell.
// (sysconf's _SC_LEVEL3_CACHE_SIZE is the sum over all groups of cores on some machines.)
inline int64_t cache_bytes(int level, int64_t usual) {
  char path[80];
  std::snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu0/cache/index%d/size", level);
  long long kibibytes = 0;
  if (FILE* file = std::fopen(path, "r")) {
    if (std::fscanf(file, "%lldK", &kibibytes) != 1) kibibytes = 0;
    std::fclose(file);
  }
  return kibibytes > 0 ? kibibytes * 1024 : usual;
}

// Whether the pages of a range of memory are present, judged by a few of them; true where the system does not tell. A
// fresh page is zeroed when it is first touched, which brings it into the cache; a store past the cache would evict it.
inline bool has_pages(const void* memory, int64_t bytes) {
#if defined(__linux__)
  constexpr int64_t kSamples = 4;
  static const int64_t page = sysconf(_SC_PAGESIZE);
  int64_t present = 0;
  for (int64_t i = 1; i <= kSamples; ++i) {
    const int64_t at = reinterpret_cast<int64_t>(memory) + bytes / (kSamples + 1) * i;
    unsigned char state = 0;
    if (mincore(reinterpret_cast<void*>(at / page * page), 1, &state) != 0) return true;
    present += state & 1;
  }
  return 2 * present >= kSamples;
#else
  (void)memory, (void)bytes;
  return true;
#endif
}

}  // namespace
