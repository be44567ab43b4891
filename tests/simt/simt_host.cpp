// simt_host.cpp - implements the emulator of simt_host.h: fibers, the scheduler, the shadow of
// shared and global memory, cp.async and the matrix unit. One file: its parts share the scheduler.
#include <algorithm>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>

#include <sys/mman.h>
#include <unistd.h>

#include "../../cpp/simt/simt.h"

#ifndef __x86_64__
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {

Options& options() {
  static Options o;
  return o;
}
Report& report() {
  static Report r;
  return r;
}

namespace emulator {

Fiber* current;
dim3 block_index;
int block_threads, shared_bytes;
unsigned char* shared;

namespace {

constexpr int kMostThreads = 1024, kMostWarps = kMostThreads / 32, kMostShared = 228 * 1024, kBarriers = 16;
constexpr size_t kMostMessages = 20;
#ifdef __SANITIZE_ADDRESS__
constexpr size_t kStack = 256 * 1024;
#else
constexpr size_t kStack = 64 * 1024;
#endif
constexpr size_t kGuard = 64 * 1024;  // bytes below each stack that cannot be accessed
enum State { kReady, kInWarp, kAtBarrier, kDone };

Fiber fibers[kMostThreads], home;
void (*kernel_body)(const void*);
const void* kernel_params;
const char* kernel_name = "";

}  // namespace

void fail(int Report::* kind, const char* format, ...) {
  Report& r = report();
  ++(r.*kind);
  if (r.messages.size() == kMostMessages) return;
  char text[400];
  va_list list;
  va_start(list, format);
  std::vsnprintf(text, sizeof text, format, list);
  va_end(list);
  char whole[560];
  std::snprintf(whole, sizeof whole, "%s: %s [block %u,%u,%u thread %d]", kernel_name, text, block_index.x,
                block_index.y, block_index.z, current && current != &home ? current->tid : -1);
  r.messages.push_back(whole);
}

std::string text(Line line) {
  const char* slash = std::strrchr(line.file, '/');
  return std::string(slash ? slash + 1 : line.file) + ":" + std::to_string(line.number);
}

// ---- fibers -------------------------------------------------------------------------------------

namespace {

[[noreturn]] void fiber_exit();
[[noreturn]] void fiber_main() {
#ifdef __SANITIZE_ADDRESS__
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  if (!home.stack) {
    home.stack = static_cast<unsigned char*>(const_cast<void*>(bottom));
    home.stack_size = size;
  }
#endif
  kernel_body(kernel_params);
  fiber_exit();
}

#ifdef __x86_64__
// Saves the callee's registers on this stack and switches to another stack. Takes 11 ns; ucontext
// takes 228 ns.
extern "C" void simt_switch(void** save, void* load);
asm(R"(
.text
.globl simt_switch
.type simt_switch,@function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch,.-simt_switch
)");
void prepare(Fiber& f) {
  auto** top = reinterpret_cast<void**>(f.stack + kStack);
  *--top = nullptr;  // the stack pointer is 8 past a multiple of 16 at entry, as after a call
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  f.context = top;
}
void switch_context(Fiber* from, Fiber* to) { simt_switch(&from->context, to->context); }
#else
ucontext_t* context(Fiber* f) {
  if (!f->context) f->context = new ucontext_t;
  return static_cast<ucontext_t*>(f->context);
}
void prepare(Fiber& f) {
  ucontext_t* u = context(&f);
  getcontext(u);
  u->uc_stack.ss_sp = f.stack;
  u->uc_stack.ss_size = kStack;
  u->uc_link = nullptr;
  makecontext(u, reinterpret_cast<void (*)()>(&fiber_main), 0);
}
void switch_context(Fiber* from, Fiber* to) { swapcontext(context(from), context(to)); }
#endif

void switch_to(Fiber* next) {
  Fiber* me = current;
  current = next;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(me->state == kDone && me != &home ? nullptr : &me->fake_stack, next->stack,
                                 next->stack_size);
#endif
  switch_context(me, next);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(me->fake_stack, nullptr, nullptr);
#endif
}

// ---- the scheduler ------------------------------------------------------------------------------

struct Warp {
  uint32_t ready = ~0u, priority = 0;
  int arrived = 0;
  Line line = {};
  const char* what = nullptr;
  void* arguments[32];
};
struct Barrier {
  int arrived = 0, threads = 0;
  Line line = {};
};
Warp warps[kMostWarps];
Barrier barriers[kBarriers];
int warp_count, alive, turn;
bool abandoned;
uint64_t random_state;

uint32_t random_number() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return uint32_t(random_state >> 16);
}

int pick_lane(uint32_t ready) {
  if (options().policy == Policy::random || options().policy == Policy::warp_priority)
    for (int skip = int(random_number() % uint32_t(__builtin_popcount(ready))); skip > 0; --skip) ready &= ready - 1;
  return __builtin_ctz(ready);
}

int pick_warp() {
  int chosen = -1, seen = 0;
  for (int i = 0; i < warp_count; ++i) {
    const int w = options().policy == Policy::lockstep ? (turn + i) % warp_count : i;
    if (!warps[w].ready) continue;
    switch (options().policy) {
      case Policy::lockstep:
        turn = w + 1;
        return w;
      case Policy::sticky:
        return w;
      case Policy::random:
        if (random_number() % uint32_t(++seen) == 0) chosen = w;
        break;
      case Policy::warp_priority:
        if (chosen < 0 || warps[w].priority > warps[chosen].priority) chosen = w;
        break;
    }
  }
  return chosen;
}

Fiber* pick() {
  const int w = abandoned ? -1 : pick_warp();
  if (w < 0) return &home;
  const int l = pick_lane(warps[w].ready);
  warps[w].ready &= ~(1u << l);
  Fiber* f = &fibers[w * 32 + l];
  f->state = kReady;
  return f;
}

void yield() {
  Fiber* next = pick();
  if (next != current) switch_to(next);
}

void make_ready(int t) { warps[t >> 5].ready |= 1u << (t & 31); }

[[noreturn]] void abandon() {
  abandoned = true;
  current->state = kInWarp;
  switch_to(&home);
  __builtin_unreachable();
}

// Time is counted in barriers, of a block or a warp. Accesses of warp u before clocks[w][u] are
// ordered before all later accesses of warp w. [w][w] orders accesses of other lanes of warp w.
uint32_t now = 1;
uint32_t clocks[kMostWarps][kMostWarps];

// Releases the threads that wait at a barrier. All their earlier accesses are ordered before all
// their later ones.
void release(int id) {
  uint32_t joined[kMostWarps] = {};
  std::vector<int> waiting;
  for (int w = 0; w < warp_count; ++w) {
    int lanes = 0;
    for (int t = w * 32; t < w * 32 + 32; ++t)
      if (fibers[t].state == kAtBarrier + 16 * id) {
        ++lanes;
        make_ready(t);
      }
    if (!lanes) continue;
    if (id && lanes < 32)
      fail(&Report::diverge, "%d threads of warp %d meet at the barrier of %s", lanes, w,
           text(barriers[id].line).c_str());
    waiting.push_back(w);
    for (int u = 0; u < warp_count; ++u) joined[u] = std::max(joined[u], clocks[w][u]);
  }
  ++now;
  for (int w : waiting) joined[w] = now;
  for (int w : waiting) std::copy_n(joined, warp_count, clocks[w]);
  barriers[id].arrived = 0;
  ++report().barriers;
  for (int i = 0; i < warp_count; ++i) warps[i].priority = random_number();
}

void fiber_exit() {
  Fiber* f = current;
  f->state = kDone;
  if (!f->copies.empty())
    fail(&Report::inflight, "thread ends with the cp.async of %s under way", text(f->copies[0].line).c_str()),
        f->copies.clear();
  --alive;
  Barrier& b = barriers[0];
  if (b.arrived) fail(&Report::diverge, "thread ends while others wait at the barrier of %s", text(b.line).c_str());
  if (b.arrived && b.arrived == alive) release(0);
  switch_to(pick());
  __builtin_unreachable();
}

}  // namespace

void barrier(int id, int threads, Line line) {
  if (id < 0 || id >= kBarriers || threads <= 0 || threads % 32 || threads > block_threads) {
    fail(&Report::other, "barrier %d for %d threads at %s", id, threads, text(line).c_str());
    abandon();
  }
  Barrier& b = barriers[id];
  if (!b.arrived) {
    b.line = line;
    b.threads = threads;
    if (!id && alive < block_threads)
      fail(&Report::diverge, "%d threads have ended before the barrier of %s", block_threads - alive,
           text(line).c_str());
  } else if (b.threads != threads || (!id && b.line != line)) {
    fail(&Report::diverge, "the barrier of %s for %d threads meets that of %s for %d", text(line).c_str(), threads,
         text(b.line).c_str(), b.threads);
  }
  current->state = kAtBarrier + 16 * id;
  current->wait_line = line;
  current->wait_what = "a barrier";
  const int expected = id ? threads : alive;
  if (++b.arrived == expected) release(id);
  yield();
}

void collective(const char* what, Line line, void* argument, void (*all)(void* const*)) {
  Warp& w = warps[current->tid >> 5];
  if (!w.arrived) {
    w.what = what;
    w.line = line;
  } else if (w.line != line || w.what != what) {
    fail(&Report::diverge, "warp diverged: %s of %s meets %s of %s", what, text(line).c_str(), w.what,
         text(w.line).c_str());
    abandon();
  }
  w.arguments[current->tid & 31] = argument;
  current->state = kInWarp;
  current->wait_line = line;
  current->wait_what = what;
  if (++w.arrived == 32) {
    all(w.arguments);
    w.arrived = 0;
    w.ready = ~0u;
    ++report().collectives;
  }
  yield();
}

void warp_barrier(Line line) {
  collective("sync_warp", line, nullptr, [](void* const*) {
    const int w = current->tid >> 5;
    clocks[w][w] = ++now;
  });
}

// ---- the shadow of memory -----------------------------------------------------------------------

namespace {

// A source line and the lane that read there, in four bytes.
constexpr uint8_t kSeveral = 32;
struct Place {
  uint16_t number;
  uint8_t file, lane;
};
std::vector<const char*> files;

Place place(Line line, int lane = kSeveral) {
  static size_t last = 0;
  if (last >= files.size() || files[last] != line.file) {
    last = size_t(std::find(files.begin(), files.end(), line.file) - files.begin());
    if (last == files.size()) files.push_back(line.file);
  }
  return {uint16_t(line.number), uint8_t(last), uint8_t(lane)};
}
std::string text(Place p) { return text(Line{files[p.file], p.number}); }

// The last write of two bytes, and the reads since then.
struct Cell {
  uint32_t written;      // 0: never
  uint32_t readers;      // a mask of warps
  uint32_t read_before;  // a read by an earlier block
  uint16_t writer, in_flight;
  Place writer_place;
};
struct Read {
  uint32_t when;
  Place place;
};

// A range of memory and its cells; reads[cell * warp_count + warp]. Accesses before `start` are
// ordered before all later accesses. Accesses before block_start were made by another block.
struct Shadow {
  const unsigned char* begin = nullptr;
  std::vector<Cell> cells;
  std::vector<Read> reads;
  uint32_t start = 1;
  std::string name;
  bool filled = false;

  void cover(const void* p, size_t bytes) {
    begin = static_cast<const unsigned char*>(p);
    cells.assign((bytes + 1) / 2, Cell());
  }
  void prepare(uint32_t when) {
    start = when;
    if (reads.size() == cells.size() * size_t(warp_count)) return;
    reads.assign(cells.size() * size_t(warp_count), Read());
    for (Cell& c : cells) c.readers = 0;
  }
};
struct Range {
  const unsigned char *begin, *end;
  bool writable;
  Shadow shadow;  // only of writable ranges
};
std::vector<Range> ranges;
Shadow shared_shadow;
uint32_t block_start;

class Access {
 public:
  Access(Shadow& s, const void* p, size_t bytes, Line line)
      : s_(s),
        first_(size_t(static_cast<const unsigned char*>(p) - s.begin) / 2),
        end_(first_ + (bytes + 1) / 2),
        line_(line),
        warp_(current->tid >> 5) {}

  void read(bool whole_warp) {
    const Place mine = place(line_, whole_warp ? kSeveral : current->tid & 31);
    for (size_t i = first_; i < end_; ++i) {
      Cell& c = s_.cells[i];
      if (c.in_flight)
        under_way("read", i);
      else if (c.written < s_.start)
        require_filled(i);
      else if (c.written < block_start)
        race("read", i, "write of another block", text(c.writer_place));
      else if (!follows(c.written, c.writer))
        race("read", i, "write", text(c.writer_place));
      Read& r = s_.reads[i * size_t(warp_count) + size_t(warp_)];
      if (c.readers >> warp_ & 1 && r.when < block_start) c.read_before = std::max(c.read_before, r.when);
      const bool again = c.readers >> warp_ & 1 && r.when >= clocks[warp_][warp_] && r.place.lane != mine.lane;
      r = {now, mine};
      if (again) r.place.lane = kSeveral;
      c.readers |= 1u << warp_;
    }
  }
  void write() {
    const Place mine = place(line_);
    for (size_t i = first_; i < end_; ++i) {
      Cell& c = s_.cells[i];
      check_write(i);
      c.written = now;
      c.writer = uint16_t(current->tid);
      c.writer_place = mine;
      c.readers = 0;
    }
  }
  void issue() {
    for (size_t i = first_; i < end_; ++i) {
      check_write(i);
      s_.cells[i].in_flight = uint16_t(current->tid + 1);
    }
  }
  void land() {
    for (size_t i = first_; i < end_; ++i) s_.cells[i].in_flight = 0;
    write();
  }

 private:
  bool follows(uint32_t when, int thread) const { return thread == current->tid || when < clocks[warp_][thread >> 5]; }
  void check_write(size_t i) {
    Cell& c = s_.cells[i];
    if (c.in_flight) under_way("write", i);
    if (c.written >= s_.start && c.written < block_start)
      race("write", i, "write of another block", text(c.writer_place));
    else if (c.written >= s_.start && !follows(c.written, c.writer))
      race("write", i, "write", text(c.writer_place));
    bool another_block = c.read_before >= s_.start;
    for (uint32_t left = c.readers; left; left &= left - 1) {
      const int w = __builtin_ctz(left);
      const Read& r = s_.reads[i * size_t(warp_count) + size_t(w)];
      const bool same_thread = w == warp_ && r.place.lane == (current->tid & 31);
      if (r.when >= s_.start && r.when < block_start)
        another_block = true;
      else if (r.when >= s_.start && !same_thread && r.when >= clocks[warp_][w])
        race("write", i, "read", text(r.place));
    }
    if (another_block) race("write", i, "read of another block", "the same launch");
  }
  void race(const char* mine, size_t i, const char* other, const std::string& where) {
    fail(&Report::race, "%s byte %zu: %s of %s and %s, %s, are not ordered", s_.name.c_str(), 2 * i, mine,
         text(line_).c_str(), other, where.c_str());
  }
  void under_way(const char* mine, size_t i) {
    fail(&Report::inflight, "%s of %s of %s byte %zu, where a cp.async of thread %d is under way", mine,
         text(line_).c_str(), s_.name.c_str(), 2 * i, s_.cells[i].in_flight - 1);
  }
  void require_filled(size_t i) {
    if (s_.filled || (&s_ != &shared_shadow && s_.cells[i].written)) return;
    fail(&Report::uninit, "read of %s of %s byte %zu, which was never written", text(line_).c_str(), s_.name.c_str(),
         2 * i);
  }

  Shadow& s_;
  size_t first_, end_;
  Line line_;
  int warp_;
};

// The alignment of an access: the size of a vector. Larger values are structs, which move in
// several pieces.
bool aligned(const void* p, size_t bytes, const char* what, Line line) {
  const bool yes = reinterpret_cast<uintptr_t>(p) % std::min<size_t>(bytes & -bytes, 16) == 0;
  if (!yes)
    fail(&Report::align, "%s of %zu bytes at %s: the address is no multiple of that", what, bytes, text(line).c_str());
  return yes;
}

Range* range_of(const void* p, size_t bytes) {
  static size_t last = 0;
  const auto* q = static_cast<const unsigned char*>(p);
  const auto holds = [&](const Range& r) { return q >= r.begin && q + bytes <= r.end; };
  if (last < ranges.size() && holds(ranges[last])) return &ranges[last];
  for (last = 0; last < ranges.size(); ++last)
    if (holds(ranges[last])) return &ranges[last];
  return nullptr;
}

bool readable(const void* p, size_t bytes, Line line) {
  Range* r = range_of(p, bytes);
  if (!r) {
    fail(&Report::bounds, "global read of %zu bytes at %p, %s, is outside of every argument", bytes, p,
         text(line).c_str());
    return false;
  }
  if (r->writable) Access(r->shadow, p, bytes, line).read(false);
  return true;
}

}  // namespace

bool outside(int i, int count, int n, Line line) {
  const bool yes = i < 0 || i + count > n;
  if (yes) fail(&Report::bounds, "shared index %d (+%d) outside of [0, %d) at %s", i, count, n, text(line).c_str());
  return yes;
}

bool global_read(const void* p, size_t bytes, Line line) {
  return aligned(p, bytes, "global read", line) && readable(p, bytes, line);
}
bool global_write(const void* p, size_t bytes, Line line) {
  if (!aligned(p, bytes, "global write", line)) return false;
  Range* r = range_of(p, bytes);
  if (r && r->writable) {
    Access(r->shadow, p, bytes, line).write();
    return true;
  }
  fail(&Report::bounds, "global write of %zu bytes at %p, %s, is %s", bytes, p, text(line).c_str(),
       r ? "to an argument that is read only" : "outside of every argument");
  return false;
}

bool shared_read(const void* p, int bytes, Line line, bool whole_warp) {
  if (!aligned(p, size_t(bytes), "shared read", line)) return false;
  Access(shared_shadow, p, size_t(bytes), line).read(whole_warp);
  return true;
}
bool shared_write(const void* p, int bytes, Line line) {
  if (!aligned(p, size_t(bytes), "shared write", line)) return false;
  Access(shared_shadow, p, size_t(bytes), line).write();
  return true;
}

// ---- cp.async -----------------------------------------------------------------------------------

namespace {

void land(const Copy& c) {
  std::memcpy(c.to, c.from, size_t(c.valid));
  std::memset(c.to + c.valid, 0, size_t(16 - c.valid));
}

}  // namespace

void copy(void* to, const void* from, int valid, Line line) {
  if (!aligned(to, 16, "cp.async destination", line) || !aligned(from, 16, "cp.async source", line) ||
      (valid > 0 && !readable(from, size_t(valid), line)))
    return;
  const Copy c{static_cast<unsigned char*>(to), static_cast<const unsigned char*>(from), valid, current->groups, line};
  Access(shared_shadow, to, 16, line).issue();
  if (options().cp_async == CpAsync::immediate)
    land(c);
  else if (options().cp_async == CpAsync::poison)
    std::memset(to, 0xFF, 16);
  current->copies.push_back(c);
}

void copy_wait(int groups) {
  std::vector<Copy>& copies = current->copies;
  size_t done = 0;
  for (; done < copies.size() && copies[done].group < current->groups - groups; ++done) {
    if (options().cp_async != CpAsync::immediate) land(copies[done]);
    Access(shared_shadow, copies[done].to, 16, copies[done].line).land();
  }
  copies.erase(copies.begin(), copies.begin() + std::ptrdiff_t(done));
}

// ---- matrix unit: fragment layouts of the PTX ISA, "Matrix fragments for mma" -------------------

namespace {

struct LdmatrixArgument {
  uint32_t* r;
  const void* row;
};

template <bool kTrans>
void ldmatrix_all(void* const* all) {
  const auto row = [&](int l) {
    return static_cast<const unsigned char*>(static_cast<LdmatrixArgument*>(all[l])->row);
  };
  for (int m = 0; m < 4; ++m) {
    int rows_in_bank[8] = {}, worst = 1;  // rows of 16 bytes; equal addresses share an access
    for (int r = 0; r < 8; ++r) {
      bool repeated = false;
      for (int s = 0; s < r; ++s) repeated |= row(m * 8 + s) == row(m * 8 + r);
      if (!repeated) worst = std::max(worst, ++rows_in_bank[reinterpret_cast<uintptr_t>(row(m * 8 + r)) / 16 % 8]);
    }
    ++report().ldmatrix_phases, report().ldmatrix_conflicts += worst - 1;
    uint16_t x[8][8];
    for (int r = 0; r < 8; ++r) std::memcpy(x[r], row(m * 8 + r), 16);
    for (int l = 0; l < 32; ++l) {
      const int i = l / 4, j = l % 4 * 2;
      static_cast<LdmatrixArgument*>(all[l])->r[m] =
          kTrans ? x[j][i] | uint32_t(x[j + 1][i]) << 16 : x[i][j] | uint32_t(x[i][j + 1]) << 16;
    }
  }
}

// The sum of products is exact and is truncated to a float at the end. Hardware keeps a few bits
// more than a float has, and does not round to nearest.
float cut(double x) {
  const float y = float(x);
  return std::fabs(double(y)) > std::fabs(x) ? std::nextafter(y, 0.f) : y;
}

template <class A>
struct MmaArgument {
  float* c;
  const A* a;
  A b[2];
};

// of(register, h): the number in half h of a register
template <class A, int K, class F>
void mma_all(void* const* all, F of) {
  constexpr int kHalves = K / 8;  // numbers in a register
  double a[16][K], b[8][K];
  for (int l = 0; l < 32; ++l) {
    const auto* x = static_cast<const MmaArgument<A>*>(all[l]);
    const int g = l / 4, t = l % 4 * kHalves;
    for (int h = 0; h < kHalves; ++h)
      for (int part = 0; part < 2; ++part) {
        const int k = t + h + part * K / 2;
        a[g][k] = of(x->a[2 * part], h);
        a[g + 8][k] = of(x->a[2 * part + 1], h);
        b[g][k] = of(x->b[part], h);
      }
  }
  ++report().mma;
  for (int l = 0; l < 32; ++l) {
    float* c = static_cast<const MmaArgument<A>*>(all[l])->c;
    for (int e = 0; e < 4; ++e) {
      const int i = l / 4 + e / 2 * 8, j = l % 4 * 2 + e % 2;
      double sum = c[e];
      for (int k = 0; k < K; ++k) sum += a[i][k] * b[j][k];
      c[e] = cut(sum);
    }
  }
}

}  // namespace

void ldmatrix(bool trans, uint32_t (&r)[4], const void* row, Line line) {
  LdmatrixArgument a{r, row};
  if (trans)
    collective("ldmatrix.trans", line, &a, ldmatrix_all<true>);
  else
    collective("ldmatrix", line, &a, ldmatrix_all<false>);
}

uint32_t movmatrix(uint32_t x, Line line) {
  return gather<uint32_t, uint32_t>("movmatrix", line, x, [](const uint32_t* v, int l) {
    const int i = l / 4, j = l % 4 * 2;  // element (i, j) of the transposed matrix is (j, i)
    const auto at = [&](int row, int column) { return v[row * 4 + column / 2] >> column % 2 * 16 & 0xffff; };
    return at(j, i) | at(j + 1, i) << 16;
  });
}

void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Line line) {
  MmaArgument<uint32_t> x{c, a, {b0, b1}};
  collective("mma.bf16", line, &x, [](void* const* all) {
    mma_all<uint32_t, 16>(all, [](uint32_t u, int h) { return double(to_float(bf16{uint16_t(u >> 16 * h)})); });
  });
}
void mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Line line) {
  MmaArgument<uint32_t> x{c, a, {b0, b1}};
  collective("mma.f16", line, &x, [](void* const* all) {
    mma_all<uint32_t, 16>(all, [](uint32_t u, int h) { return double(to_float(f16{uint16_t(u >> 16 * h)})); });
  });
}
void mma_tf32(float (&c)[4], const float (&a)[4], float b0, float b1, Line line) {
  MmaArgument<float> x{c, a, {b0, b1}};
  collective("mma.tf32", line, &x, [](void* const* all) {  // the matrix unit ignores the low bits
    mma_all<float, 8>(all, [](float f, int) { return double(bits_as<float>(bits(f) & ~0x1fffu)); });
  });
}

