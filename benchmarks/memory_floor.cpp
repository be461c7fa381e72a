// The memory floor of a step in float: the loads and stores of SGD with momentum, with almost no
// arithmetic. It reads param, grad and momentum_buffer and writes param and momentum_buffer: 20
// bytes an element.

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

// Two additions: the least arithmetic that uses all three values and changes both results.
void loop(float* __restrict param, const float* __restrict grad, float* __restrict momentum_buffer,
          int64_t numel) {
  for (int64_t i = 0; i < numel; ++i) {
    momentum_buffer[i] += grad[i];
    param[i] += momentum_buffer[i];
  }
}

}  // namespace

// A thread takes adjacent chunks or, if `in_turn`, every n-th chunk for n threads.
extern "C" void memory_floor(const Tensors* tensors, int64_t chunk_numel, int in_turn) {
  std::vector<Chunk> chunks;
  for (int64_t tensor = 0; tensor < tensors->size; ++tensor)
    for (int64_t begin = 0; begin < tensors->numels[tensor]; begin += chunk_numel)
      chunks.push_back({tensor, begin, std::min(begin + chunk_numel, tensors->numels[tensor])});

  const auto update = [&](const Chunk& chunk) {
    loop(tensors->params[chunk.tensor] + chunk.begin, tensors->grads[chunk.tensor] + chunk.begin,
         tensors->momentum_buffers[chunk.tensor] + chunk.begin, chunk.end - chunk.begin);
  };
  const size_t size = chunks.size();
  const size_t threads = static_cast<size_t>(at::get_num_threads());
  if (in_turn) {
    at::parallel_for(0, static_cast<int64_t>(threads), 1, [&](int64_t begin, int64_t end) {
      for (int64_t thread = begin; thread < end; ++thread)
        for (size_t i = static_cast<size_t>(thread); i < size; i += threads) update(chunks[i]);
    });
  } else {
    at::parallel_for(0, static_cast<int64_t>(size), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) update(chunks[static_cast<size_t>(i)]);
    });
  }
}
