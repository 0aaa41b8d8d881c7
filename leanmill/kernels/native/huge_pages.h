/* Fresh memory arrives a page of 4 KiB at a time, each with a fault that costs more than a kernel's work on it. */
#ifndef LEANMILL_HUGE_PAGES_H
#define LEANMILL_HUGE_PAGES_H

#include <stdint.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

/* Advises the system to back memory that is about to be written by huge pages. Include before other headers
 * with _DEFAULT_SOURCE defined. */
void prefer_huge_pages(void *memory, int64_t bytes) {
#ifdef MADV_HUGEPAGE
    const uintptr_t page = 4096, first = ((uintptr_t)memory + page - 1) & ~(page - 1);
    const uintptr_t last = ((uintptr_t)memory + (uintptr_t)bytes) & ~(page - 1);
    if (last > first) madvise((void *)first, last - first, MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
}

#endif
