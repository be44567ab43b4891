// simt_host.cpp - the emulator behind simt_host.h: fibers, the scheduler, the shadow of shared memory, what cp.async
// and the matrix unit do.
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <memory>

#include <sys/mman.h>

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

namespace {

struct Range {
  const unsigned char *begin, *end;
  bool writable;
};
std::vector<Range> ranges;

}  // namespace

void allow(const void* p, size_t bytes, bool writable) {
  const auto* begin = static_cast<const unsigned char*>(p);
  ranges.push_back({begin, begin + bytes, writable});
}
void forget() { ranges.clear(); }

namespace emulator {

Fiber* current;
dim3 block_index;
int block_threads, shared_bytes;
unsigned char* shared;

namespace {

constexpr int kMostThreads = 1024, kMostShared = 228 * 1024, kBarriers = 16;
#ifdef __SANITIZE_ADDRESS__
constexpr size_t kStack = 256 * 1024;
#else
constexpr size_t kStack = 64 * 1024;
#endif
enum State { kReady, kInWarp, kAtBarrier, kDone };

Fiber fibers[kMostThreads], home;
void (*kernel_body)(const void*);
const void* kernel_params;
const char* kernel_name = "";

}  // namespace

void fail(int Report::* kind, const char* format, ...) {
  Report& r = report();
  ++(r.*kind);
  if (r.messages.size() > 20 && !r.messages.empty()) return;
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

// ---- fibers ---------------------------------------------------------------------------------------------------------

namespace {

[[noreturn]] void fiber_exit();
[[noreturn]] void fiber_main() {
#ifdef __SANITIZE_ADDRESS__
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  if (!home.stack) home.stack = static_cast<unsigned char*>(const_cast<void*>(bottom)), home.stack_size = size;
#endif
  kernel_body(kernel_params);
  fiber_exit();
}

#ifdef __x86_64__
// Saves the callee's registers on this stack and goes on with another one: 11 ns, where ucontext takes 228.
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
  u->uc_stack.ss_sp = f.stack, u->uc_stack.ss_size = kStack, u->uc_link = nullptr;
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

// ---- the scheduler --------------------------------------------------------------------------------------------------

struct Warp {
  uint32_t ready = ~0u, priority = 0;
  int arrived = 0, line = 0;
  const char* what = nullptr;
  void* arguments[32];
};
struct Barrier {
  int arrived = 0, threads = 0, line = 0;
};
Warp warps[kMostThreads / 32];
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

void release(int id) {
  for (int t = 0; t < block_threads; ++t)
    if (fibers[t].state == kAtBarrier + 16 * id) make_ready(t), ++fibers[t].cta_epoch;
  barriers[id].arrived = 0;
  ++report().barriers;
  for (int i = 0; i < warp_count; ++i) warps[i].priority = random_number();
}

void fiber_exit() {
  Fiber* f = current;
  f->state = kDone;
  if (!f->copies.empty())
    fail(&Report::inflight, "thread ends with a cp.async of line %d under way", f->copies[0].line), f->copies.clear();
  --alive;
  Barrier& b = barriers[0];
  if (b.arrived && b.arrived == alive) {
    fail(&Report::diverge, "thread ends while others wait at the barrier of line %d", b.line);
    release(0);
  }
  switch_to(pick());
  __builtin_unreachable();
}

}  // namespace

void barrier(int id, int threads, int line) {
  if (id < 0 || id >= kBarriers || threads % 32 || threads > block_threads) {
    fail(&Report::other, "barrier %d for %d threads at line %d", id, threads, line);
    abandon();
  }
  Barrier& b = barriers[id];
  if (!b.arrived)
    b.line = line, b.threads = threads;
  else if (b.line != line || b.threads != threads)
    fail(&Report::diverge, "the barrier of line %d meets that of line %d", line, b.line);
  current->state = kAtBarrier + 16 * id, current->wait_line = line, current->wait_what = "a barrier";
  const int expected = id ? threads : alive;
  if (++b.arrived == expected) release(id);
  yield();
}

void collective(const char* what, int line, void* argument, void (*all)(void* const*)) {
  Warp& w = warps[current->tid >> 5];
  if (!w.arrived) {
    w.what = what, w.line = line;
  } else if (w.line != line || w.what != what) {
    fail(&Report::diverge, "warp diverged: %s of line %d meets %s of line %d", what, line, w.what, w.line);
    abandon();
  }
  w.arguments[current->tid & 31] = argument;
  current->state = kInWarp, current->wait_line = line, current->wait_what = what;
  if (++w.arrived == 32) {
    all(w.arguments);
    w.arrived = 0, w.ready = ~0u;
    ++report().collectives;
  }
  yield();
}

void warp_barrier(int line) {
  collective("sync_warp", line, nullptr, [](void* const*) {
    const int first = current->tid & ~31;
    for (int l = 0; l < 32; ++l) ++fibers[first + l].warp_epoch;
  });
}

// ---- global memory --------------------------------------------------------------------------------------------------

namespace {

const Range* range_of(const void* p, size_t bytes) {
  static size_t last = 0;
  const auto* q = static_cast<const unsigned char*>(p);
  const auto holds = [&](const Range& r) { return q >= r.begin && q + bytes <= r.end; };
  if (last < ranges.size() && holds(ranges[last])) return &ranges[last];
  for (last = 0; last < ranges.size(); ++last)
    if (holds(ranges[last])) return &ranges[last];
  return nullptr;
}

}  // namespace

bool global_read(const void* p, size_t bytes, int line) {
  if (range_of(p, bytes)) return true;
  fail(&Report::bounds, "global read of %zu bytes at %p, line %d, is outside of every argument", bytes, p, line);
  return false;
}
bool global_write(const void* p, size_t bytes, int line) {
  const Range* r = range_of(p, bytes);
  if (r && r->writable) return true;
  fail(&Report::bounds, "global write of %zu bytes at %p, line %d, is %s", bytes, p, line,
       r ? "to an argument that is read only" : "outside of every argument");
  return false;
}

// ---- the shadow of shared memory ------------------------------------------------------------------------------------

namespace {

// Of two bytes. An access is ordered before this one when its thread is the same, a barrier of the block lies between
// them or, in one warp, a sync_warp.
struct Cell {
  uint32_t write_cta, write_warp, read_cta, read_warp_epoch;
  uint16_t writer, write_line, read_line, in_flight;
  int16_t read_warp, read_lane;  // -2: several
};
Cell* shadow;
uint32_t first_epoch = 1;

Cell* cell(const void* p) { return shadow + (static_cast<const unsigned char*>(p) - shared) / 2; }
int offset(const Cell* c) { return int(c - shadow) * 2; }

bool write_is_ordered(const Cell& c) {
  return c.writer == current->tid || c.write_cta < current->cta_epoch ||
         (c.writer >> 5 == current->tid >> 5 && c.write_warp < current->warp_epoch);
}
bool read_is_ordered(const Cell& c) {
  if (c.read_cta < current->cta_epoch) return true;
  if (c.read_warp != current->tid >> 5) return false;
  return c.read_warp_epoch < current->warp_epoch || c.read_lane == (current->tid & 31);
}

void check_write(const Cell* c, int line) {
  if (c->in_flight)
    fail(&Report::inflight, "write of line %d to shared byte %d, where a cp.async of thread %d is under way", line,
         offset(c), c->in_flight - 1);
  if (c->write_cta >= first_epoch && !write_is_ordered(*c))
    fail(&Report::race, "shared byte %d: write of line %d and write of thread %d, line %d, are not ordered", offset(c),
         line, c->writer, c->write_line);
  if (c->read_cta >= first_epoch && !read_is_ordered(*c))
    fail(&Report::race, "shared byte %d: write of line %d and read of line %d are not ordered", offset(c), line,
         c->read_line);
}
void mark_write(Cell* c, int line) {
  c->write_cta = current->cta_epoch, c->write_warp = current->warp_epoch;
  c->writer = uint16_t(current->tid), c->write_line = uint16_t(line);
}

}  // namespace

void shared_read(const void* p, int bytes, int line, bool whole_warp) {
  const auto warp = int16_t(current->tid >> 5), lane = int16_t(whole_warp ? -2 : current->tid & 31);
  Cell* c = cell(p);
  for (int k = 0; k < (bytes + 1) / 2; ++k, ++c) {
    if (c->in_flight)
      fail(&Report::inflight, "read of line %d of shared byte %d, where a cp.async of thread %d is under way", line,
           offset(c), c->in_flight - 1);
    else if (c->write_cta < first_epoch)
      fail(&Report::uninit, "read of line %d of shared byte %d, which was never written", line, offset(c));
    else if (!write_is_ordered(*c))
      fail(&Report::race, "shared byte %d: read of line %d and write of thread %d, line %d, are not ordered", offset(c),
           line, c->writer, c->write_line);
    if (c->read_cta != current->cta_epoch)
      c->read_cta = current->cta_epoch, c->read_warp_epoch = current->warp_epoch, c->read_warp = warp,
      c->read_lane = lane;
    else if (c->read_warp != warp)
      c->read_warp = -2;
    else if (c->read_warp_epoch != current->warp_epoch)
      c->read_warp_epoch = current->warp_epoch, c->read_lane = lane;
    else if (c->read_lane != lane)
      c->read_lane = -2;
    c->read_line = uint16_t(line);
  }
}

void shared_write(const void* p, int bytes, int line) {
  Cell* c = cell(p);
  for (int k = 0; k < (bytes + 1) / 2; ++k, ++c) check_write(c, line), mark_write(c, line);
}

// ---- cp.async -------------------------------------------------------------------------------------------------------

namespace {

void land(const Copy& c) {
  std::memcpy(c.to, c.from, size_t(c.valid));
  std::memset(c.to + c.valid, 0, size_t(16 - c.valid));
}

}  // namespace

void copy_issue(void* to, const void* from, int valid, int line) {
  const Copy copy{static_cast<unsigned char*>(to), static_cast<const unsigned char*>(from), valid, current->groups,
                  line};
  Cell* c = cell(to);
  for (int k = 0; k < 8; ++k) check_write(c + k, line), c[k].in_flight = uint16_t(current->tid + 1);
  if (options().cp_async == CpAsync::immediate)
    land(copy);
  else if (options().cp_async == CpAsync::poison)
    std::memset(to, 0xFF, 16);
  current->copies.push_back(copy);
}

void copy_wait(int groups) {
  std::vector<Copy>& copies = current->copies;
  size_t done = 0;
  for (; done < copies.size() && copies[done].group < current->groups - groups; ++done) {
    if (options().cp_async != CpAsync::immediate) land(copies[done]);
    Cell* c = cell(copies[done].to);
    for (int k = 0; k < 8; ++k) c[k].in_flight = 0, mark_write(c + k, copies[done].line);
  }
  copies.erase(copies.begin(), copies.begin() + std::ptrdiff_t(done));
}

// ---- matrix unit: fragment layouts of the PTX ISA, "Matrix fragments for mma" ---------------------------------------

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
    int rows_in_bank[8] = {}, worst = 1;  // of 16 bytes; equal addresses share one access
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

// The sum of products is exact up to its end and then cut to a float: hardware keeps a few bits more than a float has
// and does not round to nearest.
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

// of(register, h): the number in half h of it
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
        a[g][k] = of(x->a[2 * part], h), a[g + 8][k] = of(x->a[2 * part + 1], h), b[g][k] = of(x->b[part], h);
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

void ldmatrix(bool trans, uint32_t (&r)[4], const void* row, int line) {
  LdmatrixArgument a{r, row};
  if (trans)
    collective("ldmatrix.trans", line, &a, ldmatrix_all<true>);
  else
    collective("ldmatrix", line, &a, ldmatrix_all<false>);
}

uint32_t movmatrix(uint32_t x, int line) {
  return gather<uint32_t, uint32_t>("movmatrix", line, x, [](const uint32_t* v, int l) {
    const int i = l / 4, j = l % 4 * 2;  // element (i, j) of the transposed is (j, i)
    const auto at = [&](int row, int column) { return v[row * 4 + column / 2] >> column % 2 * 16 & 0xffff; };
    return at(j, i) | at(j + 1, i) << 16;
  });
}

void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, int line) {
  MmaArgument<uint32_t> x{c, a, {b0, b1}};
  collective("mma.bf16", line, &x, [](void* const* all) {
    mma_all<uint32_t, 16>(all, [](uint32_t u, int h) { return double(to_float(bf16{uint16_t(u >> 16 * h)})); });
  });
}
void mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, int line) {
  MmaArgument<uint32_t> x{c, a, {b0, b1}};
  collective("mma.f16", line, &x, [](void* const* all) {
    mma_all<uint32_t, 16>(all, [](uint32_t u, int h) { return double(to_float(f16{uint16_t(u >> 16 * h)})); });
  });
}
void mma_tf32(float (&c)[4], const float (&a)[4], float b0, float b1, int line) {
  MmaArgument<float> x{c, a, {b0, b1}};
  collective("mma.tf32", line, &x, [](void* const* all) {  // the unit ignores the low bits
    mma_all<float, 8>(all, [](float f, int) { return double(bits_as<float>(bits(f) & ~0x1fffu)); });
  });
}

