// The ensemble's kernels, written once over simd.h's vectors and compiled once per instruction set.
#pragma once

#include "ensemble_backward.h"
#include "ensemble_forward.h"

namespace levi_fast {
namespace {

template <class T>
constexpr EnsembleKernels ensemble_entry() {
  return {sizeof(Work<T>),  &padded_width, &rows_per_task<T>,    &ensemble_scratch,  &view_rows<T>,
          &forward_rows<T>, &mixing<T>, &backward_rows<T>, &backward_sums<T>};
}

constexpr EnsembleTable ensemble_table() {
  return {{ensemble_entry<float>(), ensemble_entry<bf16>(), ensemble_entry<f16>()}};
}

}  // namespace
}  // namespace levi_fast
