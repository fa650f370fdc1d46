// Which vector instructions the CPU kernels use: found at run time, never assumed from the build machine.
#pragma once

#include <string>

#include "common.h"

namespace levi_fast {

const char* isa_name(Isa isa);

// Whether this binary carries code for `isa` / whether this machine can also run it.
bool isa_compiled(Isa isa);
bool isa_supported(Isa isa);

// The best one this machine can run.
Isa detect_isa();

// Turns a name ("scalar", "avx2", "avx512", "neon", or "auto"/nullptr/"" for the best) into a choice. Returns false and
// fills `error` where the name is unknown or this machine or binary cannot run it.
bool choose_isa(const char* name, Isa* chosen, std::string* error);

}  // namespace levi_fast
