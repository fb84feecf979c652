// What the CPU and the operating system offer. An obstacle is a static text that says what is missing, "" if nothing is.
#pragma once

#if defined(__x86_64__)
#include <atomic>
#include <cpuid.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

struct CpuidWords {
    uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
    CpuidWords(uint32_t leaf, uint32_t subleaf) {
        if (!__get_cpuid_count(leaf, subleaf, &eax, &ebx, &ecx, &edx)) eax = ebx = ecx = edx = 0;
    }
};

inline bool has_bits(uint64_t word, uint64_t bits) { return (word & bits) == bits; }

// Register states that the system saves when it changes threads: Intel's manual, volume 1, 13.3.
inline uint64_t saved_states() {
    if (!has_bits(CpuidWords(1, 0).ecx, 1u << 27)) return 0;  // xgetbv is not there to be asked
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

inline const char *avx2_obstacle() {
    const CpuidWords basic(1, 0), extended(7, 0);
    if (!has_bits(basic.ecx, 1u << 12 | 1u << 29) || !has_bits(extended.ebx, 1u << 5))
        return "the CPU lacks AVX2, FMA or F16C";
    return has_bits(saved_states(), 0x6) ? "" : "the operating system does not save AVX registers";
}

inline const char *avx512_obstacle() {
    if (const char *obstacle = avx2_obstacle(); *obstacle) return obstacle;
    const CpuidWords extended(7, 0), more(7, 1);
    if (!has_bits(extended.ebx, 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31)) return "the CPU lacks AVX-512 F, BW, DQ or VL";
    if (!has_bits(extended.ecx, 1u << 1 | 1u << 11)) return "the CPU lacks AVX-512 VBMI or VNNI";
    if (!has_bits(more.eax, 1u << 5)) return "the CPU lacks AVX-512 BF16";
    return has_bits(saved_states(), 0xe6) ? "" : "the operating system does not save AVX-512 registers";
}

// Linux grants tiles to a process that asks, once and for all of its threads: docs.kernel.org/arch/x86/xstate.html.
inline bool tiles_are_granted() {
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    static std::atomic<int> granted{-1};
    if (granted.load() < 0) granted.store(syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0);
    return granted.load() == 1;
}

inline const char *amx_obstacle() {
    if (const char *obstacle = avx512_obstacle(); *obstacle) return obstacle;
    if (!has_bits(CpuidWords(7, 0).edx, 1u << 22 | 1u << 24)) return "the CPU lacks AMX-TILE or AMX-BF16";
    if (!has_bits(saved_states(), 0x60000)) return "the operating system does not save AMX tiles";
    return tiles_are_granted() ? "" : "the operating system refuses AMX tiles";
}

}  // namespace
#endif
