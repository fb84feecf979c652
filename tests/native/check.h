// Checks that count their failures and say what failed; the program goes on, up to a limit.
#pragma once
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include <atomic>

inline std::atomic<int> failures{0};
constexpr int kMostFailures = 20;

__attribute__((format(printf, 2, 3))) inline bool check(bool holds, const char *format, ...) {
    if (holds) return true;
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "FAILED: ");
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    if (++failures < kMostFailures) return false;
    fprintf(stderr, "too many failures\n");
    _Exit(1);
}
