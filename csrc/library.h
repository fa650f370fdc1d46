// Shared by the op files: errors, and the instruction set in use.
#pragma once

#include <stdexcept>
#include <string>

#include "cpu/isa.h"

namespace levi_fast {

// Reaches Python as RuntimeError with exactly this text (STD_TORCH_CHECK would put a source path of the build machine
// in front, and Python's own checks could not match it).
[[noreturn]] inline void fail(const std::string& message) { throw std::runtime_error(message); }

Isa current_isa();                       // LEVI_FAST_CPU_ISA is read on first use
std::string set_isa(const char* name);  // empty, or why not

}  // namespace levi_fast
