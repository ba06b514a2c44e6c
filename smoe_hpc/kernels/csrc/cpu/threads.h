// Work divided over the threads of the OpenMP library that torch has loaded, so that there is one pool of them.
#pragma once
#include <atomic>
#include <cstdint>
#include <cstdlib>

namespace smoe {

// GOMP_parallel as GNU's, Intel's and LLVM's OpenMP libraries export it; null: one thread.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
extern std::atomic<Parallel> run_parallel;

// Blocks of memory that a thread had and will want again in its next call: pages that are fresh from the system cost more
// than the arithmetic on them.
class Kept {
 public:
  ~Kept() {
    for (Block& block : blocks_) std::free(block.data);
  }
  static Kept& here() {
    static thread_local Kept kept;
    return kept;
  }
  // `bytes` becomes the size of what was found, at most twice as much as was asked for.
  void* take(int64_t& bytes) {
    for (Block& block : blocks_)
      if (block.data && block.bytes >= bytes && block.bytes <= 2 * bytes) {
        void* data = block.data;
        bytes = block.bytes;
        total_ -= bytes;
        block.data = nullptr;
        return data;
      }
    return std::aligned_alloc(64, bytes);
  }
  void give(void* data, int64_t bytes) {
    if (bytes > MOST) return std::free(data);
    for (int n = 0; n < BLOCKS && blocks_[next_].data; n++) next_ = (next_ + 1) % BLOCKS;
    drop(blocks_[next_]);
    blocks_[next_] = {data, bytes};
    total_ += bytes;
    while (total_ > MOST) drop(blocks_[next_ = (next_ + 1) % BLOCKS]);
  }

 private:
  struct Block {
    void* data = nullptr;
    int64_t bytes = 0;
  };
  static constexpr int BLOCKS = 12;
  static constexpr int64_t MOST = 1 << 27;  // bytes kept by a thread
  void drop(Block& block) {
    if (!block.data) return;
    std::free(block.data);
    total_ -= block.bytes;
    block.data = nullptr;
  }
  Block blocks_[BLOCKS];
  int next_ = 0;
  int64_t total_ = 0;
};

// Memory that goes with its owner, aligned for vectors; `data` is null where there is none to be had.
template <class T>
class Memory {
 public:
  explicit Memory(int64_t count) : bytes_((count * (int64_t)sizeof(T) + 64) / 64 * 64), data((T*)Kept::here().take(bytes_)) {}
  ~Memory() {
    if (data) Kept::here().give(data, bytes_);
  }
  Memory(const Memory&) = delete;

 private:
  int64_t bytes_;

 public:
  T* const data;
};

// body(item, scratch) for every item below `items`, by at most `threads` threads, each with `bytes` of scratch memory.
// Items are handed out as threads become free: a body must not depend on which thread runs it. False: no memory.
template <class Body>
bool parallel(int64_t items, int threads, int64_t bytes, const Body& body) {
  struct Team {
    const Body& body;
    int64_t items, bytes;
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    Team(const Body& b, int64_t n, int64_t size) : body(b), items(n), bytes(size) {}
    static void work(void* self) {
      Team& team = *(Team*)self;
      Memory<char> scratch(team.bytes);
      if (!scratch.data) {
        team.failed = true;
        return;
      }
      for (int64_t item = team.next++; item < team.items; item = team.next++) team.body(item, scratch.data);
    }
  };
  Team team(body, items, bytes);
  Parallel run = run_parallel;
  if (run && threads > 1 && items > 1)
    run(&Team::work, &team, (unsigned)(items < threads ? items : threads), 0);
  else
    Team::work(&team);
  return !team.failed;
}

}  // namespace smoe
