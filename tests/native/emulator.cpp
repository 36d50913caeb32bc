// Running a kernel's blocks and threads on a CPU, in an order of our choice.
//
// MASKCF_EMULATOR_ORDER is "forward" (the default), "reverse" or "random": of the blocks, and of the threads of a block
// between two points at which they meet. A kernel whose result depends on it lacks a barrier. MASKCF_EMULATOR_SHARED is
// the shared memory that a block may have, in bytes. MASKCF_EMULATOR_LOG names a file that gets a line for every kernel
// that ran: its address in the library.
#include "emulator.h"

#include <dlfcn.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <vector>

#include <torch/headeronly/util/Exception.h>

dim3 threadIdx, blockIdx, blockDim;

namespace maskcf {
namespace emulator {
namespace {

constexpr int kPoison = 0xff;  // a NaN in every float format, -1 in the integers, no valid bool
constexpr size_t kStackBytes = 64 << 10;
constexpr size_t kGuardBytes = 64;

// A place where threads wait for each other. `round` counts how often all have come.
struct Meeting {
  int expected = 0, arrived = 0;
  unsigned round = 0;
};

struct Warp {
  Meeting meeting;
  Word32 handed[2][32];  // two, so that nobody writes what another still reads
};

struct Thread {
  std::vector<char> stack = std::vector<char>(kStackBytes);
  ucontext_t start;
  jmp_buf place;  // where it goes on; setjmp costs no system call where swapcontext costs two
  bool started = false, done = true;
  const Meeting* waits = nullptr;
  unsigned round = 0;  // of `waits`, when it began to wait
};

struct Block {
  Meeting meeting;
  bool said[2];
  std::vector<Warp> warps;
};

std::vector<Thread> pool;  // threads are kept from block to block: each runs `body` again and again
const std::function<void()>* body = nullptr;
int current = 0;
jmp_buf scheduler;
Block block;
std::string error;
std::vector<std::pair<void*, size_t>> statics;
std::vector<char> dynamic;
char* dynamic_begin = nullptr;

const char* setting(const char* name, const char* otherwise) {
  const char* value = std::getenv(name);
  return value && *value ? value : otherwise;
}

// Back to the scheduler, until it lets this thread go on.
__attribute__((noinline)) void pause() {
  if (_setjmp(pool[size_t(current)].place) == 0) _longjmp(scheduler, 1);
}

void thread_main() {
  for (;;) {
    (*body)();
    pool[size_t(current)].done = true;
    pause();
  }
}

__attribute__((noinline)) void let_run(int index) {
  Thread& thread = pool[size_t(index)];
  current = index;
  threadIdx = dim3(unsigned(index), 0, 0);
  if (_setjmp(scheduler) != 0) return;
  if (thread.started) _longjmp(thread.place, 1);
  thread.started = true;
  getcontext(&thread.start);
  thread.start.uc_stack.ss_sp = thread.stack.data();
  thread.start.uc_stack.ss_size = thread.stack.size();
  thread.start.uc_link = nullptr;
  makecontext(&thread.start, thread_main, 0);
  setcontext(&thread.start);
}

void meet(Meeting& meeting) {
  Thread& thread = pool[size_t(current)];
  const unsigned round = meeting.round;
  if (++meeting.arrived == meeting.expected) {
    meeting.arrived = 0;
    ++meeting.round;
    return;
  }
  thread.waits = &meeting;
  thread.round = round;
  while (meeting.round == round) pause();
  thread.waits = nullptr;
}

// 0, 1, … in the order that is asked for, a new one at each call if it is random.
class Order {
 public:
  explicit Order(int64_t count) : places_(size_t(count)) {
    std::iota(places_.begin(), places_.end(), int64_t(0));
    const std::string name = setting("MASKCF_EMULATOR_ORDER", "forward");
    STD_TORCH_CHECK(name == "forward" || name == "reverse" || name == "random",
                    "MASKCF_EMULATOR_ORDER must be forward, reverse or random, got ", name);
    if (name == "reverse") std::reverse(places_.begin(), places_.end());
    random_ = name == "random";
  }
  const std::vector<int64_t>& next() {
    if (random_) std::shuffle(places_.begin(), places_.end(), engine_);
    return places_;
  }

