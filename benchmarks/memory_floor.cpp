// The memory floor of a step in float: the loads and stores of SGD with momentum, and next to no arithmetic.
// Read param, grad and momentum_buffer, write param and momentum_buffer: 20 bytes an element.

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

struct Tensors {
  int64_t size;
  float* const* params;
  const float* const* grads;
  float* const* momentum_buffers;
  const int64_t* numels;
};

struct Chunk {
  int64_t tensor;
  int64_t begin;
  int64_t end;
};

// Two additions are the least that needs all three values and changes both results.
void plain(float* __restrict param, const float* __restrict grad, float* __restrict momentum_buffer,
           int64_t numel) {
  for (int64_t i = 0; i < numel; ++i) {
    momentum_buffer[i] += grad[i];
    param[i] += momentum_buffer[i];
  }
}

// The same, with each cache line asked for some lines ahead.
void prefetching(float* __restrict param, const float* __restrict grad,
                 float* __restrict momentum_buffer, int64_t numel) {
  constexpr int64_t kLine = 16;
  constexpr int64_t kAhead = 32 * kLine;
  int64_t i = 0;
  for (; i + kLine <= numel; i += kLine) {
    __builtin_prefetch(param + i + kAhead, 1);
    __builtin_prefetch(grad + i + kAhead, 0);
    __builtin_prefetch(momentum_buffer + i + kAhead, 1);
    plain(param + i, grad + i, momentum_buffer + i, kLine);
  }
  plain(param + i, grad + i, momentum_buffer + i, numel - i);
}

}  // namespace

extern "C" void memory_floor(const Tensors* tensors, int64_t chunk_numel, int prefetch) {
  std::vector<Chunk> chunks;
  for (int64_t tensor = 0; tensor < tensors->size; ++tensor)
    for (int64_t begin = 0; begin < tensors->numels[tensor]; begin += chunk_numel)
      chunks.push_back({tensor, begin, std::min(begin + chunk_numel, tensors->numels[tensor])});

  const auto loop = prefetch ? prefetching : plain;
  at::parallel_for(0, static_cast<int64_t>(chunks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Chunk& chunk = chunks[static_cast<size_t>(i)];
      loop(tensors->params[chunk.tensor] + chunk.begin, tensors->grads[chunk.tensor] + chunk.begin,
           tensors->momentum_buffers[chunk.tensor] + chunk.begin, chunk.end - chunk.begin);
    }
  });
}