// ---- launch -------------------------------------------------------------------------------------

namespace {

// The threads that wait, one line for each source line where threads wait.
void tell_deadlock() {
  std::map<std::string, std::pair<int, int>> places;  // -> number of threads, first thread
  for (int t = block_threads - 1; t >= 0; --t)
    if (fibers[t].state != kDone) {
      auto& place = places[std::string(fibers[t].wait_what) + " of " + text(fibers[t].wait_line)];
      ++place.first;
      place.second = t;
    }
  std::string list;
  for (const auto& [where, threads] : places)
    list += (list.empty() ? "" : "; ") + std::to_string(threads.first) + " from thread " +
            std::to_string(threads.second) + " wait in " + where;
  fail(&Report::deadlock, "%d of %d threads left: %s", alive, block_threads, list.c_str());
}

void run_block(dim3 index, int smem) {
  block_index = index;
  block_start = ++now;
  std::memset(shared, 0xFF, size_t(smem));  // NaN
  for (int k = 0; k < smem / 2; ++k) shared_shadow.cells[size_t(k)].in_flight = 0;
  shared_shadow.start = block_start;
  abandoned = false;
  alive = block_threads;
  turn = 0;
  std::fill_n(barriers, kBarriers, Barrier());
  for (int w = 0; w < warp_count; ++w) {
    warps[w] = Warp();
    warps[w].priority = random_number();
    std::fill_n(clocks[w], warp_count, block_start);
  }
  for (int t = 0; t < block_threads; ++t) {
    Fiber& f = fibers[t];
    f.state = kReady;
    f.groups = 0;
    f.fake_stack = nullptr;
    f.copies.clear();
#ifdef __SANITIZE_ADDRESS__
    ASAN_UNPOISON_MEMORY_REGION(f.stack, kStack);
#endif
    prepare(f);
  }
  current = &home;
  switch_to(pick());
  if (alive && !abandoned) tell_deadlock();
}

#ifndef __SANITIZE_ADDRESS__  // the sanitizer reports it
// A thread that overflows its stack prints the kernel before the process ends.
void on_fault(int, siginfo_t* info, void*) {
  const auto* at = static_cast<const unsigned char*>(info->si_addr);
  if (current && current != &home && at >= current->stack - kGuard && at < current->stack) {
    char told[200];
    const int n = std::snprintf(told, sizeof told, "%s: thread %d has used up its stack of %zu bytes\n", kernel_name,
                                current->tid, kStack);
    if (write(STDERR_FILENO, told, size_t(n)) < 0) _exit(1);
  }
  std::signal(SIGSEGV, SIG_DFL);
}
void watch_stacks() {
  static char handler_stack[32 * 1024];
  stack_t other = {};
  other.ss_sp = handler_stack;
  other.ss_size = sizeof handler_stack;
  sigaltstack(&other, nullptr);
  struct sigaction action = {};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &action, nullptr);
}
#else
void watch_stacks() {}
#endif

