// The schema of every op, as the native library defines it. A C++ program that loads the library has no Python, so
// these texts cannot live there; kernels/schemas.py repeats them for installations without the native library, refuses
// a library whose texts differ, and a test compares both.
#pragma once

namespace levi_fast {

inline constexpr const char* kSchemas[] = {
    "masked_mean_pool(Tensor hidden, Tensor? mask=None) -> Tensor",
    "masked_mean_pool_backward(Tensor grad, Tensor? mask, SymInt length) -> Tensor",
};

}  // namespace levi_fast
