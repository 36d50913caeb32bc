// Fresh memory for large results.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace maskcf {

// Asks for large pages before the first write. A result of tens of megabytes is fresh memory from the system, and
// faulting it in 4 KiB at a time costs several times what the copy into it does. Only a hint: any answer will do.
inline void prefer_large_pages(void* data, int64_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kPage = 4096;
  constexpr int64_t kWorthIt = int64_t(4) << 20;
  if (bytes < kWorthIt) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) / kPage * kPage;
  (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

}  // namespace maskcf
