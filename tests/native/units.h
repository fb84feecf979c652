// The kernels this machine runs.
#pragma once
#include <string.h>

#include "table.h"

extern "C" const pw_kernels *pw_kernels_amx_emulated(void);

struct Unit {
    const char *name;  // for messages; for pw_select too, unless the unit is not part of the library
    const pw_kernels *(*kernels)(void);
    bool is_in_library;
};

inline constexpr Unit kUnits[] = {
    {"baseline", pw_kernels_baseline, true},
#if defined(PW_HAS_AVX2)
    {"avx2", pw_kernels_avx2, true},
#endif
#if defined(PW_HAS_AVX512)
    {"avx512", pw_kernels_avx512, true},
    {"amx, its tiles emulated", pw_kernels_amx_emulated, false},
#endif
#if defined(PW_HAS_AMX)
    {"amx", pw_kernels_amx, true},
#endif
};

inline bool can_run(const Unit &unit) {
    const char *obstacle = pw_isa_obstacle(unit.is_in_library ? unit.name : "avx512");
    return obstacle && !*obstacle;
}
