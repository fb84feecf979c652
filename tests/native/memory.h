// Memory of an exact size whose end is the end of a page, before one that no access passes. Masked vector loads are no
// memory accesses to AddressSanitizer, but they fault all the same; it sees plain accesses before the memory, and in
// the few bytes that alignment leaves behind it. Prefetches beyond the end do nothing, and are allowed.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#if defined(__SANITIZE_ADDRESS__)
#define PW_TEST_POISONS
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define PW_TEST_POISONS
#endif
#endif
#if defined(PW_TEST_POISONS)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#endif

class Memory {
public:
    // `slack` bytes are left between the memory and the forbidden page: not seen if they are only read by masked loads.
    Memory(size_t bytes, size_t alignment, uint8_t fill, size_t slack = 0) : size_(bytes) {
        const size_t page = (size_t)sysconf(_SC_PAGESIZE);
        usable_ = (bytes + slack + alignment + page - 1) / page * page;
        base_ = (char *)mmap(nullptr, usable_ + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (base_ == MAP_FAILED || mprotect(base_ + usable_, page, PROT_NONE)) {
            perror("memory for a test");
            _Exit(1);
        }
        const uintptr_t begin = ((uintptr_t)base_ + usable_ - slack - bytes) / alignment * alignment;
        data_ = base_ + (begin - (uintptr_t)base_);
        memset(data_, fill, bytes);
        ASAN_POISON_MEMORY_REGION(base_, data_ - base_);
        ASAN_POISON_MEMORY_REGION(data_ + bytes, base_ + usable_ - (data_ + bytes));
    }
    Memory(const Memory &) = delete;
    Memory &operator=(const Memory &) = delete;
    ~Memory() {
        ASAN_UNPOISON_MEMORY_REGION(base_, usable_);
        munmap(base_, usable_ + (size_t)sysconf(_SC_PAGESIZE));
    }

    template <class T>
    T *as() const {
        return (T *)data_;
    }
    template <class T>
    T *as_or_null() const {
        return size_ ? (T *)data_ : nullptr;
    }
    size_t size() const { return size_; }

private:
    size_t size_, usable_;
    char *base_, *data_;
};
