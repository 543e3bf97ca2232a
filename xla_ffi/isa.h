// What every instruction-set file starts from. The standard headers come first: a target region must not reach them.
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "arena.h"
#include "sparse_conv.h"

#ifndef SF_CALLS
#define SF_INLINE inline __attribute__((always_inline))
#define SF_LAMBDA __attribute__((always_inline))
#else  // the tests' sanitizers: a third of the time to compile
#define SF_INLINE inline
#define SF_LAMBDA
#endif
#define SF_COUNT(a) static_cast<int>(sizeof(a) / sizeof((a)[0]))