void make_memory() {
  constexpr int kAccess = PROT_READ | PROT_WRITE, kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  if (!shared) {
    shared = static_cast<unsigned char*>(mmap(nullptr, kMostShared, kAccess, kFlags, -1, 0));
    shared_shadow.cover(shared, kMostShared);
    shared_shadow.name = "shared";
    watch_stacks();
  }
  for (int t = 0; t < block_threads; ++t) {
    if (fibers[t].stack) continue;
    auto* memory = static_cast<unsigned char*>(mmap(nullptr, kStack + kGuard, kAccess, kFlags, -1, 0));
    mprotect(memory, kGuard, PROT_NONE);
    fibers[t].stack = memory + kGuard;
    fibers[t].stack_size = kStack;
    fibers[t].tid = t;
  }
}

}  // namespace

// The error of a device's runtime for such a launch, or nullptr.
const char* refuse_launch(dim3 grid, int block, int most_threads, int smem) {
  if (block <= 0 || block > std::min(most_threads, kMostThreads) || !grid.x || !grid.y || !grid.z ||
      grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    return "invalid configuration argument";
  if (block % 32) return "a block of this library is a multiple of 32 threads";
  if (smem < 0 || smem > most_shared()) return "invalid argument";
  return nullptr;
}

void run(dim3 grid, int block, int smem, void (*body)(const void*), const void* params, const char* name) {
  kernel_body = body;
  kernel_params = params;
  kernel_name = name;
  block_threads = block;
  warp_count = block / 32;
  shared_bytes = smem;
  current = &home;
  ++report().launches;
  random_state = options().seed * 0x9E3779B97F4A7C15ull + 88172645463325252ull;
  make_memory();
  const uint32_t launch_start = ++now;
  shared_shadow.prepare(launch_start);
  for (Range& r : ranges)
    if (r.writable) r.shadow.prepare(launch_start);
#ifdef __SANITIZE_ADDRESS__
  ASAN_UNPOISON_MEMORY_REGION(shared, size_t(smem));
  ASAN_POISON_MEMORY_REGION(shared + smem, size_t(kMostShared - smem));
#endif
  const unsigned blocks = grid.x * grid.y * grid.z, start = random_number() % blocks;
  for (unsigned n = 0; n < blocks; ++n) {
    const unsigned i = options().policy == Policy::lockstep ? n : (n + start) % blocks;
    run_block(dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y), smem);
  }
}

}  // namespace emulator

void allow(const void* p, size_t bytes, bool writable, bool filled) {
  using emulator::ranges;
  const auto* begin = static_cast<const unsigned char*>(p);
  ranges.push_back({begin, begin + bytes, writable, {}});
  if (!writable) return;
  emulator::Shadow& shadow = ranges.back().shadow;
  shadow.cover(p, bytes);
  shadow.filled = filled;
  shadow.name = "range " + std::to_string(ranges.size() - 1);
}
void forget() { emulator::ranges.clear(); }

}  // namespace simt
