# liblevi_fast_cuda.so: the CUDA C++ kernels, a library of its own on the same stable ABI. Included by CMakeLists.txt.
#
# It links no library of a certain torch or CUDA build: libtorch_cpu has the ABI, the CUDA runtime is linked in
# statically, and the one function of libtorch_cuda is looked up when the first op runs (csrc/cuda/host.cu). So it is
# built against any torch wheel, the CPU one too. The tests also build these files for the CPU: the same kernels, each
# launch run block after block (tests/kernels/cpp/cuda_emulation.h).
set(CUDA_SOURCES
  csrc/cuda/ensemble_inputs.cu
  csrc/cuda/host.cu
  csrc/cuda/layerwise_ensemble.cu
  csrc/cuda/layerwise_ensemble_backward.cu
  csrc/cuda/layerwise_loss.cu
  csrc/cuda/library.cu
  csrc/cuda/masked_mean_pool.cu
)

function(levi_fast_cuda_target name)
  target_include_directories(${name} PRIVATE csrc)
  target_include_directories(${name} SYSTEM PRIVATE "${LEVI_FAST_TORCH_ROOT}/include")
  target_compile_definitions(${name} PRIVATE TORCH_TARGET_VERSION=0x020b000000000000)
  target_link_libraries(${name} PRIVATE "${TORCH_CPU_LIBRARY}" ${CMAKE_DL_LIBS})
  set_target_properties(${name} PROPERTIES SUFFIX ".so" SKIP_BUILD_RPATH ON)
  target_link_options(${name} PRIVATE -Wl,--no-undefined -Wl,--exclude-libs,ALL)
endfunction()

if(LEVI_FAST_CUDA_ONLY STREQUAL "emulation")
  set_source_files_properties(${CUDA_SOURCES} PROPERTIES LANGUAGE CXX COMPILE_OPTIONS "-xc++")
  add_library(levi_fast_cuda_emulated SHARED ${CUDA_SOURCES} tests/kernels/cpp/cuda_emulation.cpp)
  levi_fast_cuda_target(levi_fast_cuda_emulated)
  target_include_directories(levi_fast_cuda_emulated PRIVATE tests/kernels/cpp)
  target_compile_definitions(levi_fast_cuda_emulated PRIVATE LEVI_FAST_CUDA_EMULATION)
  target_compile_options(levi_fast_cuda_emulated PRIVATE -Wall -Wextra -Wno-unknown-pragmas -Wno-unused-function
    -Wno-maybe-uninitialized)  # packs are filled by the same condition that guards their use
  if(LEVI_FAST_SANITIZE)
    target_compile_options(levi_fast_cuda_emulated PRIVATE -g -fno-omit-frame-pointer -fsanitize=address,undefined
      -fno-sanitize-recover=undefined)
    target_link_options(levi_fast_cuda_emulated PRIVATE -fsanitize=address,undefined -Wl,-z,undefs)
  endif()
  return()
endif()

if(NOT LEVI_FAST_CUDA MATCHES "^(auto|on|off)$")
  message(FATAL_ERROR "LEVI_FAST_CUDA must be auto, on or off, got '${LEVI_FAST_CUDA}'")
endif()
if(LEVI_FAST_CUDA STREQUAL "off")
  return()
endif()
file(STRINGS "${LEVI_FAST_TORCH_ROOT}/version.py" torch_cuda REGEX "^cuda.*= *['\"]")
if(LEVI_FAST_CUDA STREQUAL "auto" AND NOT torch_cuda)
  message(STATUS "CUDA kernels: left out, this torch has no CUDA (LEVI_FAST_CUDA=on builds them all the same)")
  return()
endif()
find_program(LEVI_FAST_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH /usr/local/cuda PATH_SUFFIXES bin)
if(NOT LEVI_FAST_NVCC)
  if(LEVI_FAST_CUDA STREQUAL "on")
    message(FATAL_ERROR "LEVI_FAST_CUDA=on needs nvcc: put it on PATH or name its toolkit in CUDA_HOME")
  endif()
  message(STATUS "CUDA kernels: left out, no nvcc on PATH, in CUDA_HOME or in /usr/local/cuda")
  return()
endif()

set(CMAKE_CUDA_COMPILER "${LEVI_FAST_NVCC}")
set(CMAKE_CUDA_ARCHITECTURES OFF)  # the flags below say it, with the letter of sm_90a
enable_language(CUDA)
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
set(CMAKE_CUDA_FLAGS_RELEASE "-O3 -DNDEBUG")
add_library(levi_fast_cuda SHARED ${CUDA_SOURCES})
levi_fast_cuda_target(levi_fast_cuda)
set_target_properties(levi_fast_cuda PROPERTIES CUDA_RUNTIME_LIBRARY Static)
set(cuda_flags --expt-relaxed-constexpr -Xcompiler=-Wall,-Wextra,-Wno-unused-function)
foreach(architecture ${LEVI_FAST_CUDA_ARCHITECTURES})
  list(APPEND cuda_flags "-gencode=arch=compute_${architecture},code=sm_${architecture}")
endforeach()
list(GET LEVI_FAST_CUDA_ARCHITECTURES 0 architecture)
list(APPEND cuda_flags "-gencode=arch=compute_${architecture},code=compute_${architecture}")  # for GPUs to come
if(LEVI_FAST_CUDA_ONLY)
  list(APPEND cuda_flags -Xptxas=-v)  # the gate reads spills off it (tests/kernels/cuda_compile.py)
endif()
target_compile_options(levi_fast_cuda PRIVATE ${cuda_flags})