 private:
  std::vector<int64_t> places_;
  bool random_;
  std::minstd_rand engine_{1};
};

void poison() {
  for (const auto& [memory, bytes] : statics) std::memset(memory, kPoison, bytes);
  std::fill(dynamic.begin(), dynamic.end(), char(kPoison));
}

bool guards_hold(size_t shared) {
  const auto holds = [](const char* guard) {
    return std::all_of(guard, guard + kGuardBytes, [](char byte) { return byte == char(kPoison); });
  };
  return holds(dynamic_begin - kGuardBytes) && holds(dynamic_begin + shared);
}

void run_block(int threads, size_t shared, Order& order) {
  poison();
  block.meeting = {threads};
  block.warps.assign(size_t(threads + 31) / 32, Warp{});
  for (int i = 0; i < threads; i += 32) block.warps[size_t(i / 32)].meeting.expected = std::min(32, threads - i);
  for (int i = 0; i < threads; ++i) pool[size_t(i)].done = false, pool[size_t(i)].waits = nullptr;
  for (int left = threads; left > 0;) {
    bool moved = false;
    for (const int64_t i : order.next()) {
      Thread& thread = pool[size_t(i)];
      if (thread.done || (thread.waits && thread.waits->round == thread.round)) continue;
      let_run(int(i));
      if (!error.empty()) return;
      moved = true;
      left -= thread.done;
    }
    if (!moved) {
      error = "some threads of a block wait where the others never come";
      return;
    }
  }
  if (!guards_hold(shared)) error = "a thread wrote beyond its block's shared memory";
}

void log(const void* kernel) {
  static const char* const path = setting("MASKCF_EMULATOR_LOG", nullptr);
  static std::set<const void*> seen;
  if (!path || !seen.insert(kernel).second) return;
  Dl_info library;
  dladdr(kernel, &library);
  std::FILE* file = std::fopen(path, "a");
  STD_TORCH_CHECK(file, "cannot write to ", path);
  std::fprintf(file, "%zx\n", size_t(static_cast<const char*>(kernel) - static_cast<const char*>(library.dli_fbase)));
  std::fclose(file);
}

}  // namespace

void run(const void* kernel, dim3 grid, int threads, size_t shared, const std::function<void()>& thread) {
  STD_TORCH_CHECK(grid.x > 0 && grid.y > 0 && grid.z > 0 && threads > 0, "a launch of no threads");
  STD_TORCH_CHECK(grid.x < 1u << 31 && grid.y < 65536 && grid.z < 65536, "a grid larger than a GPU takes");
  STD_TORCH_CHECK(threads <= 1024 && threads % 32 == 0, "a block is whole warps, up to 1024 threads");
  const size_t most = size_t(std::atoll(setting("MASKCF_EMULATOR_SHARED", "166912")));
  STD_TORCH_CHECK(shared <= most, "a block may have ", most, " bytes of shared memory, and was to have ", shared);
  log(kernel);

  blockDim = dim3(unsigned(threads), 1, 1);
  body = &thread;
  dynamic.resize(shared + 2 * kGuardBytes + 64);
  // On a 16-byte boundary and no wider one.
  dynamic_begin = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(dynamic.data()) + 31) / 32 * 32 + 16);
  while (dynamic_begin < dynamic.data() + kGuardBytes) dynamic_begin += 32;
  if (pool.size() < size_t(threads)) pool = std::vector<Thread>(size_t(threads));

  const int64_t count = int64_t(grid.x) * grid.y * grid.z;
  Order blocks(count), order(threads);
  for (const int64_t i : blocks.next()) {
    blockIdx = dim3(unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y));
    run_block(threads, shared, order);
    if (!error.empty()) break;
  }
  if (error.empty()) return;
  pool.clear();  // some threads stand in the middle of the kernel
  const std::string why = std::move(error);
  error.clear();
  STD_TORCH_CHECK(false, why);
}

void stop(const char* why) {
  error = why;
  for (;;) pause();
}

bool meet_block(bool says) {
  bool& said = block.said[block.meeting.round % 2];
  said = (block.meeting.arrived > 0 && said) || says;
  meet(block.meeting);
  return said;
}

const Word32* exchange(const void* mine, size_t bytes) {
  Warp& warp = block.warps[size_t(current / 32)];
  Word32* const handed = warp.handed[warp.meeting.round % 2];
  std::memcpy(handed[current % 32].bytes, mine, bytes);
  meet(warp.meeting);
  return handed;
}

char* dynamic_shared() { return dynamic_begin; }

void poison_before_blocks(void* memory, size_t bytes) {
  statics.emplace_back(memory, bytes);
  std::memset(memory, kPoison, bytes);
}

// By the figures of the PTX manual for mma.m16n8k16 with 16-bit floats. With group = lane / 4 and member = lane % 4:
// a's registers hold rows (group, group + 8) times columns (from 2 member, from 2 member + 8), rows first; b's hold rows
// from 2 member and from 2 member + 8 of column `group`; c's values are rows (group, group + 8) times columns
// (2 member, 2 member + 1), columns first. The lower half of a register is the lower row or column.
void mma(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], ToFloat to_float) {
  struct Fragment {
    unsigned a[4], b[2];
  } mine;
  std::copy(a, a + 4, mine.a);
  std::copy(b, b + 2, mine.b);
  const Word32* const all = exchange(&mine, sizeof mine);
  const auto half = [&](unsigned word, int k) { return double(to_float(uint16_t(k % 2 ? word >> 16 : word))); };
  const auto left = [&](int row, int k) {
    const auto held = lane_value<Fragment>(all, row % 8 * 4 + k % 8 / 2);
    return half(held.a[row / 8 + k / 8 * 2], k);
  };
  const auto right = [&](int k, int column) {
    const auto held = lane_value<Fragment>(all, column * 4 + k % 8 / 2);
    return half(held.b[k / 8], k);
  };
  const int group = current % 32 / 4, member = current % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = group + i / 2 * 8, column = member * 2 + i % 2;
    double sum = c[i];
    for (int k = 0; k < 16; ++k) sum += left(row, k) * right(k, column);
    c[i] = float(sum);
  }
}

}  // namespace emulator
}  // namespace maskcf