// ---- launch ---------------------------------------------------------------------------------------------------------

namespace {

void run_block(dim3 index, int smem) {
  block_index = index;
  const uint32_t base = ++first_epoch;
  std::memset(shared, 0xFF, size_t(smem));  // NaN
  for (int k = 0; k < smem / 2; ++k) shadow[k].in_flight = 0;
  abandoned = false, alive = block_threads, turn = 0;
  std::fill_n(barriers, kBarriers, Barrier());
  for (int w = 0; w < warp_count; ++w) warps[w] = Warp(), warps[w].priority = random_number();
  for (int t = 0; t < block_threads; ++t) {
    Fiber& f = fibers[t];
    f.state = kReady, f.cta_epoch = base, f.warp_epoch = 0, f.groups = 0, f.fake_stack = nullptr;
    f.copies.clear();
#ifdef __SANITIZE_ADDRESS__
    ASAN_UNPOISON_MEMORY_REGION(f.stack, kStack);
#endif
    prepare(f);
  }
  current = &home;
  switch_to(pick());
  if (alive && !abandoned)
    for (int t = 0, shown = 0; t < block_threads && shown < 2; ++t)
      if (fibers[t].state != kDone)
        ++shown, fail(&Report::deadlock, "%d threads left; thread %d waits in %s of line %d", alive, t,
                      fibers[t].wait_what, fibers[t].wait_line);
  for (int t = 0; t < block_threads; ++t) first_epoch = std::max(first_epoch, fibers[t].cta_epoch);
}

void make_memory() {
  constexpr int kAccess = PROT_READ | PROT_WRITE, kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  if (!shared) {
    shared = static_cast<unsigned char*>(mmap(nullptr, kMostShared, kAccess, kFlags, -1, 0));
    shadow = static_cast<Cell*>(std::calloc(kMostShared / 2, sizeof(Cell)));
  }
  for (int t = 0; t < block_threads; ++t) {
    if (fibers[t].stack) continue;
    auto* memory = static_cast<unsigned char*>(mmap(nullptr, kStack + 4096, kAccess, kFlags, -1, 0));
    mprotect(memory, 4096, PROT_NONE);  // below the stack
    fibers[t].stack = memory + 4096, fibers[t].stack_size = kStack, fibers[t].tid = t;
  }
}

}  // namespace

void run(dim3 grid, int block, int smem, void (*body)(const void*), const void* params, const char* name) {
  kernel_body = body, kernel_params = params, kernel_name = name, block_threads = block, warp_count = block / 32;
  shared_bytes = smem;
  current = &home;
  ++report().launches;
  if (smem > kMostShared) return fail(&Report::other, "%d bytes of shared memory", smem);
  random_state = options().seed * 0x9E3779B97F4A7C15ull + 88172645463325252ull;
  make_memory();
#ifdef __SANITIZE_ADDRESS__
  ASAN_UNPOISON_MEMORY_REGION(shared, size_t(smem));
  ASAN_POISON_MEMORY_REGION(shared + smem, size_t(kMostShared - smem));
#endif
  const unsigned blocks = grid.x * grid.y * grid.z, start = blocks ? random_number() % blocks : 0;
  for (unsigned n = 0; n < blocks; ++n) {
    const unsigned i = options().policy == Policy::lockstep ? n : (n + start) % blocks;
    run_block(dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y), smem);
  }
}

}  // namespace emulator
}  // namespace simt
