// What the machine's memory is like: the size of its caches, and whether pages are there yet.
#pragma once

#include <cstdint>
#include <cstdio>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace {

// Bytes of a cache as the system gives them for the first core, or a usual size where it does not tell.
// (sysconf's _SC_LEVEL3_CACHE_SIZE adds up those of all groups of cores on some machines.)
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

// Whether so many bytes of memory have their pages already, by a few of them; where the system does not tell, yes. A
// fresh page is zeroed as it is first touched, which brings it into the cache: a store past the cache would throw it
// out again.
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
