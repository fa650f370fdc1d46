// The fibers of cuda_emulation.h. One block at a time; its threads take turns on one CPU thread.
#include "cuda_emulation.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

namespace cuda_emulation {

dim3 grid_dim, block_dim, block_idx, thread_idx;
bool reversed = false;

namespace {

constexpr size_t kStack = 128 * 1024;
constexpr unsigned kWarpSize = 32;

enum class State { kReady, kAtBarrier, kAtShuffle, kDone };

struct Fiber {
  ucontext_t context;
  State state;
};

ucontext_t scheduler;
std::vector<Fiber> fibers;
std::vector<uint64_t> slots;  // what each thread offers in a shuffle
char* stacks = nullptr;
size_t stack_count = 0;
unsigned current = 0;
const std::function<void()>* body = nullptr;
std::exception_ptr failure;
std::mutex one_launch;

void enter() {
  try {
    (*body)();
  } catch (...) {
    failure = std::current_exception();
  }
  fibers[current].state = State::kDone;
  swapcontext(&fibers[current].context, &scheduler);
}

void wait(State state) {
  const unsigned self = current;
  fibers[self].state = state;
  swapcontext(&fibers[self].context, &scheduler);
  current = self;
}

void reserve(size_t count) {
  if (count <= stack_count) {
    return;
  }
  if (stacks != nullptr) {
    munmap(stacks, stack_count * kStack);
  }
  stacks = static_cast<char*>(
      mmap(nullptr, count * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (stacks == MAP_FAILED) {
    throw std::runtime_error("cuda_emulation: no memory for the threads' stacks");
  }
  stack_count = count;
}

void resume(unsigned index) {
  current = index;
  thread_idx = dim3(index % block_dim.x, index / block_dim.x % block_dim.y, index / (block_dim.x * block_dim.y));
  fibers[index].state = State::kReady;
  swapcontext(&scheduler, &fibers[index].context);
  if (failure) {
    std::rethrow_exception(failure);
  }
}

unsigned count_in(State state, unsigned first, unsigned last) {
  return static_cast<unsigned>(
      std::count_if(fibers.begin() + first, fibers.begin() + last, [&](const Fiber& f) { return f.state == state; }));
}

void release(unsigned first, unsigned last) {
  for (unsigned i = first; i < last; ++i) {
    fibers[i].state = State::kReady;
  }
}

void run_block(unsigned threads) {
  for (unsigned i = 0; i < threads; ++i) {
    getcontext(&fibers[i].context);
    fibers[i].context.uc_stack.ss_sp = stacks + i * kStack;
    fibers[i].context.uc_stack.ss_size = kStack;
    fibers[i].context.uc_link = nullptr;
    makecontext(&fibers[i].context, enter, 0);
    fibers[i].state = State::kReady;
  }
  while (count_in(State::kDone, 0, threads) < threads) {
    for (unsigned i = 0; i < threads; ++i) {
      const unsigned index = reversed ? threads - 1 - i : i;
      if (fibers[index].state == State::kReady) {
        resume(index);
      }
    }
    bool moved = false;
    for (unsigned first = 0; first < threads; first += kWarpSize) {
      const unsigned last = std::min(first + kWarpSize, threads);
      if (count_in(State::kAtShuffle, first, last) == last - first) {
        release(first, last);
        moved = true;
      } else if (count_in(State::kAtShuffle, first, last) > 0) {
        throw std::runtime_error("cuda_emulation: a shuffle that not all lanes of its warp reach");
      }
    }
    if (!moved && count_in(State::kAtBarrier, 0, threads) == threads) {
      release(0, threads);
    } else if (!moved && count_in(State::kDone, 0, threads) < threads) {
      throw std::runtime_error("cuda_emulation: a barrier that not all threads of its block reach");
    }
  }
}

}  // namespace

void block_barrier() { wait(State::kAtBarrier); }

unsigned lane() { return current % kWarpSize; }

uint64_t exchange(uint64_t value, unsigned source) {
  const unsigned warp = current / kWarpSize * kWarpSize;
  slots[current] = value;
  wait(State::kAtShuffle);
  const uint64_t other = slots[warp + source];
  wait(State::kAtShuffle);  // nobody may offer its next value before everybody has read this one
  return other;
}

void launch(dim3 grid, dim3 block, const std::function<void()>& kernel) {
  const std::lock_guard<std::mutex> lock(one_launch);
  const unsigned threads = block.x * block.y * block.z;
  if (threads == 0 || threads > 1024 || threads % kWarpSize != 0) {
    throw std::runtime_error("cuda_emulation: a block of " + std::to_string(threads) + " threads");
  }
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    throw std::runtime_error("cuda_emulation: a grid of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) +
                             " x " + std::to_string(grid.z) + " blocks");
  }
  grid_dim = grid;
  block_dim = block;
  body = &kernel;
  failure = nullptr;
  fibers.resize(threads);
  slots.resize(threads);
  reserve(threads);
  const uint64_t blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t index = reversed ? blocks - 1 - i : i;
    block_idx = dim3(static_cast<unsigned>(index % grid.x), static_cast<unsigned>(index / grid.x % grid.y),
                     static_cast<unsigned>(index / grid.x / grid.y));
    run_block(threads);
  }
}

}  // namespace cuda_emulation

extern "C" __attribute__((visibility("default"))) void levi_fast_emulation_reverse(int yes) {
  cuda_emulation::reversed = yes != 0;
}
